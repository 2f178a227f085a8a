"""What only a GPU can tell: NF4 bytes of its kernel, memory against the plan, speed.

`pytest -m gpu tests/test_gpu.py` writes data/measured/gpu.json with it; on a CPU the same functions
are tried with the tiny Falcon."""

import contextlib
import dataclasses
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from unittest import mock

import torch
from bitsandbytes.functional import quantize_4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import checkpoints, environment, loading, memory, nf4, prompting, records, training
from helpers.environment import ROOT
from helpers.profiles import FALCON_7B, PROFILES, Profile

MEASURED = ROOT / "data" / "measured" / "gpu.json"
IN_TURNS = "answers of 4 and 16 bits in turns"
WARM_UP = 3  # steps that are not timed: kernels are chosen and memory is first taken


def note(name: str, values) -> None:
    """Put `values` under this card's name into MEASURED, with the versions they hold for."""
    file = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    card = file.setdefault(card, {})
    card["versions"] = environment.versions() | {"cuda": torch.version.cuda}
    card[name] = values
    MEASURED.write_text(json.dumps(file, indent=1) + "\n")
    print(name, values, flush=True)


@contextlib.contextmanager
def room(size: int | None):
    """Let torch take `size` bytes of the card at most (None: all), from an empty start."""
    gc.collect()  # models hold themselves in circles
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (size or total) / total))
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except Exception as error:  # what it holds would keep its memory for as long as it is reported
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        torch.cuda.empty_cache()


def allocated() -> dict:
    """Bytes that torch's allocator holds; none of what paged optimizers take."""
    names = ("memory_allocated", "max_memory_allocated", "max_memory_reserved")
    return {name: getattr(torch.cuda, name)() for name in names}


def differing_bytes(device: str, dtype: torch.dtype, elements: int = 2**21) -> int:
    """In how many packed bytes of random weights bitsandbytes on `device` differs from by hand."""
    weights = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": False}
    packed, _ = quantize_4bit(weights.to(device), **options)
    return int((packed.cpu().flatten() != nf4.quantize_nf4(weights)[0]).sum())


def load(profile: Profile, device: str, four_bit: bool = True):
    """(base model, what loading it took)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, began = allocated()["memory_allocated"], time.monotonic()
    if four_bit:
        model = loading.load_base(profile, device)
        # two lookup tables a layer come to what `loading.stored_bytes` counts
        planned = memory.expected_footprint(model.config, 2) + memory.skeleton(model.config).buffers
        planned += 4 * (16 + 256) * len(loading.four_bit_layers(model))
    else:
        options = {"dtype": profile.dtype, "device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(profile.model_path, **options)
        planned = 2 * sum(memory.count_parameters(model.config).values())
        planned += memory.skeleton(model.config).buffers
    seconds = round(time.monotonic() - began, 1)
    loaded = allocated()["memory_allocated"] - before
    return model.eval(), {"seconds": seconds, "planned": planned, "loaded": loaded} | allocated()


def attach(model, profile: Profile, four_bit: bool = True):
    """Adapters as the profile says; on a 16-bit base without kbit preparation."""
    if four_bit:
        return loading.attach_lora(model, profile)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kinds = list(profile.target_modules)
    return get_peft_model(model, LoraConfig(r=profile.lora_r, target_modules=kinds))


class Timed(checkpoints.Progress):
    """When each step ended; the Trainer has read the loss before, so the GPU is done."""

    ends: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.ends.append(time.monotonic())


def train(
    model, tokenizer, profile: Profile, steps: int, method="qlora", lengths: Sequence[int] = ()
) -> dict:
    """Train `steps` steps: peaks against the plan, and speed.

    Every example has all of the profile's tokens, as the plan assumes, or one of `lengths`."""
    profile = dataclasses.replace(profile, max_steps=steps, save_steps=10**6, warmup_steps=1)
    draw = torch.Generator().manual_seed(0)
    rows = max(64, profile.micro_batch * profile.accumulation)
    sizes = [lengths[i % len(lengths)] if lengths else profile.max_length for i in range(rows)]
    ids = [torch.randint(5, 1000, (size,), generator=draw).tolist() for size in sizes]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Timed.ends = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(checkpoints, "Progress", Timed):
        trained = training.fine_tune(model, tokenizer, data, profile, folder)
    seconds = (Timed.ends[-1] - Timed.ends[WARM_UP - 1]) / (steps - WARM_UP)
    tokens = sum(sizes) / rows * profile.micro_batch * profile.accumulation
    return {
        "method": method,
        "batch": [profile.micro_batch, profile.accumulation, profile.max_length],
        "dtype": profile.compute_dtype,
        "steps": steps,
        "final_loss": trained["final_loss"],
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
    } | allocated()


def plan_of(run: dict, model: str = FALCON_7B) -> memory.MemoryPlan:
    """What the planner says of a run as `train` returns it."""
    names, config = ("micro_batch", "accumulation", "max_length"), memory.known_config(model)
    fields = dict(zip(names, run["batch"], strict=True)) | {"compute_dtype": run["dtype"]}
    fields["target_modules"] = tuple(memory.linear_shapes(config))
    profile = dataclasses.replace(PROFILES["colab-t4"], **fields)
    return memory.plan(config, profile, run["method"])


def ratio(run: dict, model: str = FALCON_7B) -> float:
    """Planned over measured bytes of what a step adds to the stored ones."""
    plan = plan_of(run, model)
    moving = plan.gradients + plan.activations + plan.logits + plan.casts + plan.workspace
    return moving / (run["max_memory_allocated"] - run["memory_allocated"])


@torch.inference_mode()
def answer(model, batch: int, prompt: int = 64, new: int = 48) -> float:
    """Seconds a token of greedy answers to `batch` prompts of so many tokens."""
    model.config.use_cache = True
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (batch, prompt), generator=draw).to(model.device)
    options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": new}
    options |= {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    began = time.monotonic()
    answers = model.generate(ids, **options).cpu()  # waits for the card
    assert answers.shape == (batch, prompt + new)
    return (time.monotonic() - began) / new


def answers_in_turns(profile: Profile, device: str, turns: int = 7) -> dict:
    """A 4-bit and a 16-bit base answer in turns, so that what else slows the machine down slows
    both; the first turn is not counted. Medians of seconds a token; the ratio turn by turn."""
    bases = [load(profile, device, four_bit)[0] for four_bit in (True, False)]
    measured = {}
    for batch in (1, 16, 64):
        both = [[answer(base, batch) for base in bases] for _ in range(turns)][1:]
        four, sixteen = (statistics.median(seconds) for seconds in zip(*both, strict=True))
        ratios = sorted(round(a / b, 3) for a, b in both)
        measured[f"batch {batch}"] = {
            "four_bit": round(four, 5),
            "sixteen_bit": round(sixteen, 5),
            "times_as_long": [ratios[0], round(statistics.median(ratios), 3), ratios[-1]],
        }
        note(IN_TURNS, measured)
    return measured


def long_answers(model, tokenizer, profile: Profile) -> dict:
    """What answering `eval_batch` prompts takes that are as long as the profile allows."""
    ids = tokenizer(records.HELDOUT.read_text("utf-8"))["input_ids"][: profile.max_length - 16]
    prompts = [tokenizer.decode(ids)] * profile.eval_batch
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prompting.generate(model, tokenizer, prompts, 8, len(prompts), progress=False)
    taken = {"prompts": len(prompts), "tokens": len(ids)} | allocated()
    gc.collect()
    torch.cuda.empty_cache()  # what is reserved would count in the next run
    return taken


def profile_runs(name: str, profile: Profile, device: str, long: int, largest: int) -> dict:
    """QLoRA with as much memory as the profile's card has: loaded, answers, training at its full
    batch and length, with lengths that vary, one example of `long` tokens, the batch `largest` that
    is planned to fit, and a quarter more, both with lengths that vary."""
    tokenizer, measured = loading.load_tokenizer(profile), {}
    with room(profile.gpu_bytes and profile.gpu_bytes - memory.CUDA_CONTEXT):
        model, measured["loaded"] = load(profile, device)
        model = attach(model, profile)
        measured["answers"] = long_answers(model, tokenizer, profile)
        one = dataclasses.replace(profile, accumulation=1)
        varied = list(range(32, profile.max_length + 1, 7))
        for run, (changed, steps, lengths) in {
            "full": (profile, 8, ()),
            "varied": (profile, 8, varied),
            "long": (dataclasses.replace(one, micro_batch=1, max_length=long), 5, ()),
            "largest": (dataclasses.replace(one, micro_batch=largest), 6, varied),
            "too large": (dataclasses.replace(one, micro_batch=largest * 5 // 4), 6, varied),
        }.items():
            try:
                measured[run] = train(model, tokenizer, changed, steps, lengths=lengths)
            except torch.OutOfMemoryError:
                measured[run] = "out of memory"
            gc.collect()
            note(name, measured)
    return measured


def lora_runs(name: str, profile: Profile, device: str) -> dict:
    """16-bit LoRA with the whole card: loaded, training at the full batch."""
    tokenizer, measured = loading.load_tokenizer(profile), {}
    with room(None):
        model, measured["loaded"] = load(profile, device, four_bit=False)
        model = attach(model, profile, four_bit=False)
        measured["full"] = train(model, tokenizer, profile, 8, "lora")
        note(name, measured)
    return measured
