"""The heart of the study on other bases: does what notebook 07 says of learning rates hold there?

`python data/study/bases.py FOLDER ...`, 30 minutes on two cores for each model that `make pretrain`
wrote (ARGS="--seed 4 --output base-5"), appends to the CSV that is called as the folder. Columns as
in study.csv; whoever stops the command goes on with the same one."""

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from data.study import build, plan, study
from data.study.study import Run
from helpers import environment
from helpers.errors import DataError

WAYS = (*plan.FULL, *(way for way in plan.LORA if way["format"] in ("bf16", "nf4+dq", "fp4")))


def planned(stored: pd.DataFrame) -> list[Run]:
    """The grid of WAYS; when it is stored (but for LOWER), also five seeds at the rates it says:
    chosen, by two rules, best for new wordings, and two that LoRA and QLoRA share."""

    def runs(name: str, way: dict, rates, seeds) -> list[Run]:
        settings = plan.complete(way)
        return [Run(name, learning_rate=r, seed=s, **settings) for r in rates for s in seeds]

    every = []
    for way in WAYS:
        every += runs("grid", way, plan.grid_rates(stored, way), plan.GRID_SEEDS)
    if not {run for run in every if run.learning_rate != plan.LOWER} <= set(study.runs(stored)):
        return every
    choices = plan.best_learning_rate, plan.lowest_solving_rate, plan.third_of_the_best
    choices += (plan.rate_for_new_wordings,)
    for way in WAYS:
        rates = {choice(stored, way) for choice in choices}
        rates |= set(study.GRID[1:3]) if way["method"] == "lora" else set()
        every += runs("bases", way, sorted(rates), range(5))
    return every


def file(number: int) -> Path:
    """Where the runs of a base are."""
    return study.FILE.with_name(f"base-{number}.csv")


def measured_on(folder: str, run: Run) -> dict:
    """The row of a run of the model in `folder`."""
    study.TINY = replace(study.TINY, model=folder)
    return build.measured(run)


def work(folder: str) -> None:
    """All runs of the model in `folder` that its file lacks."""
    name = Path(folder).resolve().name
    if not re.fullmatch(r"base-\d+", name):
        raise DataError(f"{name!r} is the name of no base: call its folder base-5 or the like")
    path = study.FILE.with_name(f"{name}.csv")
    while True:  # the grid says what comes after it
        stored = build.read(path)
        done = set(study.runs(stored))
        missing = [run for run in planned(stored) if run not in done]
        print(f"{path.name}: {len(done)} runs are there, {len(missing)} to go", flush=True)
        if not missing:
            return
        measure = partial(measured_on, str(Path(folder).resolve()))
        for row in build.measure_all(missing, None, measure):
            build.append(path, row)


if __name__ == "__main__":
    sys.exit(environment.exit_status(lambda: [*map(work, sys.argv[1:])]))
