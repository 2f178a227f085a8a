"""One 4-bit model spread over several processes by torch's FSDP2, and its sharded checkpoints.

`accelerate launch --config_file helpers/launch/ddp.yaml --num_processes 2 -m helpers.sharding`.
The loop is written out, because accelerate and Trainer shard nothing on a CPU and do not say so.
"""

import argparse
import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.checkpoint import CheckpointException, load, save, state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers import checkpoints, environment, loading, prompting, records, training
from helpers.errors import TutorialError
from helpers.profiles import Profile

TRAINED = state_dict.StateDictOptions(ignore_frozen_params=True)
GATHERED = state_dict.StateDictOptions(ignore_frozen_params=True, full_state_dict=True)
# torch says so whenever one process alone saves or loads, which is meant here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unin")


def pack_as_floats(model: torch.nn.Module) -> None:
    """Call the bytes of 4-bit weights float32 numbers, of which torch 2.11 can make parameters."""
    for module in loading.four_bit_layers(model).values():
        weight = module.weight
        weight.data = weight.data.view(-1).view(torch.float32).view(-1, 1)
        weight.quant_storage = module.quant_storage = torch.float32
        module.quant_state = weight.quant_state  # FSDP makes parameters of its own, without it


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Spread every parameter over all processes: each decoder layer by itself, then the rest."""
    for module in list(model.modules()):
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module)
    return fully_shard(model)


def prove_sharded(model: torch.nn.Module) -> int:
    """How many parameters there are; TutorialError unless a process holds only a part of each."""
    found = dict(model.named_parameters())
    complete = [name for name, parameter in found.items() if not isinstance(parameter, DTensor)]
    if complete:
        raise TutorialError(
            f"{len(complete)} of {len(found)} parameters are not sharded, for instance "
            f"{complete[0]!r}: call helpers.sharding.shard(model) after attach_lora"
        )
    return len(found)


def bytes_held(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of all parameters and of the 4-bit weights among them, in this process and ("_whole")
    in the model; and of the quantization constants, all of which every process holds.
    """
    layers, held = loading.four_bit_layers(model).values(), {"constants": 0}
    for name, group in (("parameters", model.parameters()), ("packed", (m.weight for m in layers))):
        pairs = [(p, p.to_local() if isinstance(p, DTensor) else p) for p in group]
        held[name] = sum(part.nbytes for _, part in pairs)
        held[name + "_whole"] = sum(p.numel() * p.element_size() for p, _ in pairs)
    for s in (module.quant_state for module in layers):
        tensors = (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)
        held["constants"] += sum(tensor.nbytes for tensor in tensors)
    return held


def base_fingerprint(model: torch.nn.Module) -> str:
    """`loading.base_fingerprint`, gathered a layer at a time. Every process has to call it."""
    digest = hashlib.sha256()
    for module in loading.four_bit_layers(model).values():
        packed = module.weight.detach()
        packed = packed.full_tensor() if isinstance(packed, DTensor) else packed
        for tensor in (packed, module.quant_state.absmax):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """What a checkpoint holds: this process's part of the adapter and of its optimizer state."""
    adapter = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    moments = state_dict.get_optimizer_state_dict(model, optimizer, options=TRAINED)
    return {"adapter": adapter, "optimizer": moments}


def save_sharded(model, optimizer, folder: Path, identity: str) -> None:
    """Each process writes its part, then the first one the marker that makes the folder count.

    Older checkpoints beside it are deleted. TutorialError if the disk refuses.
    """
    try:
        save(train_state(model, optimizer), checkpoint_id=folder)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise TutorialError(f"{folder} cannot be written ({reason}): make room there") from error
    if PartialState().is_main_process:
        checkpoints.mark_complete(folder, identity)
        for older in set(folder.parent.glob("checkpoint-*")) - {folder}:
            checkpoints.remove_all(older)
    PartialState().wait_for_everyone()


def load_sharded(model, optimizer, folder: Path) -> None:
    """Load a checkpoint, whatever the number of processes that saved it."""
    state = train_state(model, optimizer)
    load(state, checkpoint_id=folder)
    state_dict.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED)


def take_step(model, optimizer, rows: list[dict], collate, profile: Profile) -> float:
    """One optimizer step, each process on its share of `rows`; returns the loss of all of them."""
    here, total = PartialState(), 0.0
    mine = rows[here.process_index :: here.num_processes]
    micro = checkpoints.share(profile, here.num_processes).micro_batch
    tokens = sum(label != prompting.IGNORED for row in rows for label in row["labels"][1:])
    for start in range(0, len(mine), micro):
        batch = collate(mine[start : start + micro]).to(here.device)
        with torch.autocast(profile.device, profile.dtype, enabled=profile.device == "cuda"):
            loss = model(**batch, num_items_in_batch=tokens, use_cache=False).loss
        (loss * here.num_processes).backward()  # FSDP averages gradients over the processes
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return sum(gather_object([total]))


def run(profile: Profile, output: Path, seed: int = 0, resume: bool = False) -> dict:
    """Train an adapter on the tickets with the model spread over all processes; write adapter and
    sharding.json, and return what that holds.

    Batches are those of helpers.training; AdamW is torch's, at a constant learning rate.
    TutorialError if the processes cannot share a batch, or for float16, which needs loss scaling.
    """
    here = PartialState(cpu=profile.device == "cpu")
    checkpoints.share(profile, here.num_processes)
    if profile.compute_dtype == "float16":
        raise TutorialError(f"{profile.name!r} computes in float16: choose a bfloat16 profile here")
    environment.check_writable(output)
    tokenizer = loading.load_tokenizer(profile)
    train, _ = prompting.encode(records.read_tickets("train"), tokenizer, profile.max_length)
    batch, lengths = profile.micro_batch * profile.accumulation, map(len, train["input_ids"])
    order = prompting.length_grouped_order(list(lengths), batch, profile.max_steps, seed)
    base = loading.load_base(profile, str(here.device))
    proof = loading.prove_4bit(base)
    model = loading.attach_lora(base, profile, seed).train()
    parameters = model.get_nb_trainable_parameters()[1]
    pack_as_floats(model)
    sharded = prove_sharded(shard(model)) if here.num_processes > 1 else 0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, profile.learning_rate, weight_decay=0.0)
    folder, identity = output / "sharded", checkpoints.run_identity(profile, train, seed)
    newest = checkpoints.newest_checkpoint(folder, identity) if resume else None
    if newest:
        load_sharded(model, optimizer, newest)
    elif here.is_main_process:
        checkpoints.remove_all(folder)
    first, losses = checkpoints.step_of(newest) if newest else 0, []
    for step in range(first, profile.max_steps):
        rows = train.select(order[step * batch : (step + 1) * batch]).to_list()
        losses.append(take_step(model, optimizer, rows, prompting.collator(tokenizer), profile))
        if (step + 1) % profile.save_steps == 0 or step + 1 == profile.max_steps:
            save_sharded(model, optimizer, folder / f"checkpoint-{step + 1}", identity)
    found = {"processes": here.num_processes, "sharded_parameters": sharded, "first_step": first}
    found |= {"parameters_total": parameters, "data": "data/tickets", **bytes_held(model)}
    found |= {"base_sha256": base_fingerprint(model), "steps": profile.max_steps, "losses": losses}
    result = {"final_loss": losses[-1] if losses else None}
    record = training.collect(profile, seed, model, proof, result, **found)
    adapter = state_dict.get_model_state_dict(model, options=GATHERED)
    if here.is_main_process:
        parts = {"fingerprint": record["base_sha256"], "state_dict": adapter}
        loading.save_adapter(model, output / "adapter", profile, record, tokenizer, **parts)
        environment.write_text(output / "sharding.json", json.dumps(record, indent=2) + "\n")
    here.wait_for_everyone()
    return record


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status as `environment.exit_status`."""
    parser = argparse.ArgumentParser(prog="python -m helpers.sharding", description=__doc__)
    training.add_run_options(parser)
    args = parser.parse_args(arguments)

    def work() -> None:
        profile = training.chosen_profile(args)
        output = Path(args.output) if args.output else environment.runs_folder() / "sharded"
        found = run(profile, output, args.seed, args.resume)
        part = f"{found['parameters']:,} of {found['parameters_whole']:,} bytes in each process"
        PartialState().print(f"{found['sharded_parameters']} parameters sharded: {part}")

    return environment.exit_status(work, "interrupted: run again with --resume to go on")


if __name__ == "__main__":
    sys.exit(main())
