"""Falcon-7b at full size without a GPU and without a download: `make rehearse-7b`. Imports rehearsal_phases, random_checkpoint, results, files.

A checkpoint with random weights in the exact shapes is written, then the real loading and training code runs on it, each phase in a
process of its own whose memory is watched from outside (Linux only). The figures go to data/rehearsal_7b.json.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import FalconConfig

from helpers import command, files, memory, random_checkpoint, results, shapes, weights
from helpers.errors import ModelError, OutputError, PlanError
from helpers.profiles import FALCON_7B, ROOT
from helpers.rehearsal_phases import PHASES, rehearsed

COMMON = ("load", "cache_save", "cache_load", "train", "resume", "answer")
LAYOUT_PHASES = {"hub": ("plain", *COMMON), "shards": COMMON, "bin": ("refused", "load_pickled", "convert", *COMMON)}
INTERVAL = 0.02  # seconds between two looks at a process
LOADING, RUN, STORED = 4.6e9, 8e9, 0.05  # the targets: bytes of memory, and the planner's error


def resident(pid: int) -> dict[str, int]:
    """Bytes of anonymous and of file-backed memory that a process holds; both 0 once it has ended.

    Anonymous memory is what a machine must have. File-backed memory is the mapped weights: the kernel drops it when others need room.
    """
    fields = {"RssAnon": 0, "RssFile": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in fields:
                fields[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return fields


def watched(name: str, checkpoint: Path, work: Path) -> dict:
    """Run one phase in a fresh process and return its results with seconds and peaks of memory; ModelError if it fails.

    The phase `train` ends by SIGKILL on purpose.
    """
    print(f"--- {name}", flush=True)
    result = work / f"{name}.json"
    began, load = time.monotonic(), os.getloadavg()[0]
    process = subprocess.Popen([sys.executable, "-m", "helpers.rehearsal_phases", name, checkpoint, work, result], cwd=ROOT)
    peaks = {"RssAnon": 0, "RssFile": 0, "both": 0}
    try:
        while process.poll() is None:
            now = resident(process.pid)
            now["both"] = sum(now.values())
            peaks = {key: max(peaks[key], now[key]) for key in peaks}
            time.sleep(INTERVAL)
    finally:
        process.kill()
    wanted = -signal.SIGKILL if name == "train" else 0
    if process.returncode != wanted:
        raise ModelError(
            f"the phase {name!r} of the rehearsal ended with {process.returncode}, not {wanted}: its error stands above"
        )
    return {
        "seconds": round(time.monotonic() - began, 1),
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_rss_bytes": peaks["both"],
        "load_average_before": round(load, 2),
        **(json.loads(result.read_text()) if wanted == 0 else {"killed_after_checkpoint": True}),
    }


def disk_needed(config: FalconConfig, layout: str, checkpoint: Path) -> int:
    """Bytes that the rehearsal still has to write at most at a time: the checkpoint, with the 4-bit copy and three training checkpoints, or
    twice while pickles are converted."""
    profile = rehearsed(checkpoint)
    adapter = memory.adapter_parameters(config, profile.lora_r, profile.target_modules)
    whole = random_checkpoint.checkpoint_bytes(config)
    there = sum(path.stat().st_size for path in checkpoint.glob("*") if path.is_file())
    beside = memory.expected_footprint(config, profile.dtype.itemsize) + 40 * adapter
    return max(0, whole - there) + (max(whole, beside) if layout == "bin" else beside) + 10**8


def rehearse(layout: str, config: FalconConfig, folder: Path, phases: Sequence[str], keep: bool = False) -> dict:
    """The phases of one layout in `folder`; returns the record and removes what was written, unless `keep`.

    A finished checkpoint of the same config and layout is used again. Raises OutputError if the disk is too small, ModelError if a phase
    fails (then checkpoint and 4-bit copy stay, so that the next try is short).
    """
    checkpoint = folder / layout
    weights.check_disk(folder, disk_needed(config, layout, checkpoint), "the rehearsal")
    began = time.monotonic()
    written = random_checkpoint.write_checkpoint(checkpoint, config, layout)
    record = {"files": sorted([p.name, p.stat().st_size] for p in checkpoint.iterdir() if p.suffix in (".safetensors", ".bin"))}
    record["phases"] = {"write": {"seconds": round(time.monotonic() - began, 1)}} if written else {}
    work = folder / f"work-{layout}"
    work.mkdir(exist_ok=True)
    for name in phases:
        record["phases"][name] = watched(name, checkpoint, work)
        if name == "convert":  # what lies there now is another layout
            (checkpoint / random_checkpoint.DONE).unlink()
    if not keep:
        shutil.rmtree(checkpoint)
        shutil.rmtree(work)
    return record


def summary(phases: dict, config: FalconConfig, profile) -> dict:
    """The figures that the targets are about."""
    load, same = phases["load"], {phases[name]["base_sha256"] for name in phases if "base_sha256" in phases[name]}
    anonymous = [phase["peak_anonymous_bytes"] for name, phase in phases.items() if name not in ("write", "load_pickled")]
    whole = [phases[name]["peak_rss_bytes"] for name in ("train", "resume", "answer") if name in phases]
    found = {
        "bits_equal_on_every_path": len(same) == 1,
        "linear4bit_modules": load["linear4bit_modules"],
        "stored_bytes": load["footprint_bytes"],
        "stored_bytes_predicted": load["footprint_expected_bytes"],
        "loading_peak_anonymous_bytes": load["peak_anonymous_bytes"],
        "run_peak_bytes": max(
            anonymous + whole
        ),  # in training with the mapped 4-bit copy, in loading without the mapped 16-bit files
        "run_planned_bytes": memory.plan(config, profile).total,
    }
    for slow in ("plain", "load"):
        for quick in ("load", "cache_load"):
            if slow != quick and slow in phases:
                for unit in ("seconds", "processor_seconds"):
                    times = [max(phases[name].get(f"load_{unit}", 0), 0.1) for name in (slow, quick)]
                    found[f"{slow}_over_{quick}_{unit}"] = round(times[0] / times[1], 1)
    found["within_targets"] = (
        found["bits_equal_on_every_path"]
        and found["linear4bit_modules"] == 4 * config.num_hidden_layers
        and abs(found["stored_bytes"] / found["stored_bytes_predicted"] - 1) <= STORED
        and found["loading_peak_anonymous_bytes"] <= LOADING
        and found["run_peak_bytes"] <= RUN
        and phases["resume"]["base_unchanged"]
    )
    return found


def store(path: Path, layout: str, record: dict, config: FalconConfig) -> None:
    """Add one layout's record to the JSON file, with the machine and the versions; phases that were not run again stay, with a new summary."""
    every = json.loads(path.read_text()) if path.exists() else {}
    every["machine"] = {"cores": os.cpu_count(), "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    every["versions"], every["parameters"] = results.versions(), sum(memory.count_parameters(config).values())
    earlier = every.setdefault("layouts", {}).get(layout, {})
    record["phases"] = earlier.get("phases", {}) | record["phases"]
    if {"load", "cache_load", "resume"} <= set(record["phases"]):
        record["summary"] = summary(record["phases"], config, rehearsed(Path(layout)))
    every["layouts"][layout] = record
    files.write_text(path, json.dumps(every, indent=1) + "\n")


def check_places(folder: Path, record: Path) -> None:
    """OutputError unless `folder` can be made and `record` is a JSON object or can be made: found out before hours of work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {str(folder)!r} cannot be made ({error.strerror}): choose another with --folder"
        ) from error
    try:
        sound = isinstance(json.loads(record.read_text()), dict) if record.exists() else record.absolute().parent.is_dir()
    except (OSError, ValueError):
        sound = False
    if not sound:
        raise OutputError(
            f"{str(record)!r} is no JSON object to add to and cannot be made: choose another file, in a folder that is there, with --json"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`, and 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.rehearsal", description="Load and tune a random Falcon-7b at full size, on a CPU."
    )
    parser.add_argument("--layout", choices=(*LAYOUT_PHASES, "all"), default="hub", help="of the checkpoint's files; default hub")
    parser.add_argument("--folder", type=command.named, default=ROOT / "runs" / "rehearsal", help="where up to 30 GB are written")
    parser.add_argument("--model", default=FALCON_7B, help=f"one of {', '.join(shapes.KNOWN_CONFIGS)}; default {FALCON_7B}")
    parser.add_argument(
        "--layers", type=command.whole("number of layers", most=1000), help="fewer layers than the model has, for a quick look"
    )
    parser.add_argument(
        "--json", type=command.named, help="default data/rehearsal_7b.json, or rehearsal.json in the folder if not at full size"
    )
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, help="only these, in this order; the others keep their stored figures"
    )
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint where it is")
    args = parser.parse_args(arguments)

    def work() -> int:
        config, folder = shapes.known_config(args.model), Path(args.folder).absolute()
        if (args.layers or 0) > config.num_hidden_layers:
            raise PlanError(
                f"{args.model} has {config.num_hidden_layers} layers and {args.layers} were asked for: give fewer with --layers"
            )
        full = args.model == FALCON_7B and args.layers is None
        config.num_hidden_layers = args.layers or config.num_hidden_layers
        file = Path(args.json or (ROOT / "data" / "rehearsal_7b.json" if full else folder / "rehearsal.json"))
        check_places(folder, file)
        good = True
        for layout in LAYOUT_PHASES if args.layout == "all" else (args.layout,):
            record = rehearse(layout, config, folder, args.phases or LAYOUT_PHASES[layout], args.keep)
            with files.writing(file, "make room on that disk"):
                store(file, layout, record, config)
            print(table(layout, record))
            good = good and record.get("summary", {"within_targets": True})["within_targets"]
        return 0 if good else 1

    return command.status(work, f"interrupted; finished checkpoints are in {args.folder}, run the same command to use them again")


def table(layout: str, record: dict) -> str:
    """One line a phase: seconds and peaks; then the summary."""
    lines = [f"{layout + ', phase':<18}{'seconds':>9}{'anonymous GB':>14}{'with files GB':>15}"]
    for name, phase in record["phases"].items():
        peaks = [f"{phase[key] / 1e9:.2f}" if key in phase else "" for key in ("peak_anonymous_bytes", "peak_rss_bytes")]
        lines.append(f"{name:<18}{phase['seconds']:>9.1f}{peaks[0]:>14}{peaks[1]:>15}")
    lines += [
        f"{key:<36}{value:>16,}" if not isinstance(value, bool) else f"{key:<36}{value!s:>16}"
        for key, value in record.get("summary", {}).items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
