"""Judges of the exercises of notebook 07. The truth is computed from the rows of the study. Imports judging and study."""

import math
from functools import cache
from statistics import NormalDist

from helpers.exercises.judging import as_mapping, as_number, as_tuple, call, exercise, expect, judge_number
from helpers.study import rows
from helpers.study.intervals import mean_interval, t_quantile
from helpers.study.plan import GRID

FULL, QLORA = ("full", "fp32"), ("lora", "nf4+dq")


@cache
def stored() -> list[dict]:
    """The rows of the study."""
    return rows.read_rows()


def values(experiment: str, way: tuple[str, str], column: str, **where: object) -> list[float]:
    """One column of the runs of an experiment, ordered by seed."""
    wanted = {"experiment": experiment, "method": way[0], "format": way[1], **where}
    chosen = [row for row in stored() if all(row[key] == value for key, value in wanted.items())]
    return [row[column] for row in sorted(chosen, key=lambda row: row["seed"])]


@exercise("07.1")
def winner_by_rate(answer: object) -> str:
    """{learning rate: the way, of full fine-tuning and QLoRA, whose mean validation loss is smaller there}."""
    winners = as_mapping(answer, GRID, "the winner at each rate of the grid")
    ways = all(winner in (FULL, QLORA) for winner in winners.values())
    expect(ways, f"a winner must be one of the two ways, {FULL} or {QLORA}")
    truth = {}
    for rate in GRID:
        mean = {way: sum(values("grid", way, "validation_loss", learning_rate=rate)) for way in (FULL, QLORA)}
        truth[rate] = min(mean, key=mean.get)
    expect(len(set(winners.values())) > 1, "one way wins everywhere: is the rate passed on to `pick`?")
    turned = all(winners[rate] != truth[rate] for rate in GRID)
    expect(not turned, "every winner is the loser: the smaller loss wins")
    wrong = sum(winners[rate] != truth[rate] for rate in GRID)
    expect(not wrong, "not every rate is right: compare means of the validation loss over both seeds")
    return "whoever chooses the rate chooses the winner"


@exercise("07.2")
def factor_of_three_seeds(answer: object) -> str:
    """How many times as wide the interval is with three seeds as with five, at equal scatter."""
    by_t, by_root = t_quantile(2) / t_quantile(4), math.sqrt(5 / 3)
    mistakes = [
        (by_root, "that is the standard error alone: Student's t grows as well when there are fewer seeds"),
        (by_t, "that is Student's t alone: the standard error has another root below it"),
        (1 / (by_t * by_root), "that says how much narrower five seeds are: the other way round is asked for"),
        (by_t * 5 / 3, "the standard error goes with the root of the number of seeds"),
        (by_t / by_root, "both effects widen the interval: one of yours is upside down"),
        (t_quantile(3) / t_quantile(5) * by_root, "n values have n - 1 degrees of freedom"),
    ]
    judge_number(answer, by_t * by_root, "the factor", mistakes, rel=0.02, nudge="Two things change: t, and the root of n.")
    return "two more seeds halve the interval, most of it by Student's t"


@exercise("07.3")
def rank_two_on_int4(answer: object) -> str:
    """Perplexity of an Int4 base of seed 0 after adapters of rank 2 were trained on it: between untuned and rank 16."""
    perplexity = as_number(answer, "the perplexity")
    way = ("lora", "int4")
    untuned, large = (values("recovers", way, column)[0] for column in ("perplexity_before", "perplexity"))
    expect(perplexity > 5, "that is a loss, not a perplexity: the exponential is missing")
    expect(abs(perplexity - untuned) > 0.05, "that is the perplexity before training")
    expect(abs(perplexity - large) > 0.05, "that is the stored run of the full rank: was the rank replaced?")
    expect(perplexity < untuned, "training made it worse, which it should not: is this the general text, and the Int4 base?")
    expect(perplexity > large, "better than the larger rank: was it the same base, the same seed, and rank two?")
    return "it recovers something, and less than the larger rank"


@exercise("07.4")
def paired_interval(answer: object) -> str:
    """A function: mean difference within pairs and half its 95% interval."""
    cases = [[values("methods", way, "test_exact") for way in (QLORA, FULL)], [[0.9, 0.7, 0.8], [0.5, 0.4, 0.1]]]
    for a, b in cases:
        mean, half = mean_interval([x - y for x, y in zip(a, b, strict=True)])
        found, width = as_tuple(call(answer, list(a), list(b)), 2, "the mean difference and half the width of its interval")
        found, width = as_number(found, "the mean"), as_number(width, "the half width")
        expect(not math.isclose(found, -mean, rel_tol=1e-6), "the difference has the wrong sign: the first list minus the second")
        expect(
            math.isclose(found, mean, rel_tol=1e-6, abs_tol=1e-12),
            "the mean is wrong: take the difference within each pair first",
        )
        n, t, z = len(a), t_quantile(len(a) - 1), NormalDist().inv_cdf(0.975)
        separate = math.sqrt(mean_interval(a)[1] ** 2 + mean_interval(b)[1] ** 2)
        mistakes = [
            (2 * half, "that is the whole width: half of it is asked for"),
            (half * z / t, "that takes the normal distribution's quantile: with so few pairs it is Student's t"),
            (half * math.sqrt(n), "the standard error is missing its root: divide the deviation by the root of n"),
            (half * math.sqrt((n - 1) / n), "the deviation divides by n: with an estimated mean it is n - 1"),
            (half / t, "that is the standard error: Student's t is missing"),
            (half / t * t_quantile(n), "n pairs have n - 1 degrees of freedom"),
            (separate, "that adds up two separate intervals: the pairing is lost"),
        ]
        judge_number(width, half, "the half width", mistakes, rel=1e-3)
    return "what the seeds share has dropped out; only the difference is left"
