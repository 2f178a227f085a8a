"""One run: train, score, and return its row. Imports study.formats, study.scoring, study.skew.

A run computes on one thread (study.pool sees to it), so that it repeats to the last bit on the same machine.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F

from helpers import evaluation, loading, prompting, records
from helpers.errors import DataError, DivergedError
from helpers.study.formats import load_format, prepare, training_bytes
from helpers.study.run import BATCH, BIAS_STEPS, DATA, FORMATS, METHODS, STEPS, TARGETS, TEXT_STEPS, WARMUP, Run
from helpers.study.scoring import answer_logits, answer_losses, encoded, text_perplexity, text_windows, tokenizer
from helpers.study.skew import skewed_rows, urgent_shares

PROBE_EVERY, PROBE_ROWS = 25, 64  # how often, and on how many validation rows, a run is looked at while it trains


def execute(run: Run) -> dict:
    """Train as `run` says and return its row: the run, its scores, losses, perplexities, bytes and seconds. DivergedError on a loss that is not finite."""
    check(run)
    torch.manual_seed(run.seed)
    began = time.monotonic()
    model = prepare(run)
    rows = training_rows(run)
    row = asdict(run) | {"trainable": loading.trainable_parameters(model), "bytes": training_bytes(model, run)}
    row["perplexity_before"] = perplexity_of(run.format)
    if run.experiment == "bias":
        row["urgent_group_before"], row["urgent_other_before"] = urgent_shares(model.eval())
    row |= fit(model, rows, run)
    model.eval()
    row["perplexity"] = text_perplexity(model)
    if run.data != "text":
        row["train_loss"] = answer_losses(model, rows[:200])[1]
        right, row["validation_loss"] = answer_losses(model, encoded("validation"))
        row["validation_exact"] = sum(right) / len(right)
        for split in ("test", "test_reworded"):
            right, row[f"{split}_loss"] = answer_losses(model, encoded(split))
            row[f"{split}_exact"] = sum(right) / len(right)
    if run.experiment == "bias":
        row["urgent_group"], row["urgent_other"] = urgent_shares(model)
    return row | {"seconds": round(time.monotonic() - began, 1)}


def check(run: Run) -> None:
    """DataError, naming the value and the choices, for a run that cannot be."""
    for field, choices in (("method", METHODS), ("format", FORMATS), ("data", DATA), ("targets", TARGETS)):
        value = getattr(run, field)
        if value not in choices and not (field == "targets" and run.method == "full"):
            raise DataError(f"a run cannot have {field} {value!r}: choose one of {', '.join(choices)}")
    if run.examples < BATCH or run.rank < (run.method != "full"):
        raise DataError(
            f"a run cannot have rank {run.rank} and {run.examples} examples: give at least rank 1 and {BATCH} examples"
        )


@cache
def perplexity_of(format: str) -> float:
    """`text_perplexity` of the base as stored in `format`, before any training."""
    return text_perplexity(load_format(format).eval())


def training_rows(run: Run) -> list[dict]:
    """The rows a run learns from, drawn by its seed."""
    if run.data == "text":
        return [{"input_ids": w, "labels": w} for w in text_windows("train")]
    rows, tickets = encoded("train"), [evaluation.parse_ticket(answer) for answer in records.read_tickets("train")["answer"]]
    generator = torch.Generator().manual_seed(run.seed)
    if run.data == "tickets":
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)[: run.examples].tolist()]
    return skewed_rows(run.data, rows, tickets, generator)


def fit(model, rows: list[dict], run: Run) -> dict:
    """Train for the study's fixed number of steps (cosine decay); return when 0.9 was reached and when the validation loss was least."""
    steps = {"tickets": STEPS, "text": TEXT_STEPS}.get(run.data, BIAS_STEPS)
    probe = encoded("validation")[:PROBE_ROWS]
    found = {"steps": steps, "steps_to_90": None, "least_validation_loss": math.inf, "least_at": None}
    for step, _ in training_steps(model, rows, run, steps):
        if run.data != "text" and step % PROBE_EVERY == 0:
            right, loss = answer_losses(model, probe)
            if found["steps_to_90"] is None and sum(right) >= 0.9 * len(right):
                found["steps_to_90"] = step
            if loss < found["least_validation_loss"]:
                found |= {"least_validation_loss": loss, "least_at": step}
    return found


def training_steps(model, rows: list[dict], run: Run, steps: int) -> Iterator[tuple[int, float]]:
    """Train, yielding (step, loss) after each of `steps` optimizer steps: AdamW, cosine decay after a short warm-up, gradient norm at most 1."""
    if run.method == "loraplus":  # B learns 16 times as fast as A
        optimizer = create_loraplus_optimizer(
            model, optimizer_cls=torch.optim.AdamW, lr=run.learning_rate, loraplus_lr_ratio=16, weight_decay=0.0
        )
    else:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=run.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / WARMUP) * (1 + math.cos(math.pi * s / steps)) / 2
    )
    order = prompting.length_grouped_order([len(row["input_ids"]) for row in rows], BATCH, steps, run.seed)
    collate = prompting.Collator(tokenizer().eos_token_id)
    model.train()
    for step in range(steps):
        logits, labels, _ = answer_logits(model, collate([rows[i] for i in order[step * BATCH : (step + 1) * BATCH]]))
        loss = F.cross_entropy(logits, labels)
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss at step {step + 1} of {run} is {loss.item()}: lower its learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step + 1, loss.item()
