"""From text to tensors and back: template, completion-only labels, generation."""

import os
from collections.abc import Sequence

import pyarrow as pa
import torch
from datasets import Dataset
from tqdm import tqdm

from helpers.errors import DataError

IGNORED = -100  # the label that cross entropy leaves out
TURNS = ("\nUser:", "\nAssistant:")  # what begins a turn in the template
END = "<|endoftext|>"  # the end token of Falcon's tokenizers, large and tiny
ENCODED = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int64())})


def build_prompt(prompt: str) -> str:
    """The one template of the series; the answer follows after a space."""
    return f"User: {prompt}\nAssistant:"


def encode(records: Dataset, tokenizer, max_length: int, name="given") -> tuple[Dataset, list[int]]:
    """(encoded, rows left out): `input_ids` of each record's prompt, answer and end token, `labels`
    the same with the prompt ignored; rows over `max_length` tokens are named by their index.
    Without the end token a model never learns to stop, and a cut-off example would teach an answer
    without its end. DataError if none remains."""
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    backend.no_padding()  # an earlier call of the tokenizer may have left it on
    backend.no_truncation()
    tables, lengths = [], []
    for batch in records.iter(2000):
        prompts = [build_prompt(prompt) for prompt in batch["prompt"]]
        answers = [" " + answer for answer in batch["answer"]]
        prompts = backend.encode_batch_fast(prompts)  # fast: without offsets
        # the answer gets no start token, which the tokenizers of other families add
        answers = backend.encode_batch_fast(answers, add_special_tokens=False)
        pairs = [(p.ids, [*a.ids, end]) for p, a in zip(prompts, answers, strict=True)]
        lengths += [len(prompt) + len(answer) for prompt, answer in pairs]
        pairs = [pair for pair in pairs if sum(map(len, pair)) <= max_length]
        input_ids = [prompt + answer for prompt, answer in pairs]
        labels = [[IGNORED] * len(prompt) + answer for prompt, answer in pairs]
        tables.append(pa.table([input_ids, labels], schema=ENCODED))
    too_long = [i for i, length in enumerate(lengths) if length > max_length]
    if len(too_long) == len(lengths):
        wrong = f"all {len(lengths)} {name} examples are longer than max_length={max_length} tokens"
        wrong += f" (the shortest has {min(lengths, default=0)})"
        raise DataError(f"{wrong}: shorten them, take a larger profile, or another seed")
    return Dataset(pa.concat_tables(tables), fingerprint=os.urandom(8).hex()), too_long


def encode_splits(splits: dict[str, Dataset], tokenizer, max_length: int) -> tuple[dict, dict]:
    """(splits, encoded splits) without the rows that are too long, which are told."""
    splits, encoded = dict(splits), {}
    for name, rows in splits.items():
        encoded[name], too_long = encode(rows, tokenizer, max_length, name)
        if too_long:
            print(f"{name}: {len(too_long)} rows longer than {max_length} tokens are left out")
            splits[name] = rows.select(sorted(set(range(len(rows))) - set(too_long)))
    return splits, encoded


def answer_limit(encoded: Dataset) -> int:
    """How many new tokens an answer may take: the longest one to learn, end token included, and 4
    more, at most 256. A limit that is too small would score right answers 0 without a word."""
    longest = max(len(labels) - labels.count(IGNORED) for labels in encoded["labels"])
    return min(256, longest + 4)


def cut_off(tokenizer, answers: Sequence[str], limit: int) -> int:
    """How many answers took all of the `limit` tokens they were given: they may lack their end."""
    texts = [" " + answer for answer in answers]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(len(ids) >= limit for ids in encoded)


def length_grouped_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """Indices of `steps` batches of `batch` examples, those of one batch of similar length.
    Every epoch is a fresh permutation, cut into pools of 32 batches; a pool is sorted by length and
    its batches are shuffled. What does not fill a last batch begins the next epoch. The order
    depends on the seed alone, so a resumed run sees what an undisturbed one sees."""
    generator, order, waiting = torch.Generator().manual_seed(seed), [], []
    while len(order) < batch * steps:
        waiting += torch.randperm(len(lengths), generator=generator).tolist()
        full = len(waiting) // batch * batch
        ready, waiting = waiting[:full], waiting[full:]
        for start in range(0, full, 32 * batch):
            pool = sorted(ready[start : start + 32 * batch], key=lambda i: lengths[i])
            batches = torch.tensor(pool).view(-1, batch)
            order += batches[torch.randperm(len(batches), generator=generator)].flatten().tolist()
    return order[: batch * steps]


@torch.inference_mode()
def generate_ids(
    model, tokenizer, prompts: Sequence[str], max_new_tokens: int, **options
) -> list[list[int]]:
    """The new tokens of greedy answers to one batch of prompts: up to and with the end token, or
    `max_new_tokens` of them without it. `options` go to the model's `generate`.

    Prompts are padded on the *left*: an answer begins right behind its prompt. Needs eval mode."""
    texts, end = [build_prompt(prompt) for prompt in prompts], tokenizer.eos_token_id
    sides = {"padding": True, "padding_side": "left", "return_token_type_ids": False}
    batch = tokenizer(texts, return_tensors="pt", **sides).to(model.device)
    limits = {"max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": end}
    output = model.generate(**batch, **{"do_sample": False, "use_cache": True} | limits | options)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in new]


def generate_batch(
    model, tokenizer, prompts: Sequence[str], max_new_tokens: int, **options
) -> list[str]:
    """Greedy answers to one batch of prompts as text, without the end token, see `generate_ids`."""
    new = generate_ids(model, tokenizer, prompts, max_new_tokens, **options)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]


def generate(
    model, tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int, progress=True
) -> list[str]:
    """Greedy answers to `prompts`, in their order, in batches of prompts of similar length. Puts
    the model into eval mode, and back as it was."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(tokenizer(prompts[i])["input_ids"]))
    answers, was_training = [""] * len(prompts), model.training
    model.eval()
    starts = range(0, len(prompts), batch_size)
    try:
        for start in tqdm(starts, desc="generating", disable=not progress, leave=False):
            rows = by_length[start : start + batch_size]
            new = generate_batch(model, tokenizer, [prompts[i] for i in rows], max_new_tokens)
            for i, answer in zip(rows, new, strict=True):
                answers[i] = answer
    finally:
        model.train(was_training)
    return answers
