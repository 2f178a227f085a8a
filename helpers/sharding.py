"""One 4-bit model spread over several processes with torch's FSDP2 (`fully_shard`), and its sharded checkpoints. Imports training.

`accelerate launch --config_file helpers/launch/ddp.yaml --num_processes 2 -m helpers.sharding --profile tiny --steps 12` (or `torchrun
--nproc_per_node 2 -m helpers.sharding ...`) trains an adapter with every process holding a part of every weight. The loop is written out
because accelerate and Trainer shard nothing on a CPU and do not say so, while here all parameters are proven to be DTensors.
"""

import argparse
import hashlib
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from helpers import command, files, loading, processes, prompting, records, training
from helpers.checkpoints import MARKER, is_sound, run_identity, seal, whole_or_gone
from helpers.errors import CheckpointError, NotShardedError, ProfileError
from helpers.profiles import Profile, check_settings

SHARDED = "sharded-checkpoint"
# torch says this whenever one process alone saves or loads, which is meant here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning)


def pack_as_floats(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Let every 4-bit weight call its bytes `dtype` numbers, without changing a bit.

    FSDP in torch 2.11, Colab's, makes parameters that may require gradients, which only floating-point numbers can; torch 2.13 takes bytes.
    bitsandbytes knows this as `bnb_4bit_quant_storage`; it reads bytes, whatever they are called.
    """
    for module in loading.four_bit_layers(model).values():
        packed = module.weight
        packed.data = packed.data.view(-1).view(dtype).view(-1, 1)
        packed.quant_storage = module.quant_storage = dtype
        module.quant_state = packed.quant_state  # FSDP replaces the parameter object; the layer keeps what belongs to it


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Spread every parameter over all processes: one FSDP unit a decoder layer, one for what is left. Raises NotShardedError if any is whole."""
    for module in list(model.modules()):
        if isinstance(module, FalconDecoderLayer):
            fully_shard(module)
    fully_shard(model)
    prove_sharded(model)
    return model


def prove_sharded(model: torch.nn.Module) -> int:
    """How many parameters there are, all of them DTensors; NotShardedError with the first one that is not."""
    named = dict(model.named_parameters())
    whole = [name for name, parameter in named.items() if not isinstance(parameter, DTensor)]
    if whole:
        raise NotShardedError(
            f"{len(whole)} of {len(named)} parameters are whole in every process, for instance {whole[0]!r}: call helpers.sharding.shard, with a process group and after the adapters are attached"
        )
    return len(named)


def bytes_held(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of parameters in this process and of the whole model, of the packed 4-bit weights among them, and of their constants."""
    held = dict.fromkeys(("parameters", "parameters_whole", "packed", "packed_whole", "constants"), 0)
    packed = {id(module.weight) for module in loading.four_bit_layers(model).values()}
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for name in ("parameters", "packed") if id(parameter) in packed else ("parameters",):
            held[name] += local.nbytes
            held[name + "_whole"] += parameter.numel() * parameter.element_size()
    for state in (module.quant_state for module in loading.four_bit_layers(model).values()):
        held["constants"] += sum(
            t.nbytes for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        )
    return held


def whole_fingerprint(model: torch.nn.Module) -> str:
    """`loading.base_fingerprint` of a sharded model: its packed bytes gathered one layer at a time. Every process has to call it."""
    digest = hashlib.sha256()
    for module in loading.four_bit_layers(model).values():
        packed = module.weight.full_tensor() if isinstance(module.weight, DTensor) else module.weight.data
        for tensor in (packed, module.quant_state.absmax):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_whole_adapter(model, folder: Path) -> Path:
    """Gather the adapter and write it as `loading.save_adapter` does, to be loaded on any single card. Every process has to call it."""
    adapter = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters() if p.requires_grad}
    fingerprint = whole_fingerprint(model)
    if processes.world().leads:
        loading.save_adapter(model, folder, fingerprint, adapter)
    processes.wait_for_all()
    return folder


def train_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """What a checkpoint holds: the trained parameters and their optimizer state, sharded as they are; the frozen base is not in it."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"adapter": {name: tensor for name, tensor in weights.items() if name in trained}, "optimizer": moments}


def save_sharded(model, optimizer, step: int, identity: str, folder: Path) -> Path:
    """Each process writes its shards; the first one seals them when all have. Raises OutputError if the disk refuses."""
    part = folder.with_name(folder.name + ".part")
    if processes.world().leads:
        shutil.rmtree(part, ignore_errors=True)
    processes.wait_for_all()
    with whole_or_gone(part):
        try:
            dcp.save(train_state(model, optimizer), checkpoint_id=part, no_dist=not distributed.is_initialized())
        except CheckpointException as error:  # torch's own, of all processes
            raise next(iter(error.failures.values()))[0] from error
    processes.wait_for_all()
    if processes.world().leads:
        seal(part, identity, step=step)
        files.put_in_place(part, folder)
    processes.wait_for_all()
    return folder


def load_sharded(model, optimizer, identity: str, folder: Path) -> int:
    """Load a sharded checkpoint into a model sharded over any number of processes, one included; returns the step it was saved at.

    Raises CheckpointError if there is none, if it is incomplete, or if it belongs to another run.
    """
    if not is_sound(folder):
        raise CheckpointError(f"{str(folder)!r} holds no complete sharded checkpoint: train without --resume")
    saved = json.loads((folder / MARKER).read_text())
    if saved["identity"] != identity:
        raise CheckpointError(
            f"the sharded checkpoint in {str(folder)!r} belongs to a run with another profile, seed or data: choose another --output, or train without --resume"
        )
    state = train_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(model, optimizer, model_state_dict=state["adapter"], optim_state_dict=state["optimizer"], options=options)
    return saved["step"]


def take_step(model, optimizer, rows: list[dict], collate, profile: Profile, here: processes.World) -> float:
    """One optimizer step on `rows`, this process's share in its micro batches; returns the mean loss over all their answer tokens.

    FSDP averages gradients over processes, hence the factor: the mean of the processes' losses has the gradient of the whole batch.
    """
    tokens = sum(label != prompting.IGNORED for row in rows for label in row["labels"][1:])
    mine, micro = rows[here.rank :: here.size], processes.share(profile, here.size).micro_batch
    total = torch.zeros((), device=here.device(profile))
    for start in range(0, len(mine), micro):
        batch = {name: tensor.to(total.device) for name, tensor in collate(mine[start : start + micro]).items()}
        with torch.autocast(profile.device, profile.dtype, enabled=profile.device == "cuda"):
            loss = model(**batch, num_items_in_batch=tokens, use_cache=False).loss
        (loss * here.size).backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    if here.size > 1:
        distributed.all_reduce(total)
    return total.item()


def run(profile: Profile, output: Path, seed: int = 0, resume: bool = False) -> dict:
    """Train an adapter for `profile.max_steps` steps with the model spread over all processes; save shards, adapter and sharding.json.

    The batches are those of helpers.training; AdamW is torch's, at a constant learning rate. Returns losses, bytes and the number of sharded
    parameters. Raises LaunchError if the processes cannot share the batch, ProfileError for float16, which would need loss scaling.
    """
    here = processes.world()
    check_settings(profile)
    processes.share(profile, here.size)
    if profile.compute_dtype == "float16":
        raise ProfileError(
            f"profile {profile.name!r} computes in float16 and helpers.sharding has no loss scaling: choose a profile in bfloat16"
        )
    if here.leads:
        training.output_folder(profile, output)
        files.clean(output / SHARDED)
    if here.size > 1 and not distributed.is_initialized():
        if profile.device == "cuda":
            torch.cuda.set_device(here.local_rank)
        distributed.init_process_group("gloo" if profile.device == "cpu" else "nccl")
    tokenizer = loading.load_tokenizer(profile)
    encoded, _ = prompting.encode(records.read_tickets("train"), tokenizer, profile.max_length)
    batch, collate = profile.micro_batch * profile.accumulation, prompting.Collator(tokenizer.eos_token_id)
    order = prompting.length_grouped_order([len(ids) for ids in encoded["input_ids"]], batch, profile.max_steps, seed)
    model = loading.attach_lora(loading.load_base(profile, here.device(profile)), profile, seed).train()
    pack_as_floats(model)
    sharded = prove_sharded(shard(model)) if here.size > 1 else 0
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), profile.learning_rate, weight_decay=0.0)
    folder, losses = output / SHARDED, []
    identity = run_identity(
        replace(profile, max_steps=0, save_steps=0), encoded, seed
    )  # how long to train does not change a step
    first = load_sharded(model, optimizer, identity, folder) if resume else 0
    for step in range(first, profile.max_steps):
        rows = encoded.select(order[step * batch : (step + 1) * batch]).to_list()
        losses.append(take_step(model, optimizer, rows, collate, profile, here))
        if (step + 1) % profile.save_steps == 0 or step + 1 == profile.max_steps:
            save_sharded(model, optimizer, step + 1, identity, folder)
    record = {"processes": here.size, "sharded_parameters": sharded, "first_step": first, "losses": losses, **bytes_held(model)}
    record["base_sha256"] = whole_fingerprint(model)
    save_whole_adapter(model, output / "adapter")
    if here.leads:
        with files.writing(output / "sharding.json"):
            files.write_text(output / "sharding.json", json.dumps(record, indent=2) + "\n")
    return record


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.sharding",
        description="Train an adapter on the tickets, one 4-bit model spread over all processes.",
    )
    command.add_run_options(parser)
    args = parser.parse_args(arguments)

    def work() -> None:
        with processes.loss_of_a_process_is_told():
            profile = command.chosen_profile(args)
            record = run(profile, training.run_folder(profile, args.output), args.seed, args.resume)
        processes.world().say(
            f"{record['sharded_parameters']} parameters sharded; this process holds {record['parameters']:,} of {record['parameters_whole']:,} bytes; losses {', '.join(f'{loss:.4f}' for loss in record['losses'][-3:])}"
        )
        if distributed.is_initialized():
            distributed.destroy_process_group()

    return command.status(work, "interrupted: run again with --resume to go on from the last complete sharded checkpoint")


if __name__ == "__main__":
    sys.exit(main())
