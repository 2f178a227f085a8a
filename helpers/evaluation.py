"""Scores: tickets (valid JSON, exact match, per field), plain exact match, perplexity. Imports prompting and errors."""

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
    except ValueError:
        return None
    return ticket if isinstance(ticket, dict) else None


def score_tickets(answers: Sequence[str], references: Sequence[str]) -> dict:
    """Shares in [0, 1]: `valid_json` (an object with exactly the ticket's fields), `exact_match` (all values right), `fields` (each value right)."""
    if len(answers) != len(references) or not references:
        raise DataError(
            f"{len(answers)} answers cannot be scored against {len(references)} references: give one answer for each reference"
        )
    valid, exact, right = 0, 0, dict.fromkeys(FIELDS, 0)
    for answer, reference in zip(answers, references, strict=True):
        ticket, wanted = parse_ticket(answer), json.loads(reference)
        valid += ticket is not None and set(ticket) == set(FIELDS)
        exact += ticket == wanted
        for field in FIELDS:
            right[field] += ticket is not None and ticket.get(field) == wanted[field]
    n = len(references)
    return {"valid_json": valid / n, "exact_match": exact / n, "fields": {field: count / n for field, count in right.items()}}


def is_ticket_task(references: Sequence[str]) -> bool:
    """Whether the reference answers are tickets; other tasks are scored by exact match of the text alone."""
    return all((ticket := parse_ticket(reference)) is not None and set(ticket) == set(FIELDS) for reference in references)


def score(answers: Sequence[str], references: Sequence[str]) -> dict:
    """`score_tickets` for tickets; for any other task `exact_match` of the texts, with `valid_json` None and no fields."""
    if is_ticket_task(references):
        return score_tickets(answers, references)
    same = sum(answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True))
    return {"valid_json": None, "exact_match": same / len(references), "fields": {}}


@torch.inference_mode()
def perplexity(model, tokenizer, text: str, length: int = 128, batch_size: int = 32, max_tokens: int = 32_768) -> float:
    """exp of the mean negative log likelihood (nats a token) of `text`, read in windows of `length` tokens; the first of each is not predicted."""
    ids = tokenizer(text)["input_ids"][:max_tokens]
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if not len(windows):
        raise DataError(f"the text has {len(ids)} tokens and perplexity reads windows of {length}: give a longer text")
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return math.exp(total / (len(windows) * (length - 1)))
