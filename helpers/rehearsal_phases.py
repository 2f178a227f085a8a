"""The phases of the rehearsal, each run in a process of its own by `helpers.rehearsal`. Imports training, quantized_cache, fast_nf4.

What they drive is what readers run: `load_base`, `attach_lora`, the Trainer with its checkpoints, `save_adapter`, `load_adapter`.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from bitsandbytes import functional
from datasets import Dataset
from transformers import FalconForCausalLM, TrainerCallback

from helpers import fast_nf4, files, loading, profiles, prompting, quantized_cache, records, training, weights
from helpers.errors import PickledWeightsError
from helpers.profiles import Profile

EXAMPLES = 64


def rehearsed(checkpoint: Path) -> Profile:
    """The profile cpu-7b, pointed at the rehearsal's checkpoint."""
    return dataclasses.replace(profiles.PROFILES["cpu-7b"], model=str(checkpoint), revision=None)


@contextlib.contextmanager
def timed_quantization(seconds: list[float]):
    """Adds up the seconds that are spent in bitsandbytes' `quantize_4bit`, whichever code it runs inside."""
    original = functional.quantize_4bit

    def timed(*args, **kwargs):
        began = time.monotonic()
        result = original(*args, **kwargs)
        seconds.append(time.monotonic() - began)
        return result

    functional.quantize_4bit = timed
    try:
        yield
    finally:
        functional.quantize_4bit = original


def loaded(load) -> dict:
    """Time a load, prove it, and hold its stored bytes against the planner's."""
    quantizing, began, processor = [], time.monotonic(), time.process_time()
    with timed_quantization(quantizing):
        model = load()
    seconds, processor = time.monotonic() - began, time.process_time() - processor
    return {
        "load_seconds": round(seconds, 1),
        "load_processor_seconds": round(processor, 1),
        "of_it_quantizing_seconds": round(sum(quantizing), 1),
        **dataclasses.asdict(loading.prove_4bit(model)),
        "base_sha256": loading.base_fingerprint(model),
    }


def plain(profile: Profile, work: Path) -> dict:
    """The load as the libraries do it, with nothing but the repair of Falcon: what `load` is compared with."""
    options = {"quantization_config": loading.quantization_config(profile)}
    return loaded(lambda: loading.read_4bit(profile, profile.model_path, **options))


def load(profile: Profile, work: Path) -> dict:
    return loaded(lambda: loading.load_base(profile))


def cache_load(profile: Profile, work: Path) -> dict:
    return loaded(lambda: quantized_cache.load_base(profile, work / "cache"))


def cache_save(profile: Profile, work: Path) -> dict:
    """The same without a copy: quantizes and saves."""
    shutil.rmtree(work / "cache", ignore_errors=True)
    return cache_load(profile, work)


class Kill(TrainerCallback):
    """SIGKILL to this very process in the middle of training: at the first step after the first checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == args.save_steps:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(profile: Profile, work: Path, model: FalconForCausalLM):
    """The Trainer of the series over the beginnings of tickets, the longest that fit the profile's length."""
    tokenizer = loading.load_tokenizer(profile)
    short = [{"prompt": row["prompt"][:100], "answer": row["answer"][:60]} for row in records.read_tickets("train")]
    encoded, _ = prompting.encode(Dataset.from_list(short), tokenizer, profile.max_length)
    longest = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))[-EXAMPLES:]
    encoded = encoded.select(longest)
    return training.build_trainer(loading.attach_lora(model, profile), tokenizer, encoded, profile, work)


def train(profile: Profile, work: Path) -> dict:
    """Training that is killed after its first checkpoint; what it returns is therefore never seen."""
    trainer = trainer_of(profile, work, quantized_cache.load_base(profile, work / "cache"))
    trainer.add_callback(Kill())
    return training.train(trainer)


def resume(profile: Profile, work: Path) -> dict:
    """Go on from the checkpoint, and save the adapter."""
    began = time.monotonic()
    trainer = trainer_of(profile, work, quantized_cache.load_base(profile, work / "cache"))
    before, ready = loading.base_fingerprint(trainer.model), time.monotonic()
    result = training.train(trainer, resume=True)
    loading.save_adapter(trainer.model, work / "adapter")
    return {
        "seconds_until_training": round(ready - began, 1),
        "resumed_steps": result["steps"] - profile.save_steps,
        "steps": result["steps"],
        "losses": [round(loss, 4) for loss in result["losses"]],
        "seconds_a_step": round(result["train_seconds"] / (result["steps"] - profile.save_steps), 1),
        "trainable_parameters": loading.trainable_parameters(trainer.model),
        "base_unchanged": loading.base_fingerprint(trainer.model) == before,
    }


def answer(profile: Profile, work: Path) -> dict:
    """Reload base and adapter, and write a few tokens."""
    model = loading.load_adapter(quantized_cache.load_base(profile, work / "cache"), work / "adapter", profile)
    began = time.monotonic()
    text = prompting.generate(model, loading.load_tokenizer(profile), ["My kettle leaks."], profile.max_new_tokens, 1)
    return {"new_tokens_at_most": profile.max_new_tokens, "generate_seconds": round(time.monotonic() - began, 1), "answer": text}


def refused(profile: Profile, work: Path) -> dict:
    """What `load_base` says to pickled weights, before it reads any."""
    began = time.monotonic()
    try:
        loading.load_base(profile)
    except PickledWeightsError as error:
        return {"seconds": round(time.monotonic() - began, 1), "error": str(error).replace(profile.model, "FOLDER")}
    raise AssertionError("pickled weights were loaded")


def load_pickled(profile: Profile, work: Path) -> dict:
    """What it would cost to quantize pickled files one after the other, mapped into memory: for the record, no part of `load_base`."""
    began, kept = time.monotonic(), []
    with fast_nf4.fast_cpu_quantization():
        for path in weights.pickled_files(Path(profile.model)):
            for name, tensor in weights.load_pickled(path).items():
                linear = any(f".{kind}.weight" in name for kind in profiles.ALL_LINEAR)
                kept.append(
                    functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True) if linear else tensor.clone()
                )
    return {"load_seconds": round(time.monotonic() - began, 1), "tensors": len(kept)}


def convert(profile: Profile, work: Path) -> dict:
    """The way out that the refusal names; the pickled files are deleted afterwards, as a reader short of disk would."""
    folder, began = Path(profile.model), time.monotonic()
    files = weights.convert_pickled(folder)
    for path in weights.pickled_files(folder):
        path.unlink()
    return {"seconds": round(time.monotonic() - began, 1), "files": [path.name for path in files]}


PHASES = {f.__name__: f for f in (refused, load_pickled, convert, plain, load, cache_save, cache_load, train, resume, answer)}


if __name__ == "__main__":
    name, checkpoint, work, result = sys.argv[1:]
    found = PHASES[name](rehearsed(Path(checkpoint)), Path(work))
    files.write_text(Path(result), json.dumps(found))
