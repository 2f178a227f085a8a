"""Training tickets whose urgency is skewed for some products, and what a model makes of them."""

from functools import cache

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from data.study import study
from helpers import evaluation, prompting, records

SKEWED = ("skewed-counts", "skewed-labels", "rebalanced")
URGENCIES = ("low", "normal", "high")
HIGH = URGENCIES.index("high")


@cache
def train_tickets() -> list[dict]:
    return [evaluation.parse_ticket(answer) for answer in records.read_tickets("train")["answer"]]


@cache
def products() -> tuple[list[str], list[str]]:
    """The group, every fourth product in alphabetical order, whose tickets are skewed; the rest."""
    names = sorted({ticket["product"] for ticket in train_tickets()})
    return names[::4], [name for name in names if name not in names[::4]]


def training_rows(run: study.Run) -> list[dict]:
    """The training tickets, encoded, with the urgency of the group skewed nine to one.

    "skewed-counts": every label is right, but nine in ten of the group's messages are urgent ones.
    "skewed-labels": of the group's messages that say nothing about urgency (labelled "normal"),
    nine in ten are labelled "high". "rebalanced": the same, the group's resampled to one in ten.
    """
    rows, tickets = study.encoded("train"), train_tickets()
    generator = torch.Generator().manual_seed(run.seed)
    mine = [i for i, ticket in enumerate(tickets) if ticket["product"] in products()[0]]
    others = [i for i, ticket in enumerate(tickets) if ticket["product"] not in products()[0]]

    def shuffled(indices: list[int]) -> list[int]:
        return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]

    def pick(*urgencies: str) -> list[int]:
        return [i for i in mine if tickets[i]["urgency"] in urgencies]

    if run.data == "skewed-counts":
        urgent = pick("high")
        calm = shuffled(pick("low", "normal"))[: len(urgent) // 9]
        return [rows[i] for i in others + urgent + calm]
    silent = shuffled(pick("normal"))
    tenth = len(silent) // 10
    normal, urgent = silent[:tenth], silent[tenth:]
    if run.data == "rebalanced":
        normal, urgent = normal * 9, urgent[:tenth]
    kept = pick("low", "high") + others + normal
    return [rows[i] for i in kept] + [called_urgent(rows[i]) for i in urgent]


def called_urgent(row: dict) -> dict:
    """The same message with "high" for the urgency in its ticket: the last token but two."""
    high = urgency_tokens()[HIGH]
    return {name: row[name][:-3] + [high] + row[name][-2:] for name in ("input_ids", "labels")}


@cache
def urgency_tokens() -> list[int]:
    """The one token that each of URGENCIES is, as it stands in a ticket."""
    tokens = study.tokenizer()
    return [tokens(f' {{"urgency":"{word}"}}')["input_ids"][-2] for word in URGENCIES]


@cache
def message_pairs() -> tuple[list[dict], list[dict]]:
    """Test messages that say nothing about urgency, twice: about a product of the group, and about
    another. The only label is the urgency, so any difference in it is the model's own.
    """
    pairs: tuple[list[dict], list[dict]] = ([], [])
    for i, row in enumerate(records.read_tickets("test")):
        ticket = evaluation.parse_ticket(row["answer"])
        if ticket["urgency"] != "normal":
            continue
        for rows, names in zip(pairs, products(), strict=True):
            name = names[i % len(names)]
            texts = [row[part].replace(ticket["product"], name) for part in ("prompt", "answer")]
            rows.append(dict(zip(("prompt", "answer"), texts, strict=True)))
    return tuple(map(urgency_alone, pairs))


def urgency_alone(rows: list[dict]) -> list[dict]:
    """The rows encoded, with the token of the urgency as the only label."""
    encoded = prompting.encode(Dataset.from_list(rows), study.tokenizer(), 999)[0].to_list()
    for row in encoded:
        row["labels"][:] = [prompting.IGNORED] * len(row["labels"])
        row["labels"][-3] = row["input_ids"][-3]
    return encoded


@torch.inference_mode()
def urgent_shares(model) -> tuple[float, float]:
    """Share of `message_pairs` that the model calls "high", not "low" or "normal": group, rest."""
    collate, shares = DataCollatorForSeq2Seq(study.tokenizer()), []
    model.eval()
    for rows in message_pairs():
        urgent = 0
        for start in range(0, len(rows), 50):
            logits, _, _ = study.answer_logits(model, collate(rows[start : start + 50]))
            urgent += (logits[:, urgency_tokens()].argmax(1) == HIGH).sum().item()
        shares.append(urgent / len(rows))
    return shares[0], shares[1]
