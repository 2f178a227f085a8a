"""Judges of the exercises of notebook 04. Imports judging, loading, memory, profiles and prompting."""

import csv
import io
from collections.abc import Mapping

import torch

from helpers import loading, memory, prompting
from helpers.exercises.judging import as_tuple, call, exercise, expect, judge_number
from helpers.profiles import FALCON_7B, PROFILES


@exercise("04.1")
def cache_of_falcon_7b(answer: object) -> str:
    """(GB of the cache of 16 prompts, prompts that fit beside the 4-bit weights with one key/value head, and with 71)."""
    gigabytes, one, many = as_tuple(answer, 3, "the GB of 16 prompts, the prompts with one shared head, and those with 71")
    config = memory.known_config(FALCON_7B)
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    prompt = config.num_hidden_layers * 2 * size * 2048 * 2  # keys and values, 16 bits each
    free = PROFILES["colab-t4"].gpu_bytes - memory.expected_footprint(config, rest_bytes=2)
    mistakes = [
        (prompt / 1e9, "that is the cache of one prompt: sixteen are asked for"),
        (heads * 16 * prompt / 1e9, "that is with a key and a value head for each query head: Falcon-7b shares one"),
        (16 * prompt / config.num_hidden_layers / 1e9, "that is one layer: every layer has a cache"),
        (16 * prompt / 2 / 1e9, "keys and values both count, in two bytes a number"),
    ]
    judge_number(gigabytes, 16 * prompt / 1e9, "the cache of 16 prompts", mistakes)
    all_of_it = PROFILES["colab-t4"].gpu_bytes
    counts = (("with one shared head", one, prompt), ("with a head each", many, heads * prompt))
    for name, count, each in counts:
        what = f"the number of prompts {name}"
        mistakes = [
            (all_of_it // each, f"{what} forgets the weights, which are on the card as well"),
            (free // each + 1, f"{what} is rounded up: a prompt that fits in part does not fit"),
        ]
        expect(count == int(count) if isinstance(count, int | float) else True, f"{what} is a whole number: round down")
        judge_number(count, free // each, what, mistakes, rel=0)
    return "sharing one head is what lets a small card answer many at once"


@exercise("04.2")
def repaired_collator(answer: object) -> str:
    """A collator that labels every token, the one end token of each row included, and no padding."""
    tokenizer = loading.load_tokenizer(PROFILES["tiny"])
    end = tokenizer.eos_token_id
    pairs = (("Where is my kettle?", "On its way."), ("Stop it.", "Done."), ("Where is it?", "We do not know yet."))
    rows = [prompting.encode_example(tokenizer, *pair)["input_ids"] for pair in pairs]
    batch = call(answer, [{"input_ids": list(row)} for row in rows])
    expect(
        isinstance(batch, Mapping) and {"input_ids", "labels"} <= set(batch), "return a batch, with input_ids and labels in it"
    )
    ids, labels = batch["input_ids"], batch["labels"]
    width = max(map(len, rows))
    expect(
        tuple(ids.shape) == tuple(labels.shape) == (len(rows), width),
        "the batch must stay as wide as its longest row, labels too",
    )
    filled = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    expect(torch.equal(ids, filled), "the input_ids have changed: only labels need repair")
    real = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    expect(
        (labels[~real] == prompting.IGNORED).all(), "padding has a label: only the first end token behind a row's text is real"
    )
    last = [labels[i, len(row) - 1].item() for i, row in enumerate(rows)]
    expect(end in last, "the end tokens still have no label")
    expect(
        all(label == end for label in last), "shorter rows have no label at their end token: it is not in the last column there"
    )
    expect(
        torch.equal(labels[real], ids[real]),
        "other labels have changed: the usual collator learns the prompt as well, and may go on",
    )
    return "one label a row, and the model stops: not the loss on the prompt was at fault"


TABLE = """chat,role,text
a,user,"Hello, you"
b,user,Is it new?
a,assistant,Hi!
b,assistant,"Yes, it is"
b,user,And blue?
b,assistant,Blue too.
"""


@exercise("04.3")
def chats_from_table(answer: object) -> str:
    """A function that turns a CSV text with the columns chat, role and text into records of messages, one a chat."""
    records = call(answer, TABLE)
    expect(
        isinstance(records, list),
        f"your function returns a {type(records).__name__}: return a list with one record for each chat",
    )
    truth: dict[str, list] = {}
    rows = list(csv.DictReader(io.StringIO(TABLE)))
    for row in rows:
        truth.setdefault(row["chat"], []).append({"role": row["role"], "content": row["text"]})
    expect(len(records) != len(rows), "there is a record for each message: group the rows by their chat")
    expect(len(records) >= len(truth), "some chats are lost: is the list begun anew for each?")
    expect(len(records) == len(truth), "there are more records than chats: the rows of two chats may take turns in the file")
    shaped = all(isinstance(record, dict) and isinstance(record.get("messages"), list) for record in records)
    expect(shaped, "a record is a dict whose one key, messages, holds the list of turns")
    turns = [turn for record in records for turn in record["messages"]]
    named = all(isinstance(turn, dict) and set(turn) == {"role", "content"} for turn in turns)
    expect(named, "a turn has the keys role and content, whatever the columns of the file are called")
    found = [record["messages"] for record in records]
    expect([len(turns) for turns in found] == [len(turns) for turns in truth.values()], "a chat has lost turns, or has another's")
    commas = [turn for turn in turns if "," in turn["content"]]
    expect(commas, "a text was cut at its comma: let the csv module read the quotes")
    expect(found == list(truth.values()), "texts, roles or their order have changed: keep the turns as they stand in the file")
    return "that is the form in which `records.read_records` takes chats"
