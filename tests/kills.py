"""Runs of the tiny fine-tune that are killed at random moments and restarted: do they all end as an undisturbed run does?

`tests.soak` does it 30 times and more, test_interrupts.py a few times. Every run is a process of its own, forked from one that has only
imported helpers.training, so that the random moments fall into the run and not into the import of torch. Every run starts in a
folder where the adapter and results.json of an earlier run, with another seed, stand: what a user would lose.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers import checkpoints, files
from helpers.profiles import ROOT

STEPS, SAVE_STEPS = 16, 4
PHASES = ("load", "training", "checkpoint writing", "final save")
SAME = (
    "profile",
    "seed",
    "steps",
    "final_loss",
    "versions",
    "parameters_trainable",
)  # of results.json: what a restart must not change
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers.training"])


def train(arguments: list[str], log: str) -> None:
    """What the forked process does: the command line of helpers.training, on one thread, its output in `log`."""
    import torch

    from helpers import training

    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a command in the background ignores it
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(training.main(arguments))


class Run:
    """A fine-tune of a few steps into `folder`, started at once; its output goes to a file beside the folder."""

    def __init__(self, folder: Path, *more: str):
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        options = ["--steps", str(STEPS), "--save-steps", str(SAVE_STEPS), "--no-scoring", "--output", str(folder), *more]
        self.process = CONTEXT.Process(target=train, args=(options, str(self.log)))
        self.process.start()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, seen: Callable[[], bool]) -> float:
        """Wait until `seen` is true or the run has ended; returns the moment."""
        while self.process.is_alive() and not seen():
            time.sleep(0.0005)
        return time.monotonic()

    def end(self) -> int:
        self.process.join(300)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"the run in {self.folder.name} did not end within 5 minutes: {self.said()[-500:]}")
        return self.process.exitcode

    def trains(self) -> bool:
        return "training:" in self.said()  # its bar

    def writes(self, step: int) -> bool:
        return (self.folder / "checkpoints" / f"checkpoint-{step}").exists()

    def has_written(self, step: int) -> bool:
        return (self.folder / "checkpoints" / f"checkpoint-{step}" / checkpoints.MARKER).exists()

    def saves(self) -> bool:
        return any(self.folder.glob("adapter.*.part"))


def adapter(folder: Path) -> dict[str, str]:
    """sha256 of every file of the adapter in a run's folder; empty if there is none."""
    return {path.name: files.sha256(path) for path in sorted((folder / "adapter").glob("*"))}


def record(folder: Path) -> dict | None:
    """What results.json says that a restart must not change; None if there is none. ValueError or KeyError if it is not whole."""
    path = folder / "results.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return {key: found[key] for key in SAME}


@dataclass
class Reference:
    """The earlier run and the undisturbed one: (adapter, record) of each; and how many seconds each phase took."""

    earlier: Path
    pairs: list[tuple[dict, dict]]
    seconds: dict[str, float]


def with_earlier(folder: Path, earlier: Path) -> Path:
    """`folder`, new, with the adapter and results.json of the earlier run."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(earlier, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def reference(work: Path) -> Reference:
    """Make the earlier run and the undisturbed one in `work`, and measure the phases of the latter."""
    earlier, folder = work / "earlier", work / "undisturbed"
    assert Run(earlier, "--seed", "1").end() == 0
    run, began = Run(with_earlier(folder, earlier)), time.monotonic()
    loaded = run.until(run.trains)
    written = run.until(lambda: run.writes(SAVE_STEPS))
    sealed = run.until(lambda: run.has_written(SAVE_STEPS))
    saving = run.until(run.saves)
    assert run.end() == 0, run.said()[-1000:]
    seconds = dict(zip(PHASES, (loaded - began, saving - loaded, sealed - written, time.monotonic() - saving), strict=True))
    return Reference(earlier, [(adapter(path), record(path)) for path in (earlier, folder)], seconds)


def strike(run: Run, phase: str, number: int, seconds: float, generator: random.Random) -> None:
    """Send the signal at a random moment of a phase, that is: up to `seconds` after the phase is seen to begin."""
    step = generator.randrange(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
    begins = {
        "load": lambda: True,
        "training": run.trains,
        "checkpoint writing": lambda: run.writes(step),
        "final save": run.saves,
    }
    run.until(begins[phase])
    time.sleep(generator.random() * seconds)
    with contextlib.suppress(ProcessLookupError):  # it had ended; the caller sees that
        if run.process.is_alive():
            os.kill(run.process.pid, number)


def leftovers(folder: Path) -> list[str]:
    """Temporary files and checkpoints that are not sound in a run's folder."""
    unsound = [path.name for path in checkpoints.by_step(folder / "checkpoints") if not checkpoints.is_sound(path)]
    return unsound + sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".part", ".old"))


def faults_after_the_strike(folder: Path, known: Reference) -> list[str]:
    """What is wrong with what stands under its own name: an adapter of neither run, or a results.json that is not its own."""
    found, told, moved = adapter(folder), record(folder), any(folder.glob("adapter.*.old"))
    if not found:
        return [] if moved and told is None else ["the adapter before was lost"]
    pairs = [pair for pair in known.pairs if pair[0] == found]
    if not pairs:
        return ["an adapter that neither run wrote"]
    return [] if told in (None, pairs[0][1]) else ["a results.json of another adapter"]


def faults_at_the_end(folder: Path, known: Reference) -> list[str]:
    """How a restarted run differs from the undisturbed one, and what it left behind."""
    wanted, told = known.pairs[1]
    faults = [] if adapter(folder) == wanted else ["another adapter"]
    faults += [] if record(folder) == told else [f"another results.json: {record(folder)} and not {told}"]
    return faults + [f"left behind: {name}" for name in leftovers(folder)]


def disturbed(work: Path, known: Reference, phase: str, number: int, seed: str) -> dict:
    """One run, struck by signal `number` in `phase`, and its restart: where it went on, what was half-written, and every fault."""
    generator, folder = random.Random(seed), work / "disturbed"
    for _ in range(20):
        run = Run(with_earlier(folder, known.earlier))
        strike(run, phase, number, known.seconds[phase], generator)
        status = run.end()
        if status == -number or (number == signal.SIGINT and status == 130):
            break  # else it had ended before the signal came
    else:
        raise AssertionError(f"20 runs ended before a signal reached their phase {phase!r}: {run.said()[-500:]}")
    faults, half = faults_after_the_strike(folder, known), leftovers(folder)
    if number == signal.SIGINT and (half or "Traceback" in run.said()):
        faults.append(f"an interrupt that was not tidy: {half or run.said()[-500:]}")
    again = Run(folder, "--resume")
    if again.end():
        faults.append(f"the restart failed: {again.said()[-500:]}")
    resumed = re.search(r"resuming from (checkpoint-\d+)", again.said())
    if resumed and resumed[1] in half:
        faults.append(f"{resumed[1]} was half-written and was taken")
    faults += faults_at_the_end(folder, known)
    return {
        "phase": phase,
        "resumed": resumed[1] if resumed else None,
        "half_written": len(half),
        "faults": faults,
    }
