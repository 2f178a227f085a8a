"""The shipped data is what its scripts and cards say it is."""

import json
import re
import sys

import pytest

from helpers import evaluation, memory, profiles, records
from tests.notebooks import ROOT

sys.path.insert(0, str(ROOT / "data"))
import build_tickets
import corpus
from grammar import HELD_OUT_KEY_PHRASES, HELD_OUT_URGENCY, KEY_PHRASES, PRODUCTS, URGENCY

ROWS = {
    split: [json.loads(line) for line in (records.TICKETS / f"{split}.jsonl").read_text().splitlines()]
    for split in build_tickets.SIZES
}


def template(row: dict, text: str | None = None) -> str:
    """A message with its product and order id masked, in lower case."""
    ticket = json.loads(row["ticket"])
    masked = (text or row["message"]).lower().replace(ticket["order"].lower(), "<order>")
    return masked.replace(ticket["product"], "<product>")


def request_templates(rows) -> set[str]:
    """The masked sentences that name the product: what carries the intent."""
    return {s.strip() for row in rows for s in re.split(r"[.!?:]", template(row)) if "<product>" in s}


@pytest.mark.parametrize("split", build_tickets.SIZES)
def test_the_generator_reproduces_the_stored_bytes(split):
    rebuilt = build_tickets.build(split, build_tickets.SIZES[split])
    assert rebuilt == ROWS[split]


def test_sizes_and_vocabulary():
    assert len(ROWS["train"]) >= 2000
    assert {split: len(ROWS[split]) for split in ("validation", "test", "test_reworded")} == {
        "validation": 200,
        "test": 300,
        "test_reworded": 300,
    }
    assert 7 <= len(KEY_PHRASES) <= 10
    assert len(PRODUCTS) >= 20
    for rows in ROWS.values():
        tickets = [json.loads(row["ticket"]) for row in rows]
        assert {t["intent"] for t in tickets} == set(KEY_PHRASES)
        assert all(
            t["product"] in PRODUCTS and re.fullmatch(r"[A-Z]\d{4}", t["order"]) and t["urgency"] in URGENCY for t in tickets
        )
        assert all(t["product"] in row["message"] and t["order"] in row["message"] for t, row in zip(tickets, rows, strict=True))
        assert all(t["product"] in row["reply"] and t["order"] in row["reply"] for t, row in zip(tickets, rows, strict=True))


def test_every_intent_has_at_least_60_wordings_in_training():
    for intent in KEY_PHRASES:
        rows = [row for row in ROWS["train"] if json.loads(row["ticket"])["intent"] == intent]
        assert len(request_templates(rows)) >= 60


@pytest.mark.parametrize("split", ["validation", "test", "test_reworded"])
def test_no_template_is_shared_with_training(split):
    assert not {template(row) for row in ROWS["train"]} & {template(row) for row in ROWS[split]}
    assert not request_templates(ROWS["train"]) & request_templates(ROWS[split])


def test_reworded_uses_key_phrases_and_urgency_that_training_never_shows():
    text = "\n".join(template(row) for row in ROWS["train"])
    for wishes, facts in HELD_OUT_KEY_PHRASES.values():
        for phrase in (*wishes, *facts):
            assert phrase.lower().replace("{p}", "<product>") not in text
    for phrases in HELD_OUT_URGENCY.values():
        assert not [p for p in phrases if p and p.lower() in text]


def test_pretraining_dialogues_hold_no_scored_message_and_no_ticket():
    reader = corpus.Corpus(["a few words to draw from, " * 100])
    import random

    rng = random.Random(0)
    drawn = [getattr(reader, kind)(rng) for kind in ("dialogue", "record", "codes", "text") for _ in range(500)]
    scored = {row["message"] for split in ("validation", "test", "test_reworded") for row in ROWS[split]}
    assert reader.forbidden == scored
    assert not [text for text in drawn if any(f'"{key}":' in text for key in evaluation.FIELDS)]
    assert not [text for text in drawn if text.startswith("User: ") and text[6:].split("\nAssistant:")[0] in scored]


def test_tiny_falcon_has_falcon_7bs_structure():
    tiny, large = memory.known_config("data/tiny-falcon"), memory.known_config(profiles.FALCON_7B)
    for key in ("multi_query", "parallel_attn", "alibi", "bias", "new_decoder_architecture", "tie_word_embeddings", "model_type"):
        assert getattr(tiny, key) == getattr(large, key), key
    assert tiny.hidden_size % 64 == 0
    assert tiny.hidden_size // tiny.num_attention_heads == large.hidden_size // large.num_attention_heads == 64
    weights = ROOT / "data" / "tiny-falcon" / "model.safetensors"
    assert weights.stat().st_size <= 6e6
    assert 0.8e6 <= sum(memory.count_parameters(tiny).values()) <= 3e6


def test_tiny_falcon_copies_and_heldout_text_is_there():
    curve = json.loads((ROOT / "data" / "tiny-falcon" / "pretraining.json").read_text())["curve"]
    assert curve[-1]["copying"] >= 0.95
    assert 90_000 <= (ROOT / "data" / "heldout.txt").stat().st_size <= 130_000
