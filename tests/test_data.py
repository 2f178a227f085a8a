"""The shipped data is what its scripts and cards say it is."""

import importlib
import json
import random
import re
import sys

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tickets import build as tickets
from data.tickets import grammar
from helpers import evaluation, memory, profiles
from tests.notebooks import ROOT

DATA, TINY = ROOT / "data", ROOT / "data" / "tiny-falcon"
FILES = {split: (tickets.FOLDER / f"{split}.jsonl").read_text() for split in tickets.SIZES}
ROWS = {split: list(map(json.loads, text.splitlines())) for split, text in FILES.items()}


def script(name: str):
    """A script of data/ as a module, which finds those beside it."""
    sys.path.append(str(DATA / name.partition(".")[0]))
    return importlib.import_module(f"data.{name}")


def template(row: dict) -> str:
    """A message with its product and order id masked, in lower case."""
    ticket = json.loads(row["ticket"])
    masked = row["message"].lower().replace(ticket["order"].lower(), "<order>")
    return masked.replace(ticket["product"], "<product>")


def request_templates(rows) -> set[str]:
    """The masked sentences that name the product: what carries the intent."""
    sentences = [s.strip() for row in rows for s in re.split(r"[.!?:]", template(row))]
    return {sentence for sentence in sentences if "<product>" in sentence}


@pytest.mark.parametrize("split", tickets.SIZES)
def test_the_generator_reproduces_the_stored_bytes(split):
    assert tickets.build(split, tickets.SIZES[split]) == ROWS[split]


def test_sizes_vocabulary_and_60_wordings_of_every_intent_in_training():
    assert [len(rows) for rows in ROWS.values()] == [2400, 200, 300, 300]
    assert 7 <= len(grammar.KEY_PHRASES) <= 10 and len(grammar.PRODUCTS) >= 20
    for rows in ROWS.values():
        found = [json.loads(row["ticket"]) for row in rows]
        assert {ticket["intent"] for ticket in found} == set(grammar.KEY_PHRASES)
        for ticket, row in zip(found, rows, strict=True):
            assert ticket["product"] in grammar.PRODUCTS and ticket["urgency"] in grammar.URGENCY
            assert re.fullmatch(r"[A-Z]\d{4}", ticket["order"])
            for text in (row["message"], row["reply"]):
                assert ticket["product"] in text and ticket["order"] in text
    for intent in grammar.KEY_PHRASES:
        rows = [row for row in ROWS["train"] if json.loads(row["ticket"])["intent"] == intent]
        assert len(request_templates(rows)) >= 60


@pytest.mark.parametrize("split", ["validation", "test", "test_reworded"])
def test_no_template_is_shared_with_training(split):
    assert not {template(row) for row in ROWS["train"]} & {template(row) for row in ROWS[split]}
    assert not request_templates(ROWS["train"]) & request_templates(ROWS[split])


def test_reworded_uses_key_phrases_and_urgency_that_training_never_shows():
    text = "\n".join(template(row) for row in ROWS["train"])
    for wishes, facts in grammar.HELD_OUT_KEY_PHRASES.values():
        for phrase in (*wishes, *facts):
            assert phrase.lower().replace("{p}", "<product>") not in text
    for phrases in grammar.HELD_OUT_URGENCY.values():
        assert not [p for p in phrases if p and p.lower() in text]


def test_pretraining_dialogues_hold_no_scored_message_and_no_ticket():
    reader = script("tiny-falcon.corpus").Corpus(["a few words to draw from, " * 100])
    rng, kinds = random.Random(0), ("dialogue", "record", "codes", "text")
    drawn = [getattr(reader, kind)(rng) for kind in kinds for _ in range(500)]
    splits = ("validation", "test", "test_reworded")
    scored = {row["message"] for split in splits for row in ROWS[split]}
    assert reader.forbidden == scored
    for text in drawn:
        assert not any(f'"{key}":' in text for key in evaluation.FIELDS)
        assert text.removeprefix("User: ").split("\nAssistant:")[0] not in scored


def test_tiny_falcon_has_falcon_7bs_structure_and_copies():
    tiny, large = map(memory.known_config, ("data/tiny-falcon", profiles.FALCON_7B))
    same = "multi_query parallel_attn alibi bias new_decoder_architecture tie_word_embeddings"
    for key in (*same.split(), "model_type"):
        assert getattr(tiny, key) == getattr(large, key), key
    assert {config.hidden_size // config.num_attention_heads for config in (tiny, large)} == {64}
    curve = json.loads((TINY / "pretraining.json").read_text())["curve"]
    assert curve[-1]["copying"] >= 0.95


def test_the_card_of_the_tiny_falcon_is_what_its_script_writes(tmp_path):
    record, folder = json.loads((TINY / "pretraining.json").read_text()), tmp_path
    vocabulary = memory.known_config("data/tiny-falcon").vocab_size
    script("tiny-falcon.build").write_card(record, folder, vocabulary)
    assert (folder / "README.md").read_text() == (TINY / "README.md").read_text()
    # with the tokenizer that it saves, which has no padding token
    model, tokenizer = (a.from_pretrained(TINY) for a in (AutoModelForCausalLM, AutoTokenizer))
    found, last = script("tiny-falcon.build").reading(model.float(), tokenizer), record["curve"][-1]
    assert found == pytest.approx({name: last[name] for name in found}, abs=0.02)
    assert tokenizer.pad_token is None


def test_every_folder_of_data_is_on_its_page_with_a_licence():
    page = (DATA / "README.md").read_text(encoding="utf-8")
    for folder in (path for path in DATA.iterdir() if path.is_dir() and path.name[0] not in "_."):
        assert any(folder.glob("*.py")) or (folder / "README.md").exists(), folder.name
        assert f"| [{folder.name}/](" in page, folder.name


def test_the_hero_says_and_draws_what_readme_notebook_05_and_planner_say(tmp_path):
    hero = script("hero.build")
    scores, planned = hero.printed_scores(), hero.plans()
    described = Image.open(hero.HERO).text["Description"]
    assert described == hero.describe(scores, planned), "run `make hero`"
    assert f"![{described}](data/hero/hero.png)" in (ROOT / "README.md").read_text("utf-8")
    left, right = hero.draw(scores, planned).axes
    shares = [text.get_text() for text in left.texts]
    assert shares == re.findall(r"\d+%", left.get_title("left"))
    assert shares == [f"{share:.0%}" for share in scores["exact_match"]]
    sizes = [text.get_text() for text in right.texts if text.get_text().endswith(" GB")]
    assert sizes == [f"{plan.total / 1e9:.0f} GB" for plan in planned.values()]
    (tmp_path / "05.ipynb").write_text('{"cells": []}')
    with pytest.raises(LookupError, match=r"05.ipynb holds no table .*`make refresh ONLY=05`"):
        hero.printed_scores(tmp_path / "05.ipynb")
