"""Judges of the exercises of notebook 02."""

import torch

from helpers.exercises import call, judge


def exercise_1(answer: object) -> None:
    """Three codes: of a positive largest weight, of a negative one, and of zero."""
    mistakes = {
        torch.tensor([1, -1, 0]): "those are values: a code is a value's place in the table",
        torch.tensor([0, 15, 7]): "the two ends have changed places: the table is sorted",
    }
    judge(torch.as_tensor(answer), torch.tensor([15, 0, 7]), mistakes, 0, "the row of codes")


def exercise_2(answer: object) -> None:
    """A function that returns one number."""
    for size in (32, 128):
        mistakes = {
            4 + 32 / size: "that is without double quantization: with it a scale takes 8 bits",
            4 + 8 / size: "almost: the scales of the scales are missing",
        }
        judge(call(answer, size), 4 + 8 / size + 32 / (256 * size), mistakes)


def exercise_3(answer: object) -> None:
    """A tensor of sorted values, one row."""
    truth = torch.cat([torch.linspace(-1, 0, 8)[:-1], torch.linspace(0, 1, 9)])
    mistakes = {
        torch.linspace(-1, 1, 16): "one even grid steps over zero: build the two sides apart",
        -truth.flip(0): "the value that is left over belongs to the positive side, as in NF4",
    }
    judge(answer, truth, mistakes)


def exercise_4(answer: object) -> None:
    """A function that returns flat weights as NVFP4 stores them."""
    w, values, stored = torch.randn(256), torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]), []
    for size, dtype in ((16, torch.float8_e4m3fn), (16, torch.float32), (64, torch.float8_e4m3fn)):
        blocks = w.view(-1, size, 1)
        scale = (blocks.abs().amax(1, keepdim=True) / 6).to(dtype).float()
        nearest = (blocks.abs() / scale - values).abs().argmin(-1, keepdim=True)
        stored.append((values[nearest] * scale * blocks.sign()).flatten())
    mistakes = {stored[1]: "the scale is still a float32: round it to E4M3 and back"}
    mistakes[stored[2]] = "those are blocks of 64: NVFP4 has a scale for 16 weights"
    judge(call(answer, w), stored[0], mistakes, 1e-4, "the row of weights")
