"""The record of a run: results.json and the tables that print it. Imports loading, files, profiles."""

import json
import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from helpers import files, loading
from helpers.profiles import ROOT, Profile

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def peak_rss() -> int:
    """The most memory this process has held, in bytes.

    Linux: VmHWM of proc(5), since getrusage's ru_maxrss begins at what the parent held when it started this process. Elsewhere ru_maxrss
    (macOS counts it in bytes, others in KiB).
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def collect(
    profile: Profile, seed: int, model, proof: loading.FourBitProof, scores: dict, training: dict, seconds: float, adapter: Path
) -> dict:
    """The record of a run, keys as in results.json. `scores` holds before, after, after_reworded, perplexity_before."""
    return {
        "profile": profile.name,
        "model": profile.model,
        "revision": profile.revision,
        "seed": seed,
        "versions": versions(),
        "parameters_total": model.get_nb_trainable_parameters()[1],
        "parameters_trainable": loading.trainable_parameters(model),
        **asdict(proof),
        **scores,
        **{key: value for key, value in training.items() if key != "losses"},
        "total_seconds": round(seconds, 2),
        "peak_rss_bytes": peak_rss(),
        "adapter_dir": os.path.relpath(adapter, ROOT) if adapter.is_relative_to(ROOT) else adapter.name,
    }


def write(record: dict, output: Path) -> Path:
    """results.json, written whole or not at all. OutputError if the disk refuses."""
    path = output / loading.RECORDS[0]
    with files.writing(path):
        files.write_text(path, json.dumps(record, indent=2) + "\n")
    return path


def table(record: dict) -> str:
    """Before and after as text, one line a score."""
    after, before, reworded = record["after"], record["before"], record["after_reworded"]
    names = [name for name in ("valid_json", "exact_match") if after[name] is not None]
    lines = [f"{'score':<14}{'before':>8}{'after':>8}" + (f"{'reworded':>10}" if reworded else "")]
    for name, get in [(n, lambda s, n=n: s[n]) for n in names] + [(f, lambda s, f=f: s["fields"][f]) for f in after["fields"]]:
        lines.append(f"{name:<14}{get(before):>8.3f}{get(after):>8.3f}" + (f"{get(reworded):>10.3f}" if reworded else ""))
    return "\n".join(lines)


def examples(
    prompts: Sequence[str], before: Sequence[str], after: Sequence[str], references: Sequence[str], count: int = 3
) -> str:
    """The first `count` messages with the answer before, the answer after and the reference."""
    blocks = []
    for prompt, old, new, wanted in list(zip(prompts, before, after, references, strict=True))[:count]:
        blocks.append(f"message   {prompt}\n  before  {old!r}\n  after   {new!r}\n  wanted  {wanted!r}")
    return "\n".join(blocks)
