"""Which new wordings are answered wrongly, and in which field? 25 runs of a base, made again.

`python data/study/wrong.py [FOLDER ...]`, seven minutes on two cores for each base, that of
study.csv (data/tiny-falcon, the default) or one of bases.py, writes wrong.csv: a line for each
wrong answer of a run."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from data.study import build, plan, study
from data.study.study import Run
from data.tickets.grammar import HELD_OUT_KEY_PHRASES, HELD_OUT_URGENCY
from helpers import environment, prompting, records
from helpers.evaluation import FIELDS, parse_ticket

FILE = study.FILE.with_name("wrong.csv")
# Full fine-tuning at 1e-4, the same on each base; LoRA and QLoRA at two rates
CELLS = [(plan.FULL[0], study.GRID[0])]
CELLS += [(way, rate) for rate in study.GRID[1:3] for way in plan.LORA[:2]]
KEYS = ["method", "format", "learning_rate", "seed"]


def planned() -> list[Run]:
    """Five seeds of CELLS."""
    runs = [Run("", learning_rate=r, seed=0, **plan.complete(way)) for way, r in CELLS]
    return [replace(run, seed=seed) for run in runs for seed in range(5)]


def described() -> list[dict]:
    """Of each message of `test_reworded`: its phrase of urgency ("none" if it has none), and
    whether the request in it is misspelled."""

    def most_of(message: str, phrases: Sequence[str]) -> str:
        def found(phrase: str) -> float:
            blocks = SequenceMatcher(None, message, phrase, autojunk=False).get_matching_blocks()
            return sum(block.size**2 for block in blocks) / max(len(phrase), 1) ** 2

        return max(phrases, key=found)

    table = []
    for row in records.read_tickets("test_reworded"):
        ticket, message = json.loads(row["answer"]), row["prompt"]
        asked = [phrase for kind in HELD_OUT_KEY_PHRASES[ticket["intent"]] for phrase in kind]
        request = most_of(message, [phrase.format(p=ticket["product"]) for phrase in asked])
        urgency = most_of(message, HELD_OUT_URGENCY[ticket["urgency"]]) or "none"
        table.append({"urgency": urgency, "misspelled": request not in message})
    return table


def wrong_answers(model) -> list[dict]:
    """The number and the wrong fields ("all" if it is no ticket) of each message of `test_reworded`
    that a model answers wrongly."""
    right, _ = study.answer_losses(model, study.encoded("test_reworded"))
    numbers = [i for i, answer in enumerate(right) if not answer]
    rows = records.read_tickets("test_reworded").select(numbers)
    answers = prompting.generate(model, study.tokenizer(), rows["prompt"], 48, 60, progress=False)
    found = []
    for number, wanted, answer in zip(numbers, rows["answer"], answers, strict=True):
        wanted, ticket = json.loads(wanted), parse_ticket(answer)
        fields = [name for name in FIELDS if (ticket or {}).get(name) != wanted[name]]
        found.append({"message": number, "fields": " ".join(fields) if ticket else "all"})
    return found


def measured_on(folder: str, run: Run) -> list[dict]:
    """The lines of a run of the model in `folder`."""
    study.TINY = replace(study.TINY, model=folder)
    lines = []

    def watch(model, step: int) -> dict:
        if step == run.steps:
            lines.extend(wrong_answers(model))
        return {}

    study.execute(run, watch=watch)
    return [{key: asdict(run)[key] for key in KEYS} | line for line in lines]


def work(folder: str) -> None:
    """Make all runs of the model in `folder`; its lines of FILE, in the order of `planned`."""
    base, runs = Path(folder).resolve(), planned()
    measure = partial(measured_on, str(base))
    found = pd.DataFrame([line for part in build.measure_all(runs, None, measure) for line in part])
    table = pd.DataFrame([asdict(run) for run in runs])[KEYS].merge(found, on=KEYS)
    table.insert(0, "base", base.name)
    stored = pd.read_csv(FILE) if FILE.exists() else table[:0]
    table = pd.concat([stored[stored["base"] != base.name], table])
    environment.write_text(FILE, table.to_csv(index=False))


if __name__ == "__main__":
    sys.exit(environment.exit_status(lambda: [*map(work, sys.argv[1:] or [study.TINY.model_path])]))
