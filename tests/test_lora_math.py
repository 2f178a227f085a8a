"""Notebook 01's layer, loaded from its cells: equal to loralib and peft; bad input; merge."""

import itertools
import random

import pytest
import torch
from torch import nn

from tests.notebooks import load_definitions

lesson = load_definitions("01", "LoRALinear", "three_layers", "output_and_gradients")
LoRALinear = lesson["LoRALinear"]
BATCHES = [(), (1,), (7,), (2, 5), (2, 1, 3)]
# In the dtype's eps, of the largest value; bfloat16 rounds once an operation, so it needs fewer
TOLERANCE = {torch.float32: 100, torch.float64: 100, torch.bfloat16: 4}
CASES = itertools.product(BATCHES, TOLERANCE, (False, True), ("loralib", "peft"))


@pytest.mark.parametrize(("batch", "dtype", "bias", "library"), CASES)
def test_equals_the_library_forward_and_gradients(batch, dtype, bias, library):
    """With a random shape from 1 to 96, any rank it allows, alpha from 0.25 to 4 times r."""
    torch.manual_seed(0)
    draw = random.Random(str((batch, dtype, bias)))
    n, m = draw.randint(1, 96), draw.randint(1, 96)
    r = draw.randint(1, min(n, m))
    layers = lesson["three_layers"](n, m, r, r * 2 ** draw.uniform(-2, 2), dtype, bias)
    x = 0.3 * torch.randn(*batch, n, dtype=dtype)
    ways = (layers["by hand"], layers[library])
    mine, theirs = (lesson["output_and_gradients"](*way, x) for way in ways)
    for name, a, b in zip(("h", "dL/dx", "dL/dA", "dL/dB"), mine, theirs, strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape, name
        tolerance = TOLERANCE[dtype] * torch.finfo(dtype).eps * float(b.abs().max())
        assert (a - b).abs().max() <= tolerance, name


def test_starts_at_the_base_and_trains_only_a_and_b():
    base = nn.Linear(12, 8)
    layer, x = LoRALinear(base, r=3, alpha=6), torch.randn(5, 12)
    assert torch.equal(layer(x), base(x)) and layer.A.shape == (3, 12) and layer.B.shape == (8, 3)
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
    torch.testing.assert_close(layer.base.weight, before + 2 * layer.B @ layer.A)
    torch.testing.assert_close(layer(x), apart)
    assert torch.equal(layer(x), layer.base(x))
    layer.unmerge()
    torch.testing.assert_close(layer.base.weight, before, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(x), apart)


@pytest.mark.parametrize("r", [0, -1, 9, 2.5, "3", None], ids=repr)
def test_refuses_a_rank_that_cannot_be_and_leaves_the_base_as_it_was(r):
    base = nn.Linear(12, 8)
    with pytest.raises(ValueError, match=f"r is {r!r}: choose 1 to 8"):
        LoRALinear(base, r, alpha=8)
    assert base.weight.requires_grad and base.bias.requires_grad
