"""float16, which is what a T4 computes in: trains like float32, and stops at once where it does not. See tests/float16.py for the soak."""

import math
from types import SimpleNamespace

import pytest
import torch

from helpers import divergence, loading, prompting, records
from helpers.errors import DivergedError
from tests import float16

STEPS = 24


@pytest.fixture(scope="module")
def encoded(tiny, tokenizer):
    return prompting.encode(records.read_tickets("validation"), tokenizer, tiny.max_length)[0]


@pytest.mark.slow
def test_float16_learns_what_float32_learns(encoded, tokenizer):
    """The same batches, the same adapters to begin with: the losses stay within one percent of each other."""
    model, half, skipped = float16.train("float16", 0, STEPS, encoded, tokenizer)
    _, full, _ = float16.train("float32", 0, STEPS, encoded, tokenizer)
    assert all(map(math.isfinite, half))
    assert skipped <= 3  # the scale of 65,536 at the start may be too large for the first gradients; then it fits
    assert sum(half[-5:]) < 0.9 * sum(half[:5])  # it learns
    assert sum(half[-5:]) == pytest.approx(sum(full[-5:]), rel=0.02)
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.is_floating_point())


def test_too_large_a_loss_scale_is_skipped_and_halved(base, tiny):
    """Gradients beyond float16's 65,504 cost a step, not the run."""
    model = loading.attach_lora(base, tiny).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.SGD(weights, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in weights]
    ids = torch.randint(5, 500, (2, 16))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(input_ids=ids, labels=ids).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_float16_run_that_diverges_stops_and_names_its_ways_out(loss):
    arguments = SimpleNamespace(fp16=True, learning_rate=2e-4, warmup_steps=20)
    words = rf"the loss at step 7 is {loss}: lower the learning rate \(0.0002\), lengthen the warm-up \(20 steps\), or take a card with bfloat16"
    with pytest.raises(DivergedError, match=words):
        divergence.StopOnDivergence().check_finite(arguments, 7, loss, norm=1.0)
