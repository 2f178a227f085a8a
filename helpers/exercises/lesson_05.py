"""Judges of the exercises of notebook 05. Imports judging, errors, evaluation, memory and profiles."""

import json

from helpers import evaluation, memory
from helpers.errors import DataError
from helpers.exercises.judging import as_number, as_tuple, as_whole_number, call, exercise, expect, judge_error, judge_number
from helpers.profiles import PROFILES


@exercise("05.1")
def half_the_rank(answer: object) -> str:
    """Trainable parameters of an adapter of half the profile's rank; any profile's is right."""
    count = as_whole_number(answer, "the number of parameters")
    truths = {}
    for profile in PROFILES.values():
        config, full = memory.known_config(profile.model), profile.lora_r
        truths[memory.adapter_parameters(config, full // 2, profile.target_modules)] = config, full, profile.target_modules
    if count in truths:
        return "linear in the rank: half the rank, half the adapter"
    for truth, (config, full, targets) in truths.items():
        shapes = memory.linear_shapes(config).items()
        layers = config.num_hidden_layers
        a_alone = layers * full // 2 * sum(inputs for kind, (_, inputs) in shapes if kind in targets)
        mistakes = {
            2 * truth: "that is the whole rank's: was the changed profile used to load and to attach?",
            truth // 2: "that is a quarter of the rank's: halve once",
            a_alone: "that counts every A and no B",
            truth - a_alone: "that counts every B and no A",
            truth // layers: "that is one layer's: the model has several",
        }
        expect(count not in mistakes, mistakes.get(count, ""))
    config, full, targets = next(iter(truths.values()))
    judge_number(count, next(iter(truths)), "the number of parameters", rel=0, nudge="Count A and B of all four linear kinds.")
    return ""


@exercise("05.2")
def base_is_still_there(answer: object) -> str:
    """(answers with the adapter switched off, answers of the base before training to the same messages)."""
    off, before = as_tuple(answer, 2, "the answers with the adapter switched off, and those from before training")
    both = isinstance(off, list) and isinstance(before, list)
    expect(both and all(isinstance(text, str) for text in off + before), "both parts must be lists of answers, each a text")
    expect(len(off) >= 20, "too few answers to tell: take at least twenty messages")
    expect(len(off) == len(before), "the lists have different lengths: take the answers to the same messages")
    tickets = sum(evaluation.parse_ticket(text) is not None for text in off) / len(off)
    known = sum(evaluation.parse_ticket(text) is not None for text in before) / len(before)
    expect(known < 0.5, "the second list holds tickets: those are answers from after training")
    expect(tickets < 0.5, "the first list holds tickets, so the adapter was on: generate inside the `with` block")
    same = sum(a == b for a, b in zip(off, before, strict=True)) / len(off)
    order = sorted(off) == sorted(before) and same < 0.9
    expect(not order, "the same answers in another order: keep the messages in theirs")
    expect(same > 0.9, "too many answers differ: are both lists answers to the same messages, generated greedily?")
    return "the base is where it was; only the adapter has learnt"


@exercise("05.3")
def misspelt_column(answer: object) -> str:
    """The error that reading a file with a misspelt column raises."""
    judge_error(
        answer,
        DataError,
        "column",
        nothing="is the column misspelt?",
        foreign="let records.read_records read the file",
        other="it does not name a column; read its sentence, and repair that first",
    )
    return "it names the row, the column, and what to write instead"


@exercise("05.4")
def exact_match(answer: object) -> str:
    """A function: the share of answers that are the same ticket as their reference, held against helpers.evaluation."""
    ticket = {"intent": "damage", "product": "mug", "order": "A1111", "urgency": "low"}
    reference = json.dumps(ticket, separators=(",", ":"))
    turned = json.dumps(dict(reversed(ticket.items())), indent=1)
    others = (
        ("another value", json.dumps({**ticket, "urgency": "high"})),
        ("a field too many", json.dumps({**ticket, "note": ""})),
    )
    others += (
        ("no JSON", "The topic is damage."),
        ("a list", "[1]"),
        ("nothing", ""),
        ("a field too few", '{"intent": "damage"}'),
    )

    def share(answers: list[str]) -> tuple[float, float]:
        references = [reference] * len(answers)
        value = as_number(call(answer, answers, references), "what your function returns")
        return value, evaluation.score_tickets(answers, references)["exact_match"]

    value, truth = share([reference, others[0][1], others[0][1], others[0][1]])
    expect(0 <= value <= 1, "a share lies between 0 and 1: divide by the number of messages")
    expect(value > 0, "an answer that is its reference, letter by letter, does not count: compare each with its own")
    expect(value < 1, "an answer with a wrong value counts: all four values must be right")
    expect(value == truth, "the share is wrong: count the right answers, and divide by the number of all")
    value, truth = share([reference, turned])
    expect(value == truth, "another order of the fields, or another spacing, is the same ticket: compare what the JSON says")
    for name, text in others[1:]:
        value, truth = share([reference, text])
        expect(value == truth, f"an answer with {name} must count as wrong, and stop nothing")
    return "it agrees with the score of this notebook, on answers that are no JSON as well"
