"""Make the runs of notebook 07 that study.csv lacks: `python data/study/build.py`, `make study`.

Every finished run is one line, appended at once, so a run that was stopped or killed goes on where
it was. README.md says which runs there are and what the columns mean.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
from tqdm import tqdm

from data.study import skew, study
from data.study.plan import EXPERIMENTS, missing, plan
from data.study.study import Run
from helpers import environment
from helpers.errors import DataError, TutorialError
from helpers.profiles import ALL_LINEAR

SCORES = [f"{s}_{m}" for s in ("validation", "test", "test_reworded") for m in ("loss", "exact")]
MEASURED = [
    *("trainable", "bytes", "steps", "steps_to_90", "least_validation_loss", "least_at"),
    *("train_loss", *SCORES, "perplexity_before", "perplexity"),
    *("urgent_group_before", "urgent_other_before", "urgent_group", "urgent_other", "seconds"),
]
VERSIONS = ["python", *environment.PACKAGES]
COLUMNS = [*(c for c in Run.__annotations__ if c not in MEASURED), *MEASURED, *VERSIONS]
PROBE_EVERY, PROBE_ROWS = 25, 64  # how often, and on how much of validation, a run is looked at
# Bits a weight of linear layers, constants included; everything else has 16.
BITS = {"fp32": 32, "bf16": 16, "nf4": 4.5, "fp4": 4.5, "int4": 4.5}
BITS |= {"nf4+dq": 4 + 8 / 64 + 32 / (64 * 256)}


def measured(run: Run) -> dict:
    """The row of a run: `study.execute`, and what only the file needs."""
    bias = run.data in skew.SKEWED
    rows = skew.training_rows(run) if bias else study.training_rows(run)
    row = {}
    if bias:
        shares = skew.urgent_shares(study.load_format(run.format))
        row["urgent_group_before"], row["urgent_other_before"] = shares

    def watch(model, step: int) -> dict:
        if run.data != "text" and step % PROBE_EVERY == 0:
            probe = study.encoded("validation")[:PROBE_ROWS]
            right, loss = study.answer_losses(model, probe)
            if sum(right) >= 0.9 * len(right):
                row.setdefault("steps_to_90", step)
            if loss < row.get("least_validation_loss", float("inf")):
                row.update(least_validation_loss=loss, least_at=step)
        if step == run.steps:
            row["trainable"] = model.num_parameters(only_trainable=True)
            row["bytes"] = training_bytes(model, run)
            if run.data != "text":
                row["train_loss"] = study.answer_losses(model, rows[:200])[1]
            if bias:
                row["urgent_group"], row["urgent_other"] = skew.urgent_shares(model)
        return row

    return study.execute(run, rows, watch) | environment.versions()


def training_bytes(model, run: Run) -> int:
    """Bytes of weights, gradients and Adam's two moments, the base counted in its own format."""
    trained = model.num_parameters(only_trainable=True)
    if run.method == "full":
        return trained * 4 * BITS[run.format] // 8
    layers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in ALL_LINEAR]
    linear = sum(layer.in_features * layer.out_features for layer in layers)
    named = [(set(name.split(".")), p.numel()) for name, p in model.named_parameters()]
    rest = sum(size for name, size in named if not name & set(ALL_LINEAR))
    return round(linear * BITS[run.format] / 8 + 2 * rest + 16 * trained)


def start_worker() -> None:
    """One thread; an interrupt is the parent's to handle, and a worker ends with its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def measure_all(
    runs: list[Run], workers: int | None, measure: Callable[[Run], dict] = measured
) -> Iterator[dict]:
    """Rows of `runs`, each as soon as it is there; `workers` processes, by default one a core.

    At an interrupt the runs under way are finished and yielded, then KeyboardInterrupt is raised.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers or os.cpu_count(), len(runs)), spawn, start_worker)
    waiting = {pool.submit(measure, run) for run in runs}
    try:
        with tqdm(total=len(runs), unit="run", desc="study") as bar:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    bar.update()
    except KeyboardInterrupt:
        print("\nfinishing the runs under way; interrupt again to give them up", file=sys.stderr)
        for future in [future for future in waiting if not future.cancel()]:
            yield future.result()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read(path: Path) -> pd.DataFrame:
    """The rows of a study file, none if there is no file. A last line that a kill cut off is
    removed from it. DataError for what is no such file.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{str(path)!r} cannot be a file: name a CSV file in a folder that exists")
    complete, newline, cut = path.read_bytes().rpartition(b"\n") if path.exists() else (b"",) * 3
    if cut:
        print(f"{path.name}: a line without its end is removed, and run again", file=sys.stderr)
        path.write_bytes(complete + newline)
    if not complete:
        return pd.DataFrame(columns=COLUMNS)
    try:
        return study.read(path)[COLUMNS]
    except (ValueError, KeyError) as error:  # UnicodeDecodeError and pandas' errors are such
        raise DataError(f"{path.name} is no study file ({error}): name another") from error


def append(path: Path, row: dict) -> None:
    """Add a row; a new file gets its header first."""
    table = pd.DataFrame([row], columns=COLUMNS)
    new = not path.exists() or not path.stat().st_size
    try:
        table.to_csv(path, mode="a", header=new, index=False, float_format="%.6g")
    except OSError as error:
        raise TutorialError(
            f"{path.name} could not be written ({error.strerror}): make room on that disk, then "
            "run the same command, which goes on"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 done, 1 an error, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Make the runs that study.csv lacks.")
    parser.add_argument("--experiment", choices=EXPERIMENTS, help="one, after the grid")
    parser.add_argument("--workers", type=environment.whole_number(1, 1000), help="runs at a time")
    parser.add_argument("--file", default=study.FILE, help="CSV")
    args = parser.parse_args(arguments)
    path = Path(args.file)

    def work() -> None:
        for name in EXPERIMENTS if args.experiment is None else ("grid", args.experiment):
            while True:  # until nothing is missing: the grid may become wider
                stored = read(path)
                runs, count = missing(name, stored), len(plan(name, stored))
                print(f"{name}: {count - len(runs)} runs are there, {len(runs)} to go", flush=True)
                if not runs:
                    break
                for row in measure_all(runs, args.workers):
                    append(path, row)

    return environment.exit_status(work, f"interrupted; the same command goes on in {path.name}")


if __name__ == "__main__":
    sys.exit(main())
