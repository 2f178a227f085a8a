"""Judges of the exercises of notebook 02."""

import torch

from helpers.exercises import call, expect, judge


def exercise_1(answer: object) -> None:
    """Three codes: of a positive largest weight, of a negative one, and of zero."""
    codes = torch.as_tensor(answer)
    expect(codes.min() >= 0, "those are values, or signed: a code is a value's place in the table")
    mistakes = {
        torch.tensor([0, 15, 7]): "the two ends have changed places: the table is sorted",
        torch.tensor([15, 15, 7]): "the sign matters: -1 and +1 are two values of the table",
    }
    off = codes.shape == (3,) and codes[:2].tolist() == [15, 0] and codes[2] != 7
    expect(not off, "the ends are right, zero is not: how many values lie below it?")
    judge(codes, torch.tensor([15, 0, 7]), mistakes, 0, "the row of codes")


def exercise_2(answer: object) -> None:
    """A function that returns one number."""
    for size in (32, 128):
        mistakes = {
            4 + 32 / size: "that is without double quantization: with it a scale takes 8 bits",
            4 + 8 / size: "almost: the scales of the scales are missing, or are not in bits",
        }
        judge(call(answer, size), 4 + 8 / size + 32 / (256 * size), mistakes, 1.5e-4)


def exercise_3(answer: object) -> None:
    """A tensor of sorted values, one row."""
    truth = torch.cat([torch.linspace(-1, 0, 8)[:-1], torch.linspace(0, 1, 9)])
    mistakes = {
        torch.linspace(-1, 1, 16): "one even grid steps over zero: build the two sides apart",
        -truth.flip(0): "the value that is left over belongs to the positive side, as in NF4",
    }
    values = torch.as_tensor(answer)
    expect((values.diff() >= 0).all(), "sort the values: a codebook runs from -1 to 1")
    expect((values.diff() > 0).all(), "a value is there twice: both sides share the one zero")
    judge(values, truth, mistakes)


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
