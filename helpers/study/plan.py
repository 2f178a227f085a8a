"""Which runs the study has. Imports study.run, study.rows."""

from collections.abc import Sequence

from helpers.errors import DataError
from helpers.study.rows import as_run
from helpers.study.run import Run

ALL_EXAMPLES = 2400
SEEDS, FEW_SEEDS, GRID_SEEDS = range(5), range(3), (100, 101)  # the grid has seeds of its own: it must not choose by luck
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 9e-3)
VARIANT_GRID = GRID[1:4]  # around plain QLoRA's best
TEXT_LEARNING_RATE = 1e-3
WAYS = (("full", "fp32"), ("full", "bf16"), ("lora", "bf16"), *(("lora", format) for format in ("nf4+dq", "nf4", "fp4", "int4")))
# peft computes PiSSA from the weights themselves, which a 4-bit layer does not have: it starts from the 16-bit base. Its LoftQ needs a GPU.
VARIANTS = (("rslora", "nf4+dq"), ("dora", "nf4+dq"), ("loraplus", "nf4+dq"), ("pissa", "bf16"))
RANKS = (1, 4, 16, 64)
# Ranks that give every choice of targets the trainable parameters of rank 16 on all linear layers: 122,880.
EQUAL_PARAMETERS = {"query_key_value": 80, "attention": 48, "mlp": 24}
FEW = (50, 100, 200, 500, 2000)
EXPERIMENTS = ("grid", "methods", "recovers", "targets", "rank", "few-data", "bias", "variants")


def make(experiment: str, method: str, format: str, learning_rate: float, seed: int, **changes) -> Run:
    """A run with the study's defaults: rank 16 on all linear layers, all examples."""
    adapters = {"targets": "", "rank": 0} if method == "full" else {"targets": "all", "rank": 16}
    return Run(**{"experiment": experiment, "method": method, "format": format, "examples": ALL_EXAMPLES, "learning_rate": learning_rate, "seed": seed} | adapters | changes)  # fmt: skip


def plan(name: str, rows: Sequence[dict]) -> list[Run]:
    """The runs of an experiment. All but "grid" need the grid's `rows`, which decide the learning rate of each method."""
    if name == "grid":
        ways = [make(name, *way, rate, seed) for way in WAYS for seed in GRID_SEEDS for rate in GRID]
        return ways + [make(name, *way, rate, GRID_SEEDS[0]) for way in VARIANTS for rate in VARIANT_GRID]
    if name == "recovers":
        formats = ("bf16", "nf4+dq", "nf4", "fp4", "int4")
        return [make(name, "lora", f, TEXT_LEARNING_RATE, seed, data="text") for f in formats for seed in SEEDS]

    def tuned(way: tuple[str, str], seed: int, **changes) -> Run:
        return make(name, *way, best_learning_rate(rows, *way), seed, **changes)

    qlora = ("lora", "nf4+dq")
    if name == "methods":
        return [tuned(way, seed) for way in WAYS for seed in SEEDS]
    if name == "targets":
        equal = [(targets, 16) for targets in EQUAL_PARAMETERS] + list(EQUAL_PARAMETERS.items())
        return [tuned(qlora, seed, targets=targets, rank=rank) for targets, rank in equal for seed in SEEDS]
    if name == "rank":
        return [tuned(qlora, seed, rank=rank) for rank in RANKS if rank != 16 for seed in SEEDS]
    if name == "few-data":
        ways = (("full", "fp32"), ("lora", "bf16"), qlora)
        return [tuned(way, seed, examples=n) for n in FEW for way in ways for seed in FEW_SEEDS]
    if name == "bias":
        return [tuned(qlora, seed, data=data) for data in ("skewed-counts", "skewed-labels", "rebalanced") for seed in SEEDS]
    if name == "variants":
        return [tuned(way, seed) for way in VARIANTS for seed in SEEDS]
    raise DataError(f"there is no experiment {name!r}: choose one of {', '.join(EXPERIMENTS)}")


def best_learning_rate(rows: Sequence[dict], method: str, format: str) -> float:
    """The grid's learning rate with the least mean validation loss for this method and format; DataError if the grid is not complete."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        if (row["experiment"], row["method"], row["format"]) == ("grid", method, format):
            losses.setdefault(row["learning_rate"], []).append(row["validation_loss"])
    rates = GRID if (method, format) in WAYS else VARIANT_GRID
    if set(losses) != set(rates):
        raise DataError(
            f"the grid holds the learning rates {sorted(losses)} for {method} on {format} and needs {list(rates)}: run the experiment 'grid' first"
        )
    return min(rates, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def missing(name: str, rows: Sequence[dict]) -> list[Run]:
    done = {as_run(row) for row in rows}
    return [run for run in plan(name, rows) if run not in done]
