"""Judges of the exercises of notebook 01."""

import math

import torch

from helpers.exercises import call, expect, judge


def exercise_1(answer: object) -> None:
    """The least such rank, a whole number."""
    rank = math.ceil(4544 * 18176 / (4544 + 18176))
    mistakes = {
        rank - 1: "at that rank the adapter still holds a few numbers less: round the other way",
        4544: "that counts B alone, or is the highest rank there is: A and B both count",
    }
    judge(answer, rank, mistakes, rel=0)


def exercise_2(answer: object) -> None:
    """The value of `scaling`, one number."""
    mistakes = {
        16 / 4: "that is LoRA's own scale: rsLoRA divides by something smaller",
        math.sqrt(16 / 4): "rsLoRA takes the root of the rank alone, not of the fraction",
        16 / 4**2: "rsLoRA divides by the root of the rank, not by its square",
    } | dict.fromkeys((16 * 4, 16 * math.sqrt(4)), "alpha is divided, not multiplied")
    judge(answer, 16 / math.sqrt(4), mistakes)


def exercise_3(answer: object) -> None:
    """A function that returns two tensors, first A (r1 + r2, in), then B (out, r1 + r2)."""
    A1, A2, B1, B2 = (torch.randn(shape) for shape in ((3, 20), (4, 20), (12, 3), (12, 4)))
    A, B = call(answer, A1, B1, 1.5, A2, B2, 8.0)
    expect(A.shape == (7, 20) and B.shape == (12, 7), "A has r1 + r2 rows, B r1 + r2 columns")
    one, two = B1 @ A1, B2 @ A2
    mistakes = {
        one + two: "both scales are forgotten: the new scale is 1, so they go into the matrices",
        1.5**2 * one + 8**2 * two: "each scale is applied twice, in A and in B",
    }
    judge(B @ A, 1.5 * one + 8 * two, mistakes, what="the product of B and A")


def exercise_4(answer: object) -> None:
    """A function that returns two tensors, first A (r, in), then B (out, r)."""
    M, r = torch.randn(28, 84), 5
    A, B = call(answer, M, r)
    expect(A.shape == (r, 84) and B.shape == (28, r), "A has r rows, B r columns")
    U, S, Vh = (part[..., :r] for part in torch.svd(M))
    mistakes = {
        U @ Vh.T: "the singular values are missing: the directions are right, their sizes are not",
        (U * S**2) @ Vh.T: "the singular values are applied twice, once in each factor",
    }
    judge(B @ A, (U * S) @ Vh.T, mistakes, 1e-3, "the product of B and A")
