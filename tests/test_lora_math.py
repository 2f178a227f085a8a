"""Notebook 01's layer, loaded from its cells: equal to loralib and peft over random shapes, ranks
and dtypes; bad input; merge."""

import random

import pytest
import torch
from torch import nn

from tests.notebooks import load_definitions

LoRALinear = load_definitions("01", "LoRALinear")["LoRALinear"]
_lesson = load_definitions("01", "LoRALinear", "three_layers", "output_and_gradients")
three_layers, output_and_gradients = _lesson["three_layers"], _lesson["output_and_gradients"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# In units of the dtype's eps, against the largest value. bfloat16 rounds once an operation, so it
# needs fewer.
TOLERANCE = {torch.float32: 100, torch.float64: 100, torch.bfloat16: 4}


def random_case(seed: int) -> dict:
    """Shapes from 1 to 96, any rank they allow, alpha from 0.25 to 4 times r, each dtype in turn,
    with and without bias and batch axes."""
    draw = random.Random(seed)
    in_features, out_features = draw.randint(1, 96), draw.randint(1, 96)
    r = draw.randint(1, min(in_features, out_features))
    return {
        "in_features": in_features,
        "out_features": out_features,
        "r": r,
        "alpha": r * 2 ** draw.uniform(-2, 2),
        "dtype": DTYPES[seed % len(DTYPES)],
        "bias": draw.random() < 0.5,
        "batch": draw.choice([(), (1,), (7,), (2, 5), (2, 1, 3)]),
    }


CASES = [random_case(seed) for seed in range(30)]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(str(value) for value in case.values())
)
@pytest.mark.parametrize("library", ["loralib", "peft"])
def test_equals_the_library_forward_and_gradients(case, library):
    torch.manual_seed(0)
    case = dict(case)
    batch, dtype = case.pop("batch"), case["dtype"]
    layers = three_layers(**case)
    x = 0.3 * torch.randn(*batch, case["in_features"], dtype=dtype)
    mine = output_and_gradients(*layers["by hand"], x)
    theirs = output_and_gradients(*layers[library], x)
    for name, a, b in zip(("h", "dL/dx", "dL/dA", "dL/dB"), mine, theirs, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.shape == b.shape
        tolerance = TOLERANCE[dtype] * torch.finfo(dtype).eps * float(b.abs().max())
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_random_cases_are_of_many_kinds():
    assert (
        len(
            {
                (case["in_features"], case["out_features"], case["r"], case["dtype"])
                for case in CASES
            }
        )
        >= 20
    )
    assert {case["dtype"] for case in CASES} == set(DTYPES)
    assert {case["bias"] for case in CASES} == {True, False}
    assert {len(case["batch"]) for case in CASES} == {0, 1, 2, 3}


def test_starts_at_the_base_and_trains_only_a_and_b():
    base = nn.Linear(12, 8)
    layer, x = LoRALinear(base, r=3, alpha=6), torch.randn(5, 12)
    assert torch.equal(layer(x), base(x))
    assert layer.A.shape == (3, 12) and layer.B.shape == (8, 3)
    assert layer.A.abs().max() <= 12**-0.5 and layer.A.any()  # Kaiming-uniform with a = sqrt(5)
    assert not layer.B.any()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}


def test_merge_and_unmerge():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 8, dtype=torch.float64), r=3, alpha=6)
    nn.init.normal_(layer.B)
    before, x = layer.base.weight.clone(), torch.randn(5, 12, dtype=torch.float64)
    apart = layer(x)
    layer.unmerge()  # nothing to take out
    assert torch.equal(layer.base.weight, before)
    layer.merge()
    layer.merge()  # once is enough
    torch.testing.assert_close(layer.base.weight, before + layer.delta_weight())
    torch.testing.assert_close(layer.delta_weight(), 2 * layer.B @ layer.A)
    torch.testing.assert_close(layer(x), apart)
    assert torch.equal(layer(x), layer.base(x))
    layer.unmerge()
    torch.testing.assert_close(layer.base.weight, before, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(x), apart)


@pytest.mark.parametrize("r", [0, -1, 9, 2.5, "3", None], ids=repr)
def test_refuses_a_rank_that_cannot_be(r):
    with pytest.raises(ValueError, match=f"r is {r!r}: choose 1 to 8"):
        LoRALinear(nn.Linear(12, 8), r, alpha=8)


def test_a_refused_base_is_left_as_it_was():
    base = nn.Linear(12, 8)
    with pytest.raises(ValueError):
        LoRALinear(base, 0, 8)
    assert base.weight.requires_grad and base.bias.requires_grad
