"""Judges of the exercises of notebook 06."""

import torch
from transformers import TopPLogitsWarper

from helpers.exercises import call, expect, judge


def exercise_1(answer: object) -> None:
    """The two shares of exact tickets, in a dict with the keys 4 and 1."""
    four, one = float(answer[4]), float(answer[1])
    expect(max(four, one) <= 1, "a share is at most 1")
    expect(four != one, "both ranks score the same: is each cut from the learnt update, S once?")
    expect(four > one, "the smaller rank scores better: have the two changed places?")
    expect(
        0.8 < four <= 1,
        "at rank 4 nearly all are right: is S in A or B, once, and the scale in neither?",
    )
    expect(one < 0.5, "at rank 1 too much is left: are all rows of A but the first zero?")


def exercise_2(answer: object) -> None:
    """The error itself, as `except ValueError as error` caught it."""
    expect(isinstance(answer, ValueError), "that is no ValueError: give the one that was caught")
    hint = "not the error of an unknown name in a mixed batch: ask generate_mixed"
    expect("non-existing adapter" in str(answer), hint)


def exercise_3(answer: object) -> None:
    """A function that returns one row of probabilities."""
    logits = 2 * torch.randn(12)
    for T, p in ((2.0, 0.6), (0.5, 0.8)):
        truth = TopPLogitsWarper(p)(None, logits[None] / T).softmax(-1)[0]
        fewer = truth * (truth > truth[truth > 0].min())
        mistakes = {
            fewer / fewer.sum(): "one token more: without it the others do not reach `p`",
            (logits / T).softmax(-1): "no token was left out: `p` has no effect",
            (logits / T).softmax(-1) * (truth > 0): "what is left does not add up to one",
            TopPLogitsWarper(p)(None, logits[None] * T).softmax(-1)[0]: "first divide by `T`",
            truth.sort(descending=True)[0]: "put each share back in its token's place",
        }
        judge(call(answer, logits, T, p), truth, mistakes)
