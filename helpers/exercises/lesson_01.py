"""Judges of the exercises of notebook 01. Imports judging, memory and profiles."""

import math

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from helpers import memory
from helpers.exercises.judging import as_tuple, as_whole_number, call, exercise, expect, judge_number, judge_tensor
from helpers.profiles import FALCON_7B


@exercise("01.1")
def break_even_rank(answer: object) -> str:
    """The least rank r with r (in + out) >= in * out."""
    outputs, inputs = memory.linear_shapes(memory.known_config(FALCON_7B))["dense_h_to_4h"]
    rank = as_whole_number(answer, "the rank")
    truth = math.ceil(outputs * inputs / (outputs + inputs))
    mistakes = [
        (truth - 1, "close, but at that rank the adapter still holds a few numbers less than the layer: round the other way"),
        (outputs, "that counts A alone: an adapter has two matrices"),
        (inputs, "that counts B alone, or is the highest rank there is: an adapter has two matrices, and both count"),
    ]
    judge_number(rank, truth, "the rank", mistakes, rel=0, nudge="Set the numbers in A and in B together equal to those in W.")
    return "far above any rank in use; an adapter of a usual rank is small beside its layer"


@exercise("01.2")
def rslora_scale(answer: object) -> str:
    """The scaling of peft's rsLoRA layer with r = 4 and alpha = 16."""
    r, alpha = 4, 16
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=True, target_modules=["0"])
    truth = inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 8)))[0].scaling["default"]
    mistakes = [
        (alpha / r, "that is LoRA's own scale, which the layer has already: rsLoRA divides by something smaller"),
        (math.sqrt(alpha / r), "the root is over the whole fraction: rsLoRA takes the root of the rank alone"),
        (alpha * math.sqrt(r), "alpha is multiplied by the root of the rank: divide"),
        (math.sqrt(alpha) / r, "the root is over alpha: it belongs to the rank"),
    ]
    judge_number(answer, truth, "the scale", mistakes, rel=1e-6)
    return "one number is all in which rsLoRA differs from LoRA"


@exercise("01.3")
def stack(answer: object) -> str:
    """A function that makes one adapter of scale 1 out of two scaled ones."""
    generator = torch.Generator().manual_seed(0)
    (A1, B1), (A2, B2) = ((torch.randn(r, 20, generator=generator), torch.randn(12, r, generator=generator)) for r in (3, 4))
    scale1, scale2 = 8 / 3, 8.0
    A, B = as_tuple(call(answer, A1, B1, scale1, A2, B2, scale2), 2, "A and B")
    expect(isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor), "A and B must both be tensors")
    swapped = A.shape == (12, 7) and B.shape == (7, 20)
    expect(not swapped, "A and B have changed places: return A first")
    expect(A.shape == (7, 20), f"A has shape {tuple(A.shape)}: the rows of both belong into it, one under the other")
    expect(B.shape == (12, 7), f"B has shape {tuple(B.shape)}: the columns of both belong into it, side by side")
    one, two = B1 @ A1, B2 @ A2
    mistakes = [
        (one + two, "both scales are forgotten: the stacked adapter has scale 1, so they must go into its matrices"),
        (scale1**2 * one + scale2**2 * two, "each scale is applied twice, in A and in B"),
        (scale2 * one + scale1 * two, "each update has the other's scale"),
        (scale1 * one + two, "the second scale is forgotten"),
        (one + scale2 * two, "the first scale is forgotten"),
        ((scale1 * one + scale2 * two) / 2, "that is the mean of the two updates: the sum is asked for"),
    ]
    judge_tensor(B @ A, scale1 * one + scale2 * two, "the product of B and A", mistakes)
    return "side by side, adapters add up exactly, whatever their alphas; notebook 06 meets this again as `cat`"


@exercise("01.4")
def best_factors(answer: object) -> str:
    """A function that splits a matrix into the B and A of its best rank-r approximation, held against Eckart and Young's bound."""
    for seed, (rows, columns, r) in enumerate(((28, 84, 5), (40, 16, 3))):
        M = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        A, B = as_tuple(call(answer, M, r), 2, "A and B")
        expect(isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor), "A and B must both be tensors")
        swapped = A.shape == (rows, r) and B.shape == (r, columns)
        expect(not swapped, "A and B have changed places: return A (r, in) first")
        expect(A.shape == (r, columns), f"A has shape {tuple(A.shape)}: it needs r rows and the columns of M")
        expect(B.shape == (rows, r), f"B has shape {tuple(B.shape)}: it needs the rows of M and r columns")
        least = S[r:].square().sum().sqrt()
        mistakes = [
            (U[:, :r] @ Vh[:r], "the singular values are missing: the directions are right, their sizes are not"),
            ((U[:, :r] * S[:r] ** 2) @ Vh[:r], "the singular values are applied twice, once in each factor: split them"),
            ((U[:, -r:] * S[-r:]) @ Vh[-r:], "those are the weakest directions: the first singular values are the largest"),
        ]
        if not torch.linalg.norm(M - B @ A) <= least * 1.001:
            judge_tensor(B @ A, (U[:, :r] * S[:r]) @ Vh[:r], "the product of B and A", mistakes)
    return "its error is the bound itself, and nothing of that rank comes closer"
