"""From text to the tensors training sees, and back: template, completion-only labels, batches, generation. Imports errors."""

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from tqdm import tqdm

from helpers.errors import DataError, ProfileError

IGNORED = -100  # the label that cross entropy leaves out
TURNS = ("\nUser:", "\nAssistant:")  # what begins a turn in the template
END = "<|endoftext|>"  # the end token of Falcon's tokenizers, large and tiny


def build_prompt(prompt: str) -> str:
    """The one template of the series; the answer follows after a space."""
    return f"User: {prompt}\nAssistant:"


def chat_to_pair(messages: Sequence[dict]) -> tuple[str, str]:
    """(prompt, answer) of a chat: a list of {"role": ..., "content": ...} that begins with an optional system message, alternates user
    and assistant, and ends with the assistant's answer. `build_prompt` of the prompt is the whole chat in the series' template; only
    the last answer will be learned. DataError, a sentence without a subject, for anything else.
    """
    for number, message in enumerate(messages, start=1):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(f"has no text under 'role' and 'content' in message {number}: give both")
        if any(marker in message["content"] for marker in TURNS):
            raise DataError(
                f"begins a turn of the template inside message {number}: remove {' and '.join(map(repr, TURNS))} there"
            )
    system = [message["content"] + "\n" for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    roles = [message["role"] for message in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"has the roles {[m['role'] for m in messages][:6]}: alternate user and assistant, the assistant last")
    begins = dict(zip(("user", "assistant"), TURNS, strict=True))
    said = "".join(f"{begins[turn['role']]} {turn['content']}" for turn in turns[:-1])
    return "".join(system) + said.removeprefix(f"{TURNS[0]} "), turns[-1]["content"]


def encode_example(tokenizer, prompt: str, answer: str) -> dict[str, list[int]]:
    """`input_ids` of prompt, answer and end token; `labels` the same with the prompt ignored. The end token stays in the labels."""
    prompt_ids = tokenizer(build_prompt(prompt))["input_ids"]
    answer_ids = [*tokenizer(" " + answer)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}


def encode(records: Dataset, tokenizer, max_length: int) -> tuple[Dataset, int]:
    """Encode `prompt` and `answer` of every record; return (encoded, how many were left out because they exceed `max_length` tokens).

    A cut-off example would teach an answer without its end, so too-long ones are left out. DataError if none remains, and for an answer
    of no length, which would teach the model to say nothing.
    """
    for number, row in enumerate(records, start=1):
        if not row["answer"].strip():
            place = row.get("place") or f"row {number}"
            raise DataError(f"{place}: the answer is {row['answer']!r}, of no length: give an answer, or remove the row")
    encoded = [encode_example(tokenizer, row["prompt"], row["answer"]) for row in records]
    kept = [row for row in encoded if len(row["input_ids"]) <= max_length]
    if not kept:
        shortest, at = min((len(row["input_ids"]), i) for i, row in enumerate(encoded))
        place = records[at].get("place")
        raise DataError(
            f"all {len(encoded)} examples are longer than max_length={max_length} tokens (shortest: {shortest}{f', {place}' if place else ''}): raise max_length or shorten the texts"
        )
    return Dataset.from_list(kept), len(encoded) - len(kept)


def check_labels(encoded: Dataset) -> None:
    """DataError unless every encoded example has a label to learn from: one that is not IGNORED, behind the first token, which none predicts."""
    bad = [i for i, labels in enumerate(encoded["labels"]) if all(label == IGNORED for label in labels[1:])]
    if bad:
        raise DataError(
            f"every label of {len(bad)} of {len(encoded)} examples is {IGNORED}, the first of them example {bad[0]}: nothing can be learnt from them, mask the prompt only and keep the answer's labels"
        )


class Collator:
    """Right-pad a batch to its longest example. Padding is masked and carries no label; the end token's own label is untouched.

    Falcon has no padding token. The end token's id fills the gaps, which is safe only because labels and mask are made here rather
    than derived from the id.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """The batch as tensors; DataError if no label of it can be learnt, since the mean loss over no token is not a number."""
        if all(label == IGNORED for example in examples for label in example["labels"][1:]):
            raise DataError(
                f"every label of a batch of {len(examples)} examples is {IGNORED}: its loss is a mean over nothing, keep the labels of the answers"
            )
        width = max(len(example["input_ids"]) for example in examples)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([list(e[key]) + [fill] * (width - len(e[key])) for e in examples])

        mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
        return {"input_ids": padded("input_ids", self.pad_id), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def length_grouped_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """Indices of `steps` batches of `batch` examples each, batches holding examples of similar length, epoch after epoch.

    Every epoch is a fresh permutation, cut into pools of 32 batches; a pool is sorted by length and its batches are shuffled. Every
    example is seen once an epoch; the few that do not fill a last batch begin the next epoch. The order depends on the seed alone.
    """
    if batch < 1 or steps < 1:
        raise DataError(f"{steps} steps of {batch} examples cannot be put in order: give at least 1 of each")
    if batch > len(lengths):
        raise DataError(
            f"a batch of {batch} needs at least {batch} examples and there are {len(lengths)}: add data or lower the batch size"
        )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    waiting: list[int] = []
    while len(order) < batch * steps:
        waiting += torch.randperm(len(lengths), generator=generator).tolist()
        full = len(waiting) // batch * batch
        ready, waiting = waiting[:full], waiting[full:]
        for start in range(0, full, 32 * batch):
            pool = sorted(ready[start : start + 32 * batch], key=lambda i: lengths[i])
            batches = [pool[i : i + batch] for i in range(0, len(pool), batch)]
            order += [i for b in torch.randperm(len(batches), generator=generator).tolist() for i in batches[b]]
    return order[: batch * steps]


@torch.inference_mode()
def generate_ids(model, tokenizer, prompts: Sequence[str], max_new_tokens: int, **options) -> list[list[int]]:
    """The new tokens of greedy answers to one batch of prompts: up to and with the end token, or `max_new_tokens` of them without it.
    `options` go to the model's `generate`: a `streamer`, peft's `adapter_names`, or settings that replace the greedy ones.

    Prompts are padded on the *left* so that each answer begins right behind its prompt. The padding is masked, and rotary attention sees
    distances only, so it does not matter where a prompt begins. The model has to be in eval mode.
    """
    encoded = [tokenizer(build_prompt(prompt))["input_ids"] for prompt in prompts]
    width, end = max(map(len, encoded)), tokenizer.eos_token_id
    input_ids = torch.tensor([[end] * (width - len(ids)) + ids for ids in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True, "eos_token_id": end, "pad_token_id": end}
    output = model.generate(input_ids=input_ids, attention_mask=mask, **(settings | options))
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in output[:, width:].tolist()]


def generate_batch(model, tokenizer, prompts: Sequence[str], max_new_tokens: int, **options) -> list[str]:
    """Greedy answers to one batch of prompts as text, without the end token, see `generate_ids`."""
    new = generate_ids(model, tokenizer, prompts, max_new_tokens, **options)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]


def generate(model, tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int, progress: bool = True) -> list[str]:
    """Greedy answers to `prompts`, in their order, by `generate_batch` over batches of prompts of similar length.

    Puts the model into eval mode with its cache on, and back as it was. ProfileError if a batch or an answer would hold nothing.
    """
    for what, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ProfileError(f"{what} is {value!r}: give a whole number of at least 1")
    by_length = sorted(range(len(prompts)), key=lambda i: len(tokenizer(prompts[i])["input_ids"]))
    answers = [""] * len(prompts)
    was_training, used_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        batches = range(0, len(prompts), batch_size)
        for start in tqdm(
            batches, total=math.ceil(len(prompts) / batch_size), desc="generating", disable=not progress, leave=False
        ):
            rows = by_length[start : start + batch_size]
            for i, answer in zip(rows, generate_batch(model, tokenizer, [prompts[i] for i in rows], max_new_tokens), strict=True):
                answers[i] = answer
    finally:
        model.train(was_training)
        model.config.use_cache = used_cache
    return answers
