"""Judges of the exercises of notebook 07. The truth is computed from the rows of the study."""

import math

import pandas
import torch

from helpers.environment import ROOT
from helpers.exercises import call, expect, judge

STUDY = pandas.read_csv(ROOT / "data" / "study" / "study.csv").set_index("experiment")
STUDENT_T = {2: 4.302653, 4: 2.776445}  # 97.5% quantiles by degrees of freedom


def exercise_1(answer: object) -> None:
    """A dict from each learning rate of the grid to the way that wins there, a pair of texts."""
    ways = [("full", "fp32"), ("lora", "nf4+dq")]
    grid = STUDY.loc["grid"].query("rank in (0, 16) and targets != 'query_key_value'")
    losses = grid.groupby(["learning_rate", "method", "format"]).validation_loss.mean()
    truth = losses.loc[1e-4:].unstack(["method", "format"])[ways].idxmin(axis=1)
    answer = {rate: tuple(way) for rate, way in answer.items()}
    expect(set(answer.values()) <= set(ways), f"each winner is one of the pairs {ways}")
    right = [answer[rate] == truth[rate] for rate in truth.index]
    expect(len(set(answer.values())) > 1, "one way wins everywhere: is the rate passed on?")
    expect(any(right), "every winner is the loser: the smaller loss wins")
    expect(all(right), "not every rate is right: compare mean validation losses over both seeds")


def exercise_2(answer: object) -> None:
    """The factor, one number."""
    by_t, by_root = STUDENT_T[2] / STUDENT_T[4], math.sqrt(5 / 3)
    mistakes = {
        by_root: "that is the standard error alone: Student's t grows as well",
        by_t: "that is Student's t alone: the standard error grows as well",
    }
    judge(answer, by_t * by_root, mistakes, rel=0.02)


def exercise_3(answer: object) -> None:
    """The perplexity after tuning with rank 2, one number."""
    stored = STUDY.loc["recovers"].query("format == 'int4' and seed == 0").iloc[0]
    low_enough = float(answer) < stored.perplexity_before - 0.7
    expect(low_enough, "that is no better than rank 1's: is it Int4, trained, and of rank 2?")
    replaced = float(answer) > stored.perplexity + 0.5
    expect(replaced, "a loss, or another rank or format: was the rank of Int4's run replaced?")


def exercise_4(answer: object) -> None:
    """A function that returns two numbers: the mean difference, half the interval's width."""
    a, b, t = torch.tensor([0.9, 0.7, 0.8]), torch.tensor([0.5, 0.8, 0.1]), STUDENT_T[2]
    mean, width = call(answer, pandas.Series(a.tolist()), pandas.Series(b.tolist()))
    first = {(b - a).mean(): "take the first list minus the second"}
    judge(mean, (a - b).mean(), first, what="the mean difference")
    half = t * (a - b).std() / math.sqrt(3)
    mistakes = {
        half * math.sqrt(2 / 3): "the standard deviation of a sample divides by n - 1",
        half / t: "that is the standard error: Student's t is missing",
        t * ((a.var() + b.var()) / 3).sqrt(): "that adds two intervals: the pairing is lost",
    }
    judge(width, half, mistakes, 1e-3, "the half width")
