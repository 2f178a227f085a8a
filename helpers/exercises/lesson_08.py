"""Judges of the exercises of notebook 08."""

import math

import torch

from helpers.exercises import call, expect, judge
from helpers.memory import MemoryPlan


def exercise_1(answer: object) -> None:
    """A dict from 2, 3, 4 and 8 processes to (accumulation, micro batch), or to None."""
    expect(answer[3] is None, "a batch of 16 does not come out even for 3 processes")
    for size, truth in {2: (2, 4), 4: (1, 4), 8: (1, 2)}.items():
        expect(answer[size] is not None, f"16 come out even for {size}: what else can be shared?")
        batch = size * math.prod(answer[size])
        expect(batch == 4 * 4, f"with these shares {size} processes have another batch than 4 x 4")
        first = f"{size} processes share accumulation first, and it is written first"
        expect(tuple(answer[size]) == truth, first)


def exercise_2(answer: object) -> None:
    """The names of three parts of the plan, in a tuple."""
    parts = sorted(MemoryPlan.__annotations__)
    on_one, on_eight = ["weights", "rest", "context"], ["workspace", "context", "casts"]
    expect(set(answer) <= set(parts), f"the parts of the plan are {parts}")
    expect(set(answer) != set(on_one), "those weigh most on one card: look at eight")
    expect(set(answer) == set(on_eight), "not all three weigh most on eight: compare their bytes")
    expect(list(answer) == on_eight, "the right three, in another order: the heaviest comes first")


def exercise_3(answer: object) -> None:
    """A function that returns one tensor, of the shape of a gradient."""
    tokens, gradients = [120, 30, 50], list(torch.randn(3, 6))
    truth = sum(n * g for n, g in zip(tokens, gradients, strict=True)) / sum(tokens)
    mistakes = {
        sum(gradients) / 3: "that is the mean of the means: more tokens must count for more",
        truth * sum(tokens): "that is a sum: divide by the count of all tokens",
    }
    judge(call(answer, gradients, tokens), truth, mistakes)
