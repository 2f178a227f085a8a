"""Scores: tickets (valid JSON, exact match, per field), replies, plain exact match, perplexity. Imports errors."""

import json
import math
import re
from collections.abc import Sequence

import torch

from helpers.errors import DataError

FIELDS = ("intent", "product", "order", "urgency")
# What a reply must promise for each intent, and by when for each urgency. A test holds both against the replies in data/tickets.
REMEDIES = {
    "refund": "refund the",
    "exchange": "exchange the",
    "cancel": "cancel the",
    "delivery": "look for the",
    "damage": "replace the",
    "missing": "send the missing part of the",
    "invoice": "send the invoice for the",
    "address": "change the address for the",
}
DEADLINES = {"high": "today", "normal": "this week", "low": "this month"}
REPLY_FIELDS = ("product", "order", "remedy", "ends")  # what makes a reply complete; its deadline is scored apart


def parse_ticket(answer: str) -> dict | None:
    """The ticket an answer holds, or None if it is not one JSON object."""
    try:
        ticket = json.loads(answer)
    except ValueError:
        return None
    return ticket if isinstance(ticket, dict) else None


def check_numbers(answers: Sequence[str], references: Sequence[str]) -> None:
    """DataError unless there is one answer for each reference, and at least one."""
    if len(answers) != len(references) or not references:
        raise DataError(
            f"{len(answers)} answers cannot be scored against {len(references)} references: give one answer for each reference"
        )


def score_tickets(answers: Sequence[str], references: Sequence[str]) -> dict:
    """Shares in [0, 1]: `valid_json` (an object with exactly the ticket's fields), `exact_match` (all values right), `fields` (each value right)."""
    check_numbers(answers, references)
    valid, exact, right = 0, 0, dict.fromkeys(FIELDS, 0)
    for answer, reference in zip(answers, references, strict=True):
        ticket, wanted = parse_ticket(answer), json.loads(reference)
        valid += ticket is not None and set(ticket) == set(FIELDS)
        exact += ticket == wanted
        for field in FIELDS:
            right[field] += ticket is not None and ticket.get(field) == wanted[field]
    n = len(references)
    return {"valid_json": valid / n, "exact_match": exact / n, "fields": {field: count / n for field, count in right.items()}}


def check_reply(reply: str, ticket: dict) -> dict[str, bool]:
    """What of a ticket a reply gets right: names the product and the order, promises the right remedy and deadline, and no other; ends."""
    remedies = {intent for intent, words in REMEDIES.items() if re.search(rf"\bwill {words} ", reply)}
    deadlines = {urgency for urgency, words in DEADLINES.items() if re.search(rf"\b{words}\b", reply)}
    return {
        "product": f" {ticket['product']} " in reply,
        "order": set(re.findall(r"\b[A-Z]\d{4}\b", reply)) == {ticket["order"]},
        "remedy": remedies == {ticket["intent"]},
        "deadline": deadlines == {ticket["urgency"]},
        "ends": reply.endswith(".") and "\n" not in reply and reply.count(".") <= 2,  # two sentences, and nothing after them
    }


def score_replies(replies: Sequence[str], tickets: Sequence[str]) -> dict:
    """Shares in [0, 1] of replies against the *tickets* (JSON) of their messages: `complete` (all of REPLY_FIELDS right), `deadline`, and
    `fields` (each of REPLY_FIELDS), see `check_reply`.
    """
    if len(replies) != len(tickets) or not tickets:
        raise DataError(f"{len(replies)} replies cannot be scored against {len(tickets)} tickets: give one reply for each ticket")
    checks = [check_reply(reply, json.loads(ticket)) for reply, ticket in zip(replies, tickets, strict=True)]
    share = {field: sum(check[field] for check in checks) / len(checks) for field in checks[0]}
    complete = sum(all(check[field] for field in REPLY_FIELDS) for check in checks) / len(checks)
    return {"complete": complete, "deadline": share["deadline"], "fields": {field: share[field] for field in REPLY_FIELDS}}


def is_ticket_task(references: Sequence[str]) -> bool:
    """Whether the reference answers are tickets; other tasks are scored by exact match of the text alone."""
    return all((ticket := parse_ticket(reference)) is not None and set(ticket) == set(FIELDS) for reference in references)


def score(answers: Sequence[str], references: Sequence[str]) -> dict:
    """`score_tickets` for tickets; for any other task `exact_match` of the texts, with `valid_json` None and no fields."""
    if is_ticket_task(references):
        return score_tickets(answers, references)
    check_numbers(answers, references)
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
