"""Which runs the study has, and how each gets its learning rate: what was tuned, what was not."""

import pandas as pd

from data.study.skew import SKEWED
from data.study.study import GRID, STEPS, Run, runs
from helpers.errors import DataError

GRID_SEEDS = (100, 101)  # used nowhere else: the grid must not choose by luck
SEEDS = {"grid": GRID_SEEDS, "few-data": range(3), "recovers-more": range(2)}  # others: 5
SOLVED = 0.99  # share of validation that is exact
LOWER = 3e-5  # a learning rate below, where the first of five solves validation
WIDER = 2.7e-2  # one above, where the fifth is the best of five
TEXT_RATE, TEXT_STEPS = 1e-3, 60  # general text: not tuned; two and a half passes
# "recovers-more": the 16-bit base and NF4 + DQ, as in "recovers" but for this.
OTHER_TEXT = [{"learning_rate": 3e-4}, {"learning_rate": 3e-3}, {"rank": 4}, {"rank": 64}]
OTHER_TEXT += [{"steps": 180}]
BIAS_STEPS = 600  # a bias is learnt later than the tickets
# What differs from adapters of rank 16 on all linear layers, 300 steps, all 2,400 tickets:
FULL = [{"method": "full", "format": format} for format in ("fp32", "bf16")]
LORA = [{"method": "lora", "format": f} for f in ("bf16", "nf4+dq", "nf4", "fp4", "int4")]
QLORA = LORA[1]
# peft computes PiSSA from the weights themselves: it starts from the 16-bit base. LoftQ: GPU only.
VARIANTS = [QLORA | {"method": method} for method in ("rslora", "dora", "loraplus")]
VARIANTS += [{"method": "pissa", "format": "bf16"}]
RANKS = [QLORA | {"rank": rank} for rank in (1, 4, 64)]
# Rank 16, and the rank that makes 122,880 parameters of it, as rank 16 on all linear layers does.
EQUAL_PARAMETERS = {"query_key_value": 80, "attention": 48, "mlp": 24}
TARGETS = [QLORA | {"targets": t, "rank": r} for t, n in EQUAL_PARAMETERS.items() for r in (16, n)]
# On the whole grid; everything else has the rate of plain QLoRA: borrowed.
TUNED = [*FULL, *LORA, *RANKS[1:], *TARGETS[:2], *VARIANTS]
FEW = (50, 100, 200, 500, 2000)
EXPERIMENTS = ["grid", "methods", "recovers", "recovers-more", "targets", "rank"]
EXPERIMENTS += ["few-data", "bias", "variants", "new-rates"]


def complete(settings: dict) -> dict:
    """Settings with everything they leave out."""
    adapters = {"targets": "", "rank": 0} if settings["method"] == "full" else {}
    defaults = {"targets": "all", "rank": 16, "examples": 2400, "data": "tickets"}
    return defaults | adapters | settings


def grid_means(stored: pd.DataFrame, settings: dict, column="validation_loss") -> pd.Series:
    """Means of the grid's runs, by learning rate."""
    wanted = {"experiment": "grid"} | complete(settings)
    chosen = stored[(stored[list(wanted)] == list(wanted.values())).all(axis=1)]
    return chosen.groupby("learning_rate")[column].mean()


def grid_rates(stored: pd.DataFrame, settings: dict) -> tuple[float, ...]:
    """GRID; WIDER too where GRID's last rate is its best, LOWER where its first solves."""
    losses = grid_means(stored, settings)
    if not set(losses.index) >= set(GRID):
        return GRID
    solved = grid_means(stored, settings, "validation_exact")[GRID[0]] >= SOLVED
    best = losses[list(GRID)].idxmin()
    return (LOWER,) * bool(solved) + GRID + (WIDER,) * bool(best == GRID[-1])


def best_learning_rate(stored: pd.DataFrame, settings: dict) -> float:
    """The rate with the least of `grid_means`; DataError if the grid lacks one (but LOWER)."""
    losses = grid_means(stored, settings)
    if not {*losses.index, LOWER} >= set(grid_rates(stored, settings)):
        raise DataError(f"the grid lacks runs of {settings}: run data/study/build.py first")
    return float(losses.idxmin())


def lowest_solving_rate(stored: pd.DataFrame, settings: dict) -> float:
    """The lowest rate at which the grid's seeds solve `validation`: a former rule."""
    solved = grid_means(stored, settings, "validation_exact")
    return float(solved[solved >= SOLVED].index.min())


def third_of_the_best(stored: pd.DataFrame, settings: dict) -> float:
    """The tried rate below `best_learning_rate`, about a third of it: notebook 07's rule."""
    rates = (LOWER, *GRID, WIDER)
    return rates[max(0, rates.index(best_learning_rate(stored, settings)) - 1)]


def rate_for_new_wordings(stored: pd.DataFrame, settings: dict) -> float:
    """The rate at which the grid's seeds answer most of `test_reworded`: chosen on the test."""
    return float(grid_means(stored, settings, "test_reworded_exact").idxmax())


def cells(name: str, stored: pd.DataFrame) -> list[tuple[dict, float]]:
    """The settings of an experiment, each with its learning rate."""

    def tuned(settings: dict, **changes) -> tuple[dict, float]:
        return settings | changes, best_learning_rate(stored, settings)

    if name == "grid":
        return [(settings, rate) for settings in TUNED for rate in grid_rates(stored, settings)]
    if name in ("rank", "targets"):  # at their own rate where they have one, and at the borrowed
        chosen, borrowed = RANKS if name == "rank" else TARGETS, best_learning_rate(stored, QLORA)
        return [tuned(s) for s in chosen if s in TUNED] + [(s, borrowed) for s in chosen]
    if name == "recovers":
        return [(settings | {"data": "text"}, TEXT_RATE) for settings in LORA]
    if name == "recovers-more":
        every = [s | {"data": "text"} | other for other in OTHER_TEXT for s in LORA[:2]]
        return [(settings, settings.pop("learning_rate", TEXT_RATE)) for settings in every]
    if name == "few-data":
        return [tuned(s, examples=n) for n in FEW for s in (FULL[0], LORA[0], QLORA)]
    if name == "bias":
        return [tuned(QLORA, data=data) for data in SKEWED]
    if name == "new-rates":  # and 16-bit LoRA beside QLoRA at two equal rates
        own = [(settings, rate_for_new_wordings(stored, settings)) for settings in TUNED]
        own += [(settings, lowest_solving_rate(stored, settings)) for settings in (*FULL, *LORA)]
        return own + [(settings, rate) for settings in LORA for rate in GRID[1:3]]
    if name in ("methods", "variants"):
        return [tuned(s) for s in ((*FULL, *LORA) if name == "methods" else VARIANTS)]
    raise DataError(f"there is no experiment {name!r}: choose one of {', '.join(EXPERIMENTS)}")


def plan(name: str, stored: pd.DataFrame) -> list[Run]:
    """The runs of an experiment; all but "grid" find their rates in the grid's rows in `stored`."""
    planned = []
    for settings, rate in cells(name, stored):
        seeds = SEEDS.get(name, range(5))
        settings = complete(settings)
        steps = {"tickets": STEPS, "text": TEXT_STEPS}.get(settings["data"], BIAS_STEPS)
        settings = {"steps": steps, "learning_rate": rate} | settings
        planned += [Run(name, seed=seed, **settings) for seed in seeds]
    return list(dict.fromkeys(planned))


def missing(name: str, stored: pd.DataFrame) -> list[Run]:
    """The runs of an experiment that `stored` does not hold."""
    done = set(runs(stored))
    return [run for run in plan(name, stored) if run not in done]
