"""Judges of the exercises of notebook 05."""

import json

from helpers import evaluation, memory
from helpers.errors import DataError
from helpers.exercises import call, expect, judge
from helpers.profiles import PROFILES


def exercise_1(answer: object) -> None:
    """The number of trainable parameters."""
    p = PROFILES["tiny"]
    truth = memory.adapter_parameters(memory.known_config(p.model), p.lora_r // 2, p.target_modules)
    mistakes = {2 * truth: "that is the whole rank's: is the changed profile used to attach?"}
    judge(answer, truth, mistakes, rel=0)


def exercise_2(answer: object) -> None:
    """Two lists of texts: the answers with the adapter off, and those from before training."""
    off, before = answer
    lists = isinstance(off, list) and isinstance(before, list)
    expect(lists, "give the answers themselves, two lists of texts")
    fields = set(evaluation.FIELDS)  # a base may write JSON of its own
    tickets = [sum(bool(fields & set(evaluation.parse_ticket(t) or ())) for t in x) for x in answer]
    after, known = tickets
    expect(known < len(before) / 2, "the second list holds tickets: those are from after training")
    expect(after < len(off) / 2, "the first list holds tickets, so the adapter was on")
    same = sum(a.strip() == b.strip() for a, b in zip(off, before, strict=True))
    expect(same > 0.9 * len(off), "too many differ: the adapter off, and the same messages?")


def exercise_3(answer: object) -> None:
    """The error itself, as `except DataError as error` caught it."""
    expect(isinstance(answer, DataError), "that is no DataError: give the one that was caught")
    hint = "that error names no misspelt column: give both columns, one of them wrong"
    expect("has no '" in str(answer), hint)


def exercise_4(answer: object) -> None:
    """A function that returns a share from 0 to 1."""
    ticket = {"intent": "damage", "product": "mug", "order": "A1111", "urgency": "low"}
    right, *wrong = (json.dumps(ticket | x) for x in ({}, {"urgency": ""}, {"order": ""}, {"a": 1}))
    turned = json.dumps(dict(reversed(ticket.items())), indent=1)
    share = call(answer, [right] * 6 + [*wrong, "{}"], [right] * 10)
    mistakes = {1: "an answer with a wrong value counts as wrong"}
    judge(share, 6 / 10, mistakes | {6: "that is a count: divide it by the number of answers"})
    share = call(answer, [right, turned], [right] * 2)
    judge(share, 1, {1 / 2: "another order or spacing is the same ticket: compare what JSON says"})
    share = call(answer, [right, "The topic is damage."], [right] * 2)
    judge(share, 1 / 2, {1: "an answer that is no JSON counts as wrong"})
