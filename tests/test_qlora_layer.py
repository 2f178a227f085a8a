"""Notebook 03's QLoRA layer, from its cells, against peft on bitsandbytes: bytes and gradients."""

from itertools import product

import pytest
import torch

from tests.notebooks import load_definitions

NEEDED = ("NF4Linear", "QLoRALinear", "DequantizedMatmul", "FrugalQLoRALinear", "peft_layer")
NEEDED += ("TOLERANCE", "compare", "random_case", "saved_bytes")
# The last does not fill its blocks: 36 * 50 = 28 * 64 + 8
SHAPES = [(64, 64), (192, 320), (320, 192), (256, 512), (36, 50)]
lesson = load_definitions("03", *NEEDED)
CASES = product(SHAPES, (1, 8), lesson["TOLERANCE"], (False, True))


def frugal_copy(layer):
    """The layer that dequantizes again in backward, with the numbers of `layer`."""
    r, dtype = len(layer.A), layer.compute_dtype
    sizes = (torch.ones(layer.shape), layer.bias, r, r * layer.scaling, dtype)
    copy = lesson["FrugalQLoRALinear"](*sizes)
    copy.load_state_dict(layer.state_dict())
    return copy


@pytest.mark.parametrize(("shape", "r", "dtype", "bias"), CASES)
def test_both_layers_equal_peft_on_linear4bit_and_one_keeps_fewer_bytes(shape, r, dtype, bias):
    ours, theirs, x, grad = lesson["random_case"](*shape, r, dtype, bias, seed=r)
    weight, state = theirs.base_layer.weight, theirs.base_layer.weight.quant_state
    assert torch.equal(ours.packed, weight.flatten())
    assert torch.equal(ours.c2, state.absmax) and torch.equal(ours.c1, state.state2.absmax)
    frugal = frugal_copy(ours)
    for layer in (ours, frugal):
        differences = lesson["compare"](layer, theirs, x, grad)
        assert max(differences) <= lesson["TOLERANCE"][dtype], differences
    x = x.requires_grad_()
    kept = [lesson["saved_bytes"](layer, lambda m=layer: m(x)) for layer in (ours, frugal)]
    assert kept[0] - kept[1] == shape[0] * shape[1] * dtype.itemsize


def test_gradients_are_those_of_the_equation_not_merely_those_of_peft():
    """In float64, from the layer's own dequantized matrix."""
    ours, _, x, grad = lesson["random_case"](64, 64, 4, torch.float32, False)
    frugal = frugal_copy(ours)
    leaves = [t.detach().double().requires_grad_() for t in (x, frugal.A, frugal.B)]
    X, A, B = leaves
    y = X @ frugal.double_dequant().double().T + frugal.scaling * X @ A.T @ B.T
    exact = torch.autograd.grad(y, leaves, grad.double())
    x = x.requires_grad_()
    found = torch.autograd.grad(frugal(x), (x, frugal.A, frugal.B), grad)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
