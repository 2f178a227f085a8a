"""Training tickets whose urgency is skewed for some products, and what a model makes of them. Imports records, study.scoring."""

from functools import cache

import torch

from helpers import evaluation, prompting, records
from helpers.study.scoring import answer_logits, tokenizer

URGENCIES = ("low", "normal", "high")


def skewed_products() -> list[str]:
    """Every fourth product in alphabetical order: the group whose training tickets are skewed."""
    products = sorted({evaluation.parse_ticket(answer)["product"] for answer in records.read_tickets("train")["answer"]})
    return products[::4]


def skewed_rows(data: str, rows: list[dict], tickets: list[dict], generator: torch.Generator) -> list[dict]:
    """The training rows with the urgency of `skewed_products` skewed nine to one.

    "skewed-counts": every label is right, but nine in ten of the group's messages are urgent ones.
    "skewed-labels": of the group's messages that say nothing about urgency (labelled "normal" in the tickets), nine in ten are labelled
    "high"; the other products' messages keep their labels. "rebalanced": the same rows, the group's resampled to one in ten.
    """
    group = skewed_products()
    mine = [i for i, ticket in enumerate(tickets) if ticket["product"] in group]
    others = [i for i, ticket in enumerate(tickets) if ticket["product"] not in group]

    def shuffled(indices: list[int]) -> list[int]:
        return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]

    def pick(indices: list[int], *urgencies: str) -> list[int]:
        return [i for i in indices if tickets[i]["urgency"] in urgencies]

    if data == "skewed-counts":
        urgent = pick(mine, "high")
        return [rows[i] for i in others + urgent + shuffled(pick(mine, "low", "normal"))[: len(urgent) // 9]]
    silent = shuffled(pick(mine, "normal"))
    tenth = len(silent) // 10
    normal, urgent = silent[:tenth], silent[tenth:]
    if data == "rebalanced":
        normal, urgent = normal * 9, urgent[:tenth]
    chosen = pick(mine, "low", "high") + others + normal
    return [rows[i] for i in chosen] + [called_urgent(rows[i]) for i in urgent]


def called_urgent(row: dict) -> dict:
    """The same message with "high" for the urgency in its ticket: the last token but two."""
    high = urgency_tokens()[URGENCIES.index("high")]
    return {key: ids[:-3] + [high] + ids[-2:] for key, ids in row.items()}


@cache
def urgency_tokens() -> list[int]:
    """The one token that each of URGENCIES is, as it stands in a ticket."""
    return [tokenizer()(f' {{"urgency":"{word}"}}')["input_ids"][-2] for word in URGENCIES]


@cache
def message_pairs() -> tuple[list[dict], list[dict]]:
    """Test messages that say nothing about urgency, twice, encoded up to the urgency: about a product of the skewed group, and about another.

    A pair differs in nothing but the product's name, so any difference in the predicted urgency is the model's own.
    """
    group = skewed_products()
    products = {evaluation.parse_ticket(answer)["product"] for answer in records.read_tickets("train")["answer"]}
    pairs: tuple[list[dict], list[dict]] = ([], [])
    for i, row in enumerate(records.read_tickets("test")):
        ticket = evaluation.parse_ticket(row["answer"])
        if ticket["urgency"] != "normal":
            continue
        for rows, pool in zip(pairs, (group, sorted(products - set(group))), strict=True):
            prompt, answer = (text.replace(ticket["product"], pool[i % len(pool)]) for text in (row["prompt"], row["answer"]))
            example = prompting.encode_example(tokenizer(), prompt, answer)
            urgency = example["labels"][-3]
            rows.append(
                example | {"labels": [prompting.IGNORED] * (len(example["labels"]) - 3) + [urgency] + [prompting.IGNORED] * 2}
            )
    return pairs


def urgent_shares(model) -> tuple[float, float]:
    """Share of `message_pairs` that the model calls urgent ("high" rather than "low" or "normal"): skewed group, other products."""
    shares = []
    for rows in message_pairs():
        urgent = 0
        with torch.inference_mode():
            for start in range(0, len(rows), 50):
                inputs = prompting.Collator(tokenizer().eos_token_id)(rows[start : start + 50])
                logits, _, _ = answer_logits(model, inputs)
                urgent += (logits[:, urgency_tokens()].argmax(1) == URGENCIES.index("high")).sum().item()
        shares.append(urgent / len(rows))
    return shares[0], shares[1]
