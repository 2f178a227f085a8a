"""Scores: tickets (valid JSON, exact match, per field), other texts (exact match), perplexity."""

import json
import math
from collections.abc import Sequence

import torch

from helpers.errors import DataError

FIELDS = ("intent", "product", "order", "urgency")


def parse_ticket(answer: str) -> dict | None:
    """The ticket an answer holds, or None if it is not one JSON object."""
    try:
        ticket = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return ticket if isinstance(ticket, dict) else None


def score(answers: Sequence[str], references: Sequence[str]) -> dict:
    """Shares in [0, 1]: of tickets `valid_json` (an object with their fields), `exact_match` (all
    values right), `fields` (each value right); of other texts `exact_match`, `valid_json` None."""
    both, n = list(zip(answers, references, strict=True)), len(references)
    if any(set(parse_ticket(wanted) or ()) != set(FIELDS) for wanted in references):
        same = sum(answer.strip() == wanted.strip() for answer, wanted in both)
        return {"valid_json": None, "exact_match": same / n, "fields": {}}
    found = [(parse_ticket(answer) or {}, json.loads(wanted)) for answer, wanted in both]
    return {
        "valid_json": sum(set(ticket) == set(FIELDS) for ticket, _ in found) / n,
        "exact_match": sum(ticket == wanted for ticket, wanted in found) / n,
        "fields": {f: sum(f in t and t[f] == w[f] for t, w in found) / n for f in FIELDS},
    }


@torch.inference_mode()
def perplexity(model, tokenizer, text: str, length: int = 128, max_tokens: int = 32_768) -> float:
    """exp of the mean negative log likelihood (nats a token) of `text`, read in windows of `length`
    tokens; the first of each is not predicted."""
    ids = tokenizer(text)["input_ids"][:max_tokens]
    if len(ids) < length:
        raise DataError(f"the text has {len(ids)} tokens, a window {length}: give a longer text")
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    was_training, total = model.training, 0.0
    model.eval()
    rows = min(32, 2**26 // (length * model.config.vocab_size) or 1)  # float32 logits in 0.3 GB
    for batch in windows.to(model.device).split(rows):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        total += loss.item() * len(batch)
    model.train(was_training)
    return math.exp(total / len(windows))
