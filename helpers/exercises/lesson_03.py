"""Judges of the exercises of notebook 03. Imports judging, gpus and memory."""

import torch
from torch.nn import functional as F

from helpers import memory
from helpers.exercises.judging import as_mapping, as_number, as_tuple, call, exercise, expect, judge_number, judge_tensor


@exercise("03.1")
def lost_steps(answer: object) -> str:
    """Share of B's numbers that one small SGD step changes, for an adapter in float32 and one in bfloat16."""
    shares = as_mapping(answer, (torch.float32, torch.bfloat16), "the two shares by dtype, torch.float32 and torch.bfloat16")
    wide, narrow = (as_number(share, f"the share in {dtype}") for dtype, share in shares.items())
    expect(min(wide, narrow) >= 0 and max(wide, narrow) <= 1, "a share lies between 0 and 1: divide by the number of elements")
    expect(wide >= narrow, "the two dtypes have changed places: which of the two has room for a small change?")
    expect(wide > 0, "nothing moved in float32 either: was the step taken, and was a clone of B kept from before it?")
    expect(wide != narrow, "both dtypes give the same: was `adapter_dtype` passed on, and do both B begin at one?")
    expect(wide > 0.9, "in float32 nearly every number should move: is every element compared?")
    one, step = torch.tensor(1.0, dtype=torch.bfloat16), 1e-4
    left = float(one - step != one)  # what becomes of a number near one
    expect(narrow == left, "too many moved in bfloat16: is B near one, and the step as small as the exercise says?")
    return "a sum in bfloat16 is rounded back to where it was, which is why peft raises adapters to float32"


@exercise("03.2")
def double_quantization_of_40b(answer: object) -> str:
    """(GB that double quantization saves on Falcon-40b, whether the model fits an A100 of 40 GB without it)."""
    saved, fits = as_tuple(answer, 2, "the GB that are saved, and whether it fits without")
    config = memory.known_config(memory.FALCON_40B)
    single, double = memory.constant_bytes(config, double_quant=False), memory.constant_bytes(config)
    small = memory.known_config("tiiuae/falcon-7b")
    mistakes = [
        (single / 1e9, "those are all constants without double quantization: subtract what remains with it"),
        (double / 1e9, "those are the constants that remain: how much larger were they before?"),
        ((memory.constant_bytes(small, double_quant=False) - memory.constant_bytes(small)) / 1e9, "that is Falcon-7b: the exercise is about its larger sister"),
    ]  # fmt: skip
    judge_number(saved, (single - double) / 1e9, "the saving", mistakes, rel=5e-3)
    plan = memory.plan(config, memory.gpu_profile(memory.FALCON_40B, "A100-40GB", 1, 512))
    expect(isinstance(fits, bool), "the second part is a yes or no: give True or False")
    expect(
        fits == (plan.total + single - double < memory.capacity("A100-40GB")),
        "add the saving to the plan's total, and compare again",
    )
    return "a gigabyte or two decides only where the card is nearly full"


@exercise("03.3")
def without_the_scale(answer: object) -> str:
    """What `compare` says of Y, dX, dA and dB when the layer by hand has lost its scale of 2."""
    parts = as_tuple(answer, 4, "the differences of Y, dX, dA and dB that `compare` returned")
    differences = [as_number(part, "a difference") for part in parts]
    expect(min(differences) >= 0, "a difference is negative: `compare` gives magnitudes")
    expect(max(differences) > 1e-3, "nothing differs: the scale is still there, or both layers have lost it")
    expect(min(differences) > 1e-3, "one of the four agrees, and none should: the scale reaches all of them")
    missing = 1 - 1 / 2  # a gradient of A or B is proportional to the scale, which is alpha / r = 2
    expect(max(differences) < 1, "that is more than a forgotten scale does: set it to one, and change nothing else")
    expect(
        abs(differences[2] - differences[3]) < 1e-3, "A and B lose the same share of their gradients: is the order Y, dX, dA, dB?"
    )
    expect(abs(differences[2] - missing) < 1e-3, "that scale is not the one of a layer without any: set it to one")
    return "every one of the four notices, the gradients of A and B by exactly the share that is missing"


@exercise("03.4")
def adapter_gradients(answer: object) -> str:
    """A function that gives the gradients of A and B without autograd, held against autograd."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 5, side, generator=generator) for side in (24, 16))
    A = torch.randn(3, 24, generator=generator, requires_grad=True)
    B = torch.randn(16, 3, generator=generator, requires_grad=True)
    scaling = 1.75
    dA, dB = torch.autograd.grad(scaling * F.linear(F.linear(x, A), B), (A, B), grad)
    found = as_tuple(call(answer, x, grad, A.detach(), B.detach(), scaling), 2, "the gradients of A and of B")
    expect(all(isinstance(part, torch.Tensor) for part in found), "both gradients must be tensors")
    expect(not (found[0].shape == dB.shape and found[1].shape == dA.shape), "the two have changed places: return A's first")
    expect(all(part.dim() == 2 for part in found), "a gradient has the shape of its matrix: sum over the batch axes")
    for name, mine, truth in (("the gradient of A", found[0], dA), ("the gradient of B", found[1], dB)):
        mistakes = [
            (truth / scaling, f"{name} lacks the scale, which stands in front of the whole update"),
            (truth * scaling, f"{name} has the scale twice"),
            (truth / 10, f"{name} is a mean over the tokens: gradients are sums"),
        ]
        judge_tensor(mine, truth, name, mistakes)
    return "two thin products for each, and no matrix of W's size anywhere"
