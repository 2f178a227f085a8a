"""Notebook 03's QLoRA layer against peft on bitsandbytes: bytes, outputs and gradients, over shapes, ranks, dtypes and biases."""

import itertools

import pytest
import torch

from helpers import lessons

NEEDED = [
    "CHECKS",
    "NF4",
    "DOUBLE",
    "lesson",
    "quantize_nf4",
    "dequantize_nf4",
    "double_quantize",
    "double_dequantize",
    "QLoRALinear",
    "DequantizedMatmul",
    "FrugalQLoRALinear",
    "peft_layer",
    "TOLERANCE",
    "compare",
    "random_case",
    "saved_bytes",
]
SHAPES = [(64, 64), (192, 320), (320, 192), (256, 512), (36, 50)]  # the last does not fill its blocks: 36 * 50 = 28 * 64 + 8
RANKS = (1, 8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = list(itertools.product(SHAPES, RANKS, DTYPES, (False, True)))
assert len(CASES) >= 30


@pytest.fixture(scope="module")
def lesson():
    return lessons.load_definitions("03", *NEEDED)


def name(case):
    (out_features, in_features), r, dtype, bias = case
    return f"{out_features}x{in_features}-r{r}-{str(dtype).removeprefix('torch.')}{'-bias' if bias else ''}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_equals_peft_on_linear4bit(lesson, case):
    (out_features, in_features), r, dtype, bias = case
    ours, theirs, x, grad = lesson["random_case"](out_features, in_features, r, dtype, bias, seed=r)
    weight, state = theirs.base_layer.weight, theirs.base_layer.weight.quant_state
    assert torch.equal(ours.packed, weight.flatten())
    assert torch.equal(ours.c2, state.absmax) and torch.equal(ours.c1, state.state2.absmax)
    differences = lesson["compare"](ours, theirs, x, grad)
    assert max(differences) <= lesson["TOLERANCE"][dtype], differences


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == 8], ids=name)
def test_recomputing_in_backward_changes_nothing_but_the_bytes_kept(lesson, case):
    (out_features, in_features), r, dtype, bias = case
    ours, theirs, x, grad = lesson["random_case"](out_features, in_features, r, dtype, bias)
    frugal = lesson["FrugalQLoRALinear"](torch.ones(out_features, in_features), ours.bias, r, 2 * r, dtype)
    frugal.load_state_dict(ours.state_dict())
    assert max(lesson["compare"](frugal, theirs, x, grad)) <= lesson["TOLERANCE"][dtype]
    x = x.requires_grad_()
    kept = [lesson["saved_bytes"](module, lambda m=module: m(x)) for module in (ours, frugal)]
    assert kept[0] - kept[1] == out_features * in_features * dtype.itemsize


@pytest.mark.parametrize("fault", ["scale", "codes", "offset", "bias"])
def test_the_comparison_notices_a_fault(lesson, fault):
    ours, theirs, x, grad = lesson["random_case"](192, 320, 8, torch.float32, True)
    if fault == "scale":
        ours.scaling *= 1.01
    elif fault == "codes":
        ours.packed[0] ^= 0x10  # one weight moves by one code
    elif fault == "offset":
        ours.offset *= 1.001
    else:
        ours.bias = None
    assert max(lesson["compare"](ours, theirs, x, grad)) > lesson["TOLERANCE"][torch.float32]


def test_gradients_by_finite_differences(lesson):
    """In float64 from the layer's own dequantized matrix: dX, dA and dB are those of the equation, not merely peft's."""
    ours, _, x, grad = lesson["random_case"](64, 64, 4, torch.float32, False)
    frugal = lesson["FrugalQLoRALinear"](torch.ones(64, 64), None, 4, 8, torch.float32)
    frugal.load_state_dict(ours.state_dict())
    leaves = [
        x.double().requires_grad_(),
        frugal.A.detach().double().requires_grad_(),
        frugal.B.detach().double().requires_grad_(),
    ]
    y = leaves[0] @ frugal.double_dequant().double().T + frugal.scaling * leaves[0] @ leaves[1].T @ leaves[2].T
    exact = torch.autograd.grad(y, leaves, grad.double())
    x = x.requires_grad_()
    found = torch.autograd.grad(frugal(x), (x, frugal.A, frugal.B), grad)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_only_the_adapter_is_trainable_and_a_state_dict_carries_the_base(lesson):
    ours, _, x, _ = lesson["random_case"](64, 128, 4, torch.float32, True)
    assert [name for name, _ in ours.named_parameters()] == ["A", "B"]
    other = lesson["QLoRALinear"](torch.randn(64, 128), torch.zeros(64), r=4, alpha=8, compute_dtype=torch.float32)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), other(x))
