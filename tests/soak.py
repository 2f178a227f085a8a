"""What takes too long for every test run: `python -m tests.soak kills`, `notebooks` or `repeats`; `make soak` runs all three.

Each writes its section of data/soak.json when it is done; tests/README.md quotes it. An interrupted soak goes on where it was, as long
as neither its options nor the code have changed: what is done so far lies in runs/soak.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers import command
from helpers.profiles import ROOT
from tests import kills
from tests.notebooks import NOTEBOOKS
from tests.soak_record import quotes, step_by_step, store

CHECKED = "NBVAL_CHECK_OUTPUT"
# Files whose tests take less than a second each, and the few tests in them that take longer
QUICK = (
    "bad_input", "contract", "data", "falcon_inside", "float16", "gpu_profiles", "helpers", "lora_math", "mutations", "nf4", "readme", "records", "security", "survive",
)  # fmt: skip
LONGER = (
    "hub_data_without_network", "falcon_7b_shapes_load", "batched_generation_equals", "one_batch_of_mixed_lengths", "a_malicious_checkpoint",
    "test_fuzz", "to_the_bytes_of_bitsandbytes", "to_the_bits_of_bitsandbytes", "a_loss_that_is_not_a_number",
)  # fmt: skip


def copy_of_the_repository(folder: Path) -> Path:
    """A copy of what git tracks, in which notebooks can run and write without touching this one."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


# --- kills ----------------------------------------------------------------------------------------------------------------------


def tally(records: list[dict]) -> dict:
    """The figures of the runs that were struck by one signal."""
    return {
        "runs": len(records),
        "by_phase": dict(Counter(record["phase"] for record in records)),
        "found_half_written": sum(record["half_written"] > 0 for record in records),
        "resumed": sum(record["resumed"] is not None for record in records),
        "started_again": sum(record["resumed"] is None for record in records),
        "ended_as_undisturbed": sum(not record["faults"] for record in records),
        "faults": [fault for record in records for fault in record["faults"]],
    }


def soak_kills(args: argparse.Namespace) -> bool:
    """The tiny fine-tune struck by SIGKILL `--kills` times and by SIGINT `--interrupts` times, over all phases, restarted, compared."""
    moments = [(signal.SIGKILL, i) for i in range(args.kills)] + [(signal.SIGINT, i) for i in range(args.interrupts)]
    with tempfile.TemporaryDirectory() as place:
        known = kills.reference(Path(place))

        def strike(moment: tuple) -> dict:
            number, i = moment
            phase = kills.PHASES[i % len(kills.PHASES)]
            return kills.disturbed(Path(place), known, phase, number, f"{args.seed} {number} {i}")

        records = step_by_step("kills", {"kills": args.kills, "interrupts": args.interrupts, "seed": args.seed}, moments, strike)
    found = {"steps": kills.STEPS, "save_steps": kills.SAVE_STEPS, "seed": args.seed}
    found |= {"sigkill": tally(records[: args.kills]), "sigint": tally(records[args.kills :])}
    print(*quotes({"kills": found}), *found["sigkill"]["faults"], *found["sigint"]["faults"], sep="\n")
    store("kills", found)
    return not (found["sigkill"]["faults"] or found["sigint"]["faults"])


# --- notebooks --------------------------------------------------------------------------------------------------------------------


def texts(path: Path) -> list[tuple[bool, str]]:
    """Execute a notebook, storing nothing: of each code cell whether its output is compared by nbval, and the text it put out."""
    import nbformat
    from nbclient import NotebookClient

    from tests.refresh import scrub

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    scrub(notebook)
    return [(CHECKED in cell.source, text_of(cell)) for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell) -> str:
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def differing(runs: list[list]) -> tuple[list[int], list[int]]:
    """The numbers of the cells whose text differs between runs of one notebook: (compared ones, others)."""
    found = [], []
    for number, cells in enumerate(zip(*runs, strict=True), start=1):
        if len({text for _, text in cells}) > 1:
            found[not cells[0][0]].append(number)
    return found


def soak_notebooks(args: argparse.Namespace) -> bool:
    """Each notebook `--rounds` times, in an order that changes from round to round, then two of each at once, in copies of the repository."""
    names = [path.name for path in NOTEBOOKS if not args.only or path.name[:2] in args.only]
    orders = [random.Random(f"{args.seed} {i}").sample(names, len(names)) for i in range(args.rounds)]
    jobs = [[name] for order in orders for name in order] + [[name, name] for name in names]
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as pool:
        copies = [copy_of_the_repository(Path(place) / name) for name in ("one", "two")]

        def execute(job: list[str]) -> list:
            return list(pool.map(texts, [copy / "notebooks" / name for copy, name in zip(copies, job, strict=False)]))

        done = step_by_step("notebooks", {"only": args.only, "rounds": args.rounds, "seed": args.seed}, jobs, execute)
    section = {"rounds": args.rounds, "seed": args.seed, "notebooks": {}}
    for name in names:
        runs = [run for job, outcome in zip(jobs, done, strict=True) if job[0] == name for run in outcome]
        compared, others = differing(runs)
        section["notebooks"][name] = {
            "executions": len(runs),
            "in_parallel": 2,
            "cells_compared": sum(checked for checked, _ in runs[0]),
            "of_them_differing": compared,
            "others": sum(not checked for checked, _ in runs[0]),
            "others_differing": others,
        }
        print(f"{name}: compared cells that differ: {compared or 'none'}; others that differ: {others or 'none'}")
    print(*quotes({"notebooks": section}), sep="\n")
    store("notebooks", section)
    return not any(found["of_them_differing"] for found in section["notebooks"].values())


# --- repeats ----------------------------------------------------------------------------------------------------------------------


def soak_repeats(args: argparse.Namespace) -> bool:
    """The quick tests `--repeats` times, the files in another order and the hashes of strings another each time."""

    def repeat(i: int) -> dict:
        order = random.Random(f"{args.seed} {i}").sample(QUICK, len(QUICK))
        command = [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow and not gpu",
            "-k",
            f"not ({' or '.join(LONGER)})",
            *(f"tests/test_{name}.py" for name in order),
        ]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT / "tests" / "guard"),
            "QLORA_PROFILE": "tiny",
            "PYTHONHASHSEED": str(i),
        }
        began = time.monotonic()
        run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = run.stdout.splitlines()
        return {
            "status": run.returncode,
            "seconds": round(time.monotonic() - began, 1),
            "summary": lines[-1] if lines else run.stderr[-200:],
            "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        }

    done = step_by_step("repeats", {"repeats": args.repeats, "seed": args.seed}, range(args.repeats), repeat)
    section = {
        "repeats": args.repeats,
        "seed": args.seed,
        "passed": sum(run["status"] == 0 for run in done),
        "failures": [failure for run in done for failure in run["failed"] or [run["summary"]] if run["status"]],
        "tests": int(done[0]["summary"].split()[0]),
        "seconds_each": round(sum(run["seconds"] for run in done) / len(done), 1),
    }
    print(*quotes({"repeats": section}), *section["failures"], sep="\n")
    store("repeats", section)
    return section["passed"] == args.repeats


def main(arguments: list[str] | None = None) -> int:
    parts = {"kills": soak_kills, "notebooks": soak_notebooks, "repeats": soak_repeats}
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default all")
    parser.add_argument("--kills", type=command.whole("number of runs", least=0), default=60, help="runs struck by SIGKILL")
    parser.add_argument("--interrupts", type=command.whole("number of runs", least=0), default=20, help="runs struck by SIGINT")
    parser.add_argument(
        "--rounds", type=command.whole("number of rounds"), default=5, help="executions of each notebook one after the other"
    )
    parser.add_argument(
        "--repeats", type=command.whole("number of repetitions"), default=50, help="repetitions of the quick tests"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[path.name[:2] for path in NOTEBOOKS],
        default=[],
        metavar="NUMBER",
        help="notebooks, by number",
    )
    parser.add_argument("--seed", type=command.seed, default=0)
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.parts) - set(parts))
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: choose of {', '.join(parts)}")
    return 0 if all([parts[name](args) for name in args.parts or parts]) else 1


if __name__ == "__main__":
    sys.exit(main())
