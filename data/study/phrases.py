"""Which new wordings are answered wrongly? 25 runs of each base, counted by phrase of urgency.

`python data/study/phrases.py [FOLDER ...]`, seven minutes on two cores for each base, that of
study.csv (data/tiny-falcon, the default) or one of bases.py, writes phrases.csv: a line a run, with
its wrong answers to the messages of each phrase ("none": those without one)."""

import json
import sys
from dataclasses import asdict, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from data.study import build, plan, study
from data.study.study import Run
from data.tickets.grammar import HELD_OUT_URGENCY
from helpers import environment, records

FILE = study.FILE.with_name("phrases.csv")
# Full fine-tuning at the rate of notebook 07's rule, the same on each base; LoRA and QLoRA at two
CELLS = [(plan.FULL[0], study.GRID[0])]
CELLS += [(way, rate) for rate in study.GRID[1:3] for way in plan.LORA[:2]]


def planned() -> list[Run]:
    """Five seeds of CELLS."""
    runs = [Run("", learning_rate=r, seed=0, **plan.complete(way)) for way, r in CELLS]
    return [replace(run, seed=seed) for run in runs for seed in range(5)]


def of_messages() -> list[str]:
    """The phrase of urgency in each message of `test_reworded`, typing errors allowed: of those
    that fit its label the one with the longest part in the message."""

    def common(message: str, phrase: str) -> int:
        return SequenceMatcher(None, message, phrase, autojunk=False).find_longest_match().size

    found = []
    for row in records.read_tickets("test_reworded"):
        known = HELD_OUT_URGENCY[json.loads(row["answer"])["urgency"]]
        found.append(max(known, key=lambda phrase: common(row["prompt"], phrase)) or "none")
    return found


def measured_on(folder: str, run: Run) -> dict:
    """The line of a run of the model in `folder`."""
    study.TINY = replace(study.TINY, model=folder)

    def watch(model, step: int) -> dict:
        if step < run.steps:
            return {}
        right, _ = study.answer_losses(model, study.encoded("test_reworded"))
        wrong = pd.Series([not answer for answer in right]).groupby(of_messages()).sum()
        return {phrase: int(count) for phrase, count in wrong.items()}

    row = study.execute(run, watch=watch)
    names = ["method", "format", "learning_rate", "seed", *sorted(set(of_messages()))]
    return {name: row[name] for name in names}


def work(folder: str) -> None:
    """Make all runs of the model in `folder`; its lines of FILE, in the order of `planned`."""
    base, runs = Path(folder).resolve(), planned()
    measure = partial(measured_on, str(base))
    table = pd.DataFrame(build.measure_all(runs, None, measure))
    keys = ["method", "format", "learning_rate", "seed"]
    table = pd.DataFrame([asdict(run) for run in runs])[keys].merge(table, on=keys)
    table.insert(0, "base", base.name)
    stored = pd.read_csv(FILE) if FILE.exists() else table[:0]
    table = pd.concat([stored[stored["base"] != base.name], table])
    environment.write_text(FILE, table.to_csv(index=False))


if __name__ == "__main__":
    sys.exit(environment.exit_status(lambda: [*map(work, sys.argv[1:] or [study.TINY.model_path])]))
