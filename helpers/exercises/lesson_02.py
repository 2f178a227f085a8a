"""Judges of the exercises of notebook 02. The truth is what bitsandbytes stores. Imports judging."""

import math

import torch
from bitsandbytes import functional as bnb

from helpers.exercises.judging import as_tuple, as_whole_number, call, exercise, expect, judge_number, judge_tensor


def stored_codes(weights: torch.Tensor) -> torch.Tensor:
    """The codes that bitsandbytes gives `weights`, in their order."""
    packed = bnb.quantize_4bit(weights, quant_type="nf4")[0].flatten()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


@exercise("02.1")
def codes_of_the_ends(answer: object) -> str:
    """Codes of the largest weight if it is positive, if it is negative, and of an exact zero."""
    parts = as_tuple(answer, 3, "the codes of a positive largest weight, of a negative one, and of zero")
    values = all(isinstance(part, float) for part in parts) and max(abs(part) for part in parts) <= 1
    expect(not values, "those are values of the codebook: the codes are the places where they stand in it")
    codes = [as_whole_number(part, "a code") for part in parts]
    expect(min(codes) >= 0, "an NF4 code has no sign: it is an index into a table of sixteen values")
    expect(max(codes) < 16, "a code of four bits cannot be that large: is that the whole byte, with two codes in it?")
    truth = [stored_codes(torch.nn.functional.pad(torch.tensor([largest]), (0, 63)))[:2].tolist() for largest in (2.0, -2.0)]
    (positive, zero), (negative, _) = truth
    expect(codes[0] != codes[1], "a positive and a negative largest weight do not share a code: the sign matters")
    expect(codes[:2] != [negative, positive], "the two ends have changed places: the table is sorted")
    expect(codes[0] == positive, "the code of a positive largest weight is wrong: which value of the table is it?")
    expect(codes[1] == negative, "the code of a negative largest weight is wrong: which value of the table is it?")
    expect(codes[2] == zero, "the code of zero is wrong: how many values of the table are below zero?")
    return "the sign matters, and both ends and zero are stored without any error"


@exercise("02.2")
def bits_a_weight(answer: object) -> str:
    """A function: bits a weight of NF4 with double quantization for a block size, held against bitsandbytes' tensors."""
    for size in (32, 64, 128, 256):
        packed, state = bnb.quantize_4bit(torch.randn(2**18), blocksize=size, quant_type="nf4", compress_statistics=True)
        truth = 8 * sum(t.nbytes for t in (packed, state.absmax, state.state2.absmax)) / 2**18
        mistakes = [
            (4 + 32 / size, "that is without double quantization: the scales take 8 bits each"),
            (4 + 8 / size, "almost: the scales of the scales are missing, one float32 for 256 of them"),
            (8 / size + 32 / (256 * size), "those are the constants alone: the codes of the weights are missing"),
            (truth / 8, "those are bytes: bits are asked for"),
            (4 + 8 / size + 32 / 256, "the scales of the scales serve 256 blocks, not 256 weights"),
            (4 + 1 / size + 4 / (256 * size), "the codes are counted in bits and the constants in bytes"),
        ]
        value = call(answer, size)
        judge_number(value, truth, "the number of bits", mistakes, rel=1e-4, nudge="Count codes, scales, and scales of scales.")
    return "from 64 weights a block on, the constants hardly matter any more"


@exercise("02.3")
def uniform_codebook(answer: object) -> str:
    """Sixteen sorted values for uniform weights: an exact zero, seven quantiles below, eight above."""
    expect(isinstance(answer, torch.Tensor), f"that is a {type(answer).__name__}: give the values as a tensor")
    expect(answer.dim() == 1, f"the values have shape {tuple(answer.shape)}: give one row")
    values = answer.double()
    expect(len(values) == 16, f"four bits index 16 values, and there are {len(values)}")
    expect(values.diff().min() > 0, "the values must be sorted and all different: is zero there twice?")
    expect(
        values[0] == -1 and values[-1] == 1, "the ends must be -1 and 1, so that the largest weight of a block is stored exactly"
    )
    expect((values == 0).any(), "there is no exact zero: one even grid of 16 values steps over it, so build the two sides apart")
    expect((values < 0).sum() == 7, "the one value that is left over belongs to the positive side, as in NF4")
    for name, side in (("below", values[values <= 0]), ("above", values[values >= 0])):
        steps = side.diff()
        expect(steps.max() - steps.min() < 1e-5, f"the values {name} zero are not evenly spaced: uniform quantiles are")
    return "an even grid for flat weights: the right codebook is the one that fits the weights"


@exercise("02.4")
def read_codes(answer: object) -> str:
    """A function that reads the codes, in the order of the weights, out of bitsandbytes' packed bytes."""
    codebook = bnb.get_4bit_type("nf4", device="cpu")
    truth = torch.randint(16, (256,), generator=torch.Generator().manual_seed(0))
    truth[::64] = 15  # the largest of each block, so that every weight is a value of the codebook
    packed = bnb.quantize_4bit(codebook[truth], quant_type="nf4")[0]
    codes = call(answer, packed)
    expect(isinstance(codes, torch.Tensor), f"your function returns a {type(codes).__name__}: return a tensor")
    expect(not codes.is_floating_point(), "those are floating-point numbers: return the codes, not the values of the codebook")
    expect(codes.numel() != len(truth) // 2, "there is one number for each byte: a byte holds two codes")
    expect(codes.numel() == len(truth), f"{codes.numel()} codes come out of {packed.numel()} bytes: two of each are needed")
    expect(codes.dim() == 1, f"the codes have shape {tuple(codes.shape)}: put them in one row, in the order of the weights")
    high, low = truth[::2], truth[1::2]
    mistakes = [
        (
            torch.stack([low, high], 1).flatten(),
            "each pair is the wrong way round: which half of the byte holds the first weight?",
        ),
        (torch.cat([high, low]), "all high halves come first: take turns, byte by byte"),
        (torch.stack([high * 16, low], 1).flatten(), "the high halves are still sixteen times too large: shift them down"),
        (
            torch.stack([high, high * 16 + low], 1).flatten(),
            "the second code of each pair still has the first in front of it: mask it",
        ),
    ]
    judge_tensor(codes, truth, "the row of codes", mistakes, tolerance=0)
    return f"all {len(truth)} codes are those that bitsandbytes stored, which is {math.log2(16):.0f} bits each and nothing else"
