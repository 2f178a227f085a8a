"""Judges of the exercises of notebook 04."""

from helpers import loading, memory, prompting
from helpers.exercises import call, expect, judge
from helpers.profiles import FALCON_7B, PROFILES


def exercise_1(answer: object) -> None:
    """Three numbers: GB of 16 prompts, prompts with one shared head, prompts with 71 heads."""
    gigabytes, shared, apart = answer
    config, card = memory.known_config(FALCON_7B), memory.capacity("T4")
    prompt = 2 * config.num_hidden_layers * 64 * 2048 * 2  # keys and values of 64, 2 bytes each
    judge(gigabytes, 16 * prompt / 1e9, {prompt / 1e9: "that is one prompt's"}, 0.01, "the cache")
    free = card - memory.expected_footprint(config, rest_bytes=2)
    for name, count, size in (("one head", shared, prompt), ("71 heads", apart, 71 * prompt)):
        part = f"with {name} one of those prompts fits only in part: round down"
        expect(float(count).is_integer(), part)
        mistakes = {free // size + 1: part}
        mistakes[card // size] = "the weights are forgotten, which are on the card as well"
        judge(count, free // size, mistakes, 0.005, f"the number of prompts with {name}")


def exercise_2(answer: object) -> None:
    """A function that returns a batch with input_ids and labels, as wide as its longest row."""
    tokenizer = loading.load_tokenizer(PROFILES["tiny"])
    texts = ("Where is my kettle? On its way.", "Stop it. Done.", "Why? So it is.")
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    batch = call(answer, [{"input_ids": row} for row in rows])
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        length, ids, labels = len(row), ids.tolist(), labels.tolist()
        gap = max(map(len, rows)) - length
        expect(ids == row + [row[-1]] * gap, "the input_ids have changed: only labels need repair")
        expect(labels[length - 1] == row[-1], "an end token has no label: where does its row end?")
        expect(labels[length:] == [prompting.IGNORED] * gap, "padding must not have a label")
        expect(labels[:length] == row, "other labels have changed: keep those of the prompt")


def exercise_3(answer: object) -> None:
    """A function that returns a list of {"messages": [{"role": ..., "content": ...}, ...]}."""
    table = 'chat,role,text\na,user,"Hi, you\nall"\nb,user,New?\na,assistant,Hi!\nb,assistant,Yes\n'
    truth = [["user", "Hi, you\nall", "assistant", "Hi!"], ["user", "New?", "assistant", "Yes"]]
    chats = [record["messages"] for record in call(answer, table)]
    found = [[text for turn in chat for text in (turn["role"], turn["content"])] for chat in chats]
    whole = truth[0][1] in sum(found, [])
    expect(whole, "a text is missing, or cut at comma or line break: let csv read it whole")
    expect(len(found) == 2, "one record for each chat, whose rows need not be neighbours")
    expect(found == truth, "turns have changed: keep them as the file has them")
