"""Falcon-7b at full size without a GPU and without a download: `make rehearse-7b`.

A checkpoint of its shapes with random weights is written. Then the code that readers run loads it
in 4-bit, trains, is killed, goes on, and answers, each phase in a process of its own whose memory
is watched. The figures go to rehearsal_7b.json.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
from datasets import Dataset
from fast_nf4 import fast_cpu_quantization
from transformers import FalconConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers import (
    adapters,
    checkpoints,
    environment,
    loading,
    memory,
    prompting,
    records,
    training,
)
from helpers.errors import ModelError, TutorialError
from helpers.profiles import FALCON_7B, PROFILES, Profile
from tests import random_falcon

INTERVAL = 0.02  # seconds between two looks at a process
CPU_7B = replace(  # as small a run as shows every phase
    PROFILES["colab-t4"],
    name="cpu-7b",
    gpu_bytes=0,
    compute_dtype="bfloat16",
    max_length=64,
    micro_batch=1,
    accumulation=1,
    max_steps=4,
    save_steps=2,
    eval_batch=1,
    max_new_tokens=8,
)
LOADING, RUN = 4.6e9, 8e9  # the targets: bytes of memory while loading, and in the whole run


def load(profile: Profile, cache: Path | None = None, fast: bool = False) -> tuple:
    """(base, what was found): load the base, prove that it is 4-bit, and hash its bits."""
    began = time.monotonic()
    with fast_cpu_quantization() if fast else contextlib.nullcontext():
        base = loading.load_base(profile, cache=cache)
    seconds, proof = round(time.monotonic() - began, 1), loading.prove_4bit(base)
    sha256 = loading.base_fingerprint(base)
    return base, {"load_seconds": seconds, **proof._asdict(), "base_sha256": sha256}


def load_as_readers(profile: Profile, work: Path) -> dict:
    """What `load_base` does, at bitsandbytes' pace."""
    return load(profile)[1]


def load_fast_and_keep(profile: Profile, work: Path) -> dict:
    """The same bits sooner, and the 4-bit copy that all that follows loads."""
    return load(profile, work / "cache", fast=True)[1]


def prepared(profile: Profile, work: Path) -> tuple:
    """(proof, model with adapters, tokenizer, the beginnings of 64 tickets, encoded)."""
    tokenizer, rows = (
        loading.load_tokenizer(profile),
        records.read_tickets("train").select(range(64)),
    )
    short = {"prompt": [text[:100] for text in rows["prompt"]]}
    short["answer"] = [text[:60] for text in rows["answer"]]
    encoded, _ = prompting.encode(Dataset.from_dict(short), tokenizer, profile.max_length)
    base = loading.load_base(profile, cache=work / "cache")
    return loading.prove_4bit(base), loading.attach_lora(base, profile), tokenizer, encoded


def train(profile: Profile, work: Path) -> None:
    """Training that SIGKILL ends behind its first checkpoint, as it does where memory runs out."""
    mark = checkpoints.Checkpoints.on_save

    def mark_and_die(*args, **kwargs):
        mark(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.Checkpoints.on_save = mark_and_die
    training.fine_tune(*prepared(profile, work)[1:], profile, work)


def resume(profile: Profile, work: Path) -> dict:
    """Go on from that checkpoint to the end, and save the adapter."""
    proof, model, tokenizer, encoded = prepared(profile, work)
    before = loading.base_fingerprint(model)
    result = training.fine_tune(model, tokenizer, encoded, profile, work, resume=True)
    steps = result["steps"] - profile.save_steps
    data = "beginnings of tickets"
    training.save(model, tokenizer, profile, 0, proof, result, work, data=data)
    return {
        "steps": result["steps"],
        "resumed_steps": steps,
        "losses": [round(loss, 4) for loss in result["losses"]],
        "seconds_a_step": round(result["train_seconds"] / steps, 1),
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "base_unchanged": loading.base_fingerprint(model) == before,
    }


def answer(profile: Profile, work: Path) -> dict:
    """Put the adapter on the base and write a few tokens."""
    base, found = load(profile, work / "cache")
    model, tokenizer = (
        adapters.load_adapter(base, work / "adapter", profile),
        loading.load_tokenizer(profile),
    )
    began = time.monotonic()
    (text,) = prompting.generate(model, tokenizer, ["My kettle leaks."], profile.max_new_tokens, 1)
    return {**found, "answer": text, "generate_seconds": round(time.monotonic() - began, 1)}


LOADS, RUNS = (load_as_readers, load_fast_and_keep), (train, resume, answer)
PHASES = {phase.__name__: phase for phase in (*LOADS, *RUNS)}


def do(phase: str, profile: Profile, work: Path) -> None:
    """One phase, in a process of its own; what it found goes to PHASE.json in `work`."""
    (work / f"{phase}.json").write_text(json.dumps(PHASES[phase](profile, work)))


def watched(phase: str, profile: Profile, work: Path) -> dict:
    """Run a phase; returns what it found, its seconds, and its peaks of memory in bytes.

    A machine must have the anonymous memory. The rest is mapped weights, which the kernel drops
    when others need the room. ModelError if the phase fails; `train` has to die by SIGKILL.
    """
    print(f"--- {phase}", flush=True)
    began, anonymous, resident = time.monotonic(), 0, 0
    process = multiprocessing.get_context("spawn").Process(target=do, args=(phase, profile, work))
    process.start()
    try:
        while process.is_alive():
            with contextlib.suppress(psutil.Error):
                held = psutil.Process(process.pid).memory_info()
                anonymous = max(anonymous, held.rss - held.shared)
                resident = max(resident, held.rss)
            time.sleep(INTERVAL)
    finally:
        process.kill()
    wanted = -signal.SIGKILL if phase == "train" else 0
    if process.exitcode != wanted:
        raise ModelError(f"phase {phase!r} ended with {process.exitcode}, not {wanted}: see above")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "peak_anonymous_bytes": anonymous,
        "peak_rss_bytes": resident,
        **({} if wanted else json.loads((work / f"{phase}.json").read_text())),
    }


def summary(phases: dict, config: FalconConfig, profile: Profile) -> dict:
    """What the targets are about: equal bits on every path, stored bytes, peaks of memory."""
    slow, fast, kept = (
        phases[name] for name in ("load_as_readers", "load_fast_and_keep", "answer")
    )
    found = {
        "bits_equal_on_every_path": slow["base_sha256"]
        == fast["base_sha256"]
        == kept["base_sha256"],
        "linear4bit_modules": slow["linear4bit_modules"],
        "stored_bytes": slow["footprint_bytes"],
        "stored_bytes_predicted": slow["footprint_expected_bytes"],
        "fast_loading_peak_anonymous_bytes": fast["peak_anonymous_bytes"],
        "run_peak_bytes": max(phases[run.__name__]["peak_rss_bytes"] for run in RUNS),
        "run_planned_bytes": memory.plan(config, profile).total,
    }
    found["within_targets"] = (
        found["bits_equal_on_every_path"]
        and found["linear4bit_modules"] == 4 * config.num_hidden_layers
        and found["stored_bytes"] == found["stored_bytes_predicted"]
        and found["fast_loading_peak_anonymous_bytes"] <= LOADING
        and found["run_peak_bytes"] <= RUN
        and phases["resume"]["base_unchanged"]
    )
    return found


def rehearse(config: FalconConfig, folder: Path) -> dict:
    """All phases, in a folder inside `folder` that is removed afterwards; returns the record.

    TutorialError if the disk is too small, ModelError if a phase fails.
    """
    parameters = sum(memory.count_parameters(config).values())
    environment.check_writable(folder, room=3 * parameters)  # 2 bytes each, then half a byte
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work, began = Path(name), time.monotonic()
        random_falcon.write(work / "checkpoint", config)
        files = {p.name: p.stat().st_size for p in sorted(work.glob("checkpoint/*.safetensors"))}
        phases = {"write": {"seconds": round(time.monotonic() - began, 1)}}
        profile = replace(CPU_7B, model=str(work / "checkpoint"), revision=None)
        phases |= {phase: watched(phase, profile, work) for phase in PHASES}
    return {
        "machine": {"cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
        "versions": environment.versions(),
        "parameters": parameters,
        "files": files,
        "phases": phases,
        "summary": summary(phases, config, CPU_7B),
    }


def table(record: dict) -> str:
    """One line a phase, seconds and peaks in GB; then the summary."""
    lines = [f"{'phase':<18}{'seconds':>9}{'anonymous GB':>14}{'with files GB':>15}"]
    for name, phase in record["phases"].items():
        line = f"{name:<18}{phase['seconds']:>9.1f}"
        for key, width in (("peak_anonymous_bytes", 14), ("peak_rss_bytes", 15)):
            line += f"{phase[key] / 1e9:>{width}.2f}" if key in phase else f"{'-':>{width}}"
        lines.append(line)
    return "\n".join(
        [*lines, *(f"{key:<36}{value!s:>16}" for key, value in record["summary"].items())]
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status as `environment.exit_status`, and 1 if a target was missed."""
    parser = argparse.ArgumentParser(prog="rehearse.py", description=__doc__)
    runs = environment.ROOT / "runs"
    parser.add_argument("--folder", default=runs, help="takes 20 GB")
    parser.add_argument("--model", default=FALCON_7B, help=", ".join(memory.KNOWN_CONFIGS))
    layers = environment.whole_number()
    parser.add_argument("--layers", type=layers, help="fewer than the model has, for a quick look")
    args = parser.parse_args(arguments)

    def work() -> None:
        config, folder = memory.known_config(args.model), Path(args.folder).absolute()
        full = args.model == FALCON_7B and args.layers in (None, config.num_hidden_layers)
        config.num_hidden_layers = min(args.layers or 10**6, config.num_hidden_layers)
        record = rehearse(config, folder)
        file = Path(__file__).with_name("rehearsal_7b.json") if full else folder / "rehearsal.json"
        environment.write_text(file, json.dumps(record, indent=1) + "\n")
        print(table(record))
        if not record["summary"]["within_targets"]:
            raise TutorialError(f"a target was missed: compare the figures above with {__file__}")

    return environment.exit_status(work, "interrupted: what was written is removed")


if __name__ == "__main__":
    sys.exit(main())
