"""Judges of the exercises of notebook 03."""

import torch

from helpers.exercises import call, expect, judge


def exercise_1(answer: object) -> None:
    """The two shares, in a dict with the keys torch.float32 and torch.bfloat16."""
    wide, narrow = float(answer[torch.float32]), float(answer[torch.bfloat16])
    expect(wide >= narrow, "the two have changed places: which dtype has room for a small change?")
    expect(0.9 < wide <= 1, "in float32 nearly every number moves, and a share is at most 1")
    expect(narrow == 0, "bfloat16 moved: was `adapter_dtype` passed, B all ones, the loss a mean?")


def exercise_2(answer: object) -> None:
    """Four differences, of Y, dX, dA and dB, as `compare` returned them."""
    Y, dX, dA, dB = map(float, answer)
    expect(min(Y, dX, dA, dB) > 1e-3, "one of the four agrees: the scale reaches all of them")
    expect(abs(dA - dB) < 1e-3, "dA and dB lose the same share: is the order Y, dX, dA, dB?")
    missing = 1 - 1 / 2  # gradients of A and B are proportional to the scale, alpha / r = 2
    expect(abs(dA - missing) < 1e-3, "that is another scale than none: set it to one")


def exercise_3(answer: object) -> None:
    """A function that returns two tensors, the gradients of A (r, in) and of B (out, r)."""
    x, grad = torch.randn(2, 5, 24), torch.randn(2, 5, 16)
    A, B = torch.randn(3, 24, requires_grad=True), torch.randn(16, 3, requires_grad=True)
    truths = torch.autograd.grad(1.75 * x @ A.T @ B.T, (A, B), grad)
    for name, found, truth in zip("AB", call(answer, x, grad, A, B, 1.75), truths, strict=True):
        mistakes = {
            truth / 1.75: f"the gradient of {name} lacks the scale",
            truth * 1.75: f"the gradient of {name} has the scale twice",
            truth / 10: f"the gradient of {name} is a mean over the tokens: gradients are sums",
        }
        judge(found, truth, mistakes, what=f"the gradient of {name}")
