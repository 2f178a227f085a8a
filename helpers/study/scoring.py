"""Scores read off one pass with the answer as input, without generating. Imports evaluation's neighbours: loading, prompting, records."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from peft import PeftModel
from torch.nn import functional as F

from helpers import loading, profiles, prompting, records
from helpers.profiles import ROOT

WINDOW = 128  # tokens of general text that are read at once


@cache
def tokenizer():
    return loading.load_tokenizer(profiles.PROFILES["tiny"])


@cache
def encoded(split: str) -> list[dict]:
    """A split of the tickets as `input_ids` and `labels`."""
    rows, _ = prompting.encode(records.read_tickets(split), tokenizer(), profiles.PROFILES["tiny"].max_length)
    return list(rows)


def answer_logits(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) of the n labelled tokens, their labels (n,), and where they are (batch, length - 1).

    The head is applied to labelled places only: on a short answer behind a long message that saves most of its work.
    """
    falcon = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = falcon.transformer(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state
    labels = inputs["labels"][:, 1:]
    learned = labels != prompting.IGNORED
    return falcon.lm_head(hidden[:, :-1][learned]).float(), labels[learned], learned


def answer_losses(model, rows: Sequence[dict], batch: int = 50) -> tuple[list[bool], float]:
    """For each row whether greedy decoding would give exactly its answer, and the mean loss (nats an answer token) over all rows.

    One pass with the answer as input tells it: greedy decoding repeats an answer if and only if every token of it is the most likely
    one after the tokens before it.
    """
    was_training = model.training
    model.eval()
    right, total, count = [False] * len(rows), 0.0, 0
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            chosen = by_length[start : start + batch]
            inputs = prompting.Collator(tokenizer().eos_token_id)([rows[i] for i in chosen])
            logits, labels, learned = answer_logits(model, inputs)
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            wrong = torch.zeros(len(chosen), dtype=torch.bool)
            wrong[learned.nonzero()[:, 0][logits.argmax(-1) != labels]] = True
            for i, bad in zip(chosen, wrong.tolist(), strict=True):
                right[i] = not bad
    model.train(was_training)
    return right, total / count


@cache
def text_windows(part: str) -> list[list[int]]:
    """Windows of the held-out general text: of five in a row the first three are for training ("train"), two for scoring ("test")."""
    ids = tokenizer()((ROOT / "data" / "heldout.txt").read_text(encoding="utf-8"))["input_ids"]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)]
    return [window for k, window in enumerate(windows) if (k % 5 < 3) == (part == "train")]


def text_perplexity(model) -> float:
    """exp of the mean loss (nats a token) on the scoring windows of the general text."""
    rows = [{"input_ids": window, "labels": window} for window in text_windows("test")]
    return math.exp(answer_losses(model, rows)[1])
