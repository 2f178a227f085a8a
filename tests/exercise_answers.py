"""Right and wrong answers to the exercises, for tests/test_exercises.py: what a reader might give, mistakes included."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from helpers.errors import AdapterError, DataError
from helpers.prompting import Collator

FULL, QLORA = ("full", "fp32"), ("lora", "nf4+dq")
TICKET = '{"intent":"damage","product":"mug","order":"A1111","urgency":"low"}'
SPOKEN = [f'The topic is "damage". It is the mug of order A{1000 + i}.' for i in range(30)]


@dataclass(frozen=True)
class Case:
    """Answers to one exercise; `secrets` are texts that no hint may contain."""

    right: list
    wrong: list
    secrets: tuple[str, ...] = ()


def raised(error: Exception) -> Exception:
    return error


def swapped(function: Callable) -> Callable:
    """`function` with its two results in the other order."""
    return lambda *arguments: function(*arguments)[::-1]


def stack(A1, B1, s1, A2, B2, s2):
    return torch.cat([A1, A2]), torch.cat([s1 * B1, s2 * B2], dim=1)


def best_factors(M, r):
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return Vh[:r], U[:, :r] * S[:r]


def balanced_factors(M, r):
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return S[:r, None].sqrt() * Vh[:r], U[:, :r] * S[:r].sqrt()


def bits(size):
    return 4 + 8 / size + 32 / (256 * size)


def read_codes(packed):
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()


UNIFORM = torch.cat([torch.linspace(-1, 0, 8)[:-1], torch.linspace(0, 1, 9)])


def gradients(x, grad, A, B, scaling):
    x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    return scaling * (grad @ B).T @ x, scaling * grad.T @ (x @ A.T)


def collate(examples, end=0, last_column=False, everywhere=False, no_prompt=False):
    """What transformers' collator makes of the rows, with the end token's label repaired, in the right way or a wrong one."""
    batch = Collator(end)([{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in examples])
    labels, lengths = batch["labels"], batch["attention_mask"].sum(1)
    labels[labels == end] = -100
    rows = torch.arange(len(lengths))
    if everywhere:
        labels[batch["input_ids"] == end] = end
    else:
        labels[rows, torch.full_like(lengths, -1) if last_column else lengths - 1] = end
    if no_prompt:
        labels[:, :5] = -100
    return batch


def unrepaired(examples):
    batch = collate(examples)
    batch["labels"][batch["labels"] == 0] = -100
    return batch


def chats(table, key="content", by_neighbour=False, split=False):
    import csv
    import io

    if split:
        rows = [dict(zip(("chat", "role", "text"), line.split(","), strict=False)) for line in table.splitlines()[1:]]
    else:
        rows = list(csv.DictReader(io.StringIO(table)))
    found, place = {}, 0
    for i, row in enumerate(rows):
        place += by_neighbour and i > 0 and row["chat"] != rows[i - 1]["chat"]
        found.setdefault(place if by_neighbour else row["chat"], []).append({"role": row["role"], key: row["text"]})
    return [{"messages": turns} for turns in found.values()]


def exact_match(answers, references):
    def ticket(text):
        try:
            return json.loads(text)
        except ValueError:
            return None

    return sum(ticket(a) == json.loads(b) for a, b in zip(answers, references, strict=True)) / len(references)


def valid_json(answers, references):
    return sum(a.startswith("{") for a in answers) / len(answers)


def nucleus(logits, T, p):
    """Temperature and top-p without transformers: the least set of tokens that reaches the share p, rescaled."""
    values, order = (logits / T).softmax(-1).sort(descending=True)
    before = values.cumsum(-1) - values
    values = values * (before < p)
    return torch.zeros_like(logits).scatter(0, order, values / values.sum())


def not_rescaled(logits, T, p):
    kept = TopPLogitsWarper(p)(None, TemperatureLogitsWarper(T)(None, logits[None]))[0].isfinite() if p < 1 else True
    return (logits / T).softmax(-1) * kept


def paired(a, b):
    differences = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    t = {3: 4.302653, 5: 2.776445}[len(a)]
    return differences.mean().item(), t * differences.std().item() / math.sqrt(len(a))


def unpaired(a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    t = {3: 4.302653, 5: 2.776445}[len(a)]
    return (a.mean() - b.mean()).item(), t * ((a.var() + b.var()) / len(a)).sqrt().item()


def whole_gradient(gradients, tokens):
    return sum(n * g for n, g in zip(tokens, gradients, strict=True)) / sum(tokens)


by_rate = {0.0001: FULL, 0.0003: FULL, 0.001: FULL, 0.003: QLORA, 0.009: QLORA}
dtypes = torch.float32, torch.bfloat16

CASES = {
    "01.1": Case([3636, 3636.0, torch.tensor(3636)], [3635, 3635.2, 18176, 4544, 1818, 16], ("3636",)),
    "01.2": Case([8, 8.0], [4.0, 2.0, 32, 1.0, 5], ("8",)),
    "01.3": Case(
        [stack],
        [swapped(stack), lambda A1, B1, s1, A2, B2, s2: (A1, B2), lambda A1, B1, s1, A2, B2, s2: stack(A1, B1, 1, A2, B2, 1)]
        + [lambda A1, B1, s1, A2, B2, s2: stack(s1 * A1, B1, s1, s2 * A2, B2, s2), lambda *a: stack(*a[:2], a[5], *a[3:5], a[2])],
    ),
    "01.4": Case(
        [best_factors, balanced_factors],
        [swapped(best_factors), lambda M, r: tuple(f.T for f in best_factors(M, r)), lambda M, r: best_factors(M, r + 1)]
        + [lambda M, r: (torch.linalg.svd(M)[2][:r], torch.linalg.svd(M)[0][:, :r])],
    ),
    "02.1": Case([(15, 0, 7), [15, 0, 7]], [(7, -7, 0), (0, 15, 7), (15, 15, 7), (15, 0, 8), (1.0, -1.0, 0.0), (247, 7, 7)], ("15", "7")),
    "02.2": Case(
        [bits],
        [lambda B: 4 + 32 / B, lambda B: 4 + 8 / B, lambda B: bits(B) / 8, lambda B: bits(B) - 4, lambda B: "4.127", 4.127, lambda B: 4],
        ("4.254", "4.127", "4.063"),
    ),
    "02.3": Case([UNIFORM], [torch.arange(-7, 8) / 7, torch.linspace(-1, 1, 16), UNIFORM.flip(0), -UNIFORM.flip(0), UNIFORM.tolist()]),
    "02.4": Case(
        [read_codes, lambda p: read_codes(p).long()],
        [lambda p: read_codes(p).view(-1, 2).flip(1).flatten(), lambda p: (p >> 4).flatten(), lambda p: read_codes(p) / 15]
        + [lambda p: read_codes(p).view(-1, 2), lambda p: torch.stack([p.flatten() >> 4, p.flatten()], 1).flatten()],
    ),
    "03.1": Case(
        [{torch.float32: 1.0, torch.bfloat16: 0.0}],
        [dict(zip(dtypes, shares, strict=True)) for shares in ((0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (100, 0), (1.0, 0.3))] + [0.0],
    ),
    "03.2": Case([(1.90, True), (1.897, True)], [(1.90, False), (1.77, True), (15.2, True), (0.309, True), (2.42, True), (1.9, "yes")], ("1.9",)),
    "03.3": Case([(0.22, 0.16, 0.5, 0.5)], [(1e-7, 1e-7, 0, 1e-7), (0.5, 0.5, 0.22, 0.16), (0.22, 0.16, 0.5), (0.4, 0.3, 0.9, 0.9)], ("0.5",)),
    "03.4": Case(
        [gradients],
        [swapped(gradients), lambda x, g, A, B, s: gradients(x, g, A, B, 1), lambda x, g, A, B, s: gradients(x, g, A, B, s * s)]
        + [lambda x, g, A, B, s: tuple(d.T for d in gradients(x, g, A, B, s)), lambda *a: gradients(*a)[0]],
    ),
    "04.2": Case(
        [collate],
        [unrepaired, lambda e: collate(e, last_column=True), lambda e: collate(e, everywhere=True), lambda e: collate(e, no_prompt=True)]
        + [lambda e: collate(e)["labels"]],
    ),
    "04.1": Case(
        [(0.268, 655, 9)],
        [(0.0168, 655, 9), (0.25, 655, 9), (0.134, 655, 9), (19.06, 655, 9), (0.268, 894, 12), (0.268, 656, 10), (0.268, 9, 655)],
        ("0.27", "0.268", "655"),
    ),
    "04.3": Case(
        [chats],
        [lambda t: chats(t, key="text"), lambda t: chats(t, by_neighbour=True), lambda t: chats(t, split=True), lambda t: chats(t)[:1]]
        + [lambda t: [r["messages"] for r in chats(t)]],
    ),
    "05.1": Case([61_440], [122_880, 30_720, 15_360, 61_440.5, 1_000], ("61,440", "61440")),
    "05.2": Case([(SPOKEN, SPOKEN)], [([TICKET] * 30, SPOKEN), (SPOKEN, [TICKET] * 30), (SPOKEN[:20], SPOKEN), (SPOKEN[::-1], SPOKEN), (30, 30)]),
    "05.3": Case(
        [DataError("own.csv, row 2 has no column 'questoin': choose one of 'question'")],
        [DataError("own.csv does not exist"), KeyError("questoin"), DataError, "no column", [("a", "b")]],
    ),
    "05.4": Case(
        [exact_match],
        [valid_json, lambda a, b: sum(map(str.__eq__, a, b)) / len(a), lambda a, b: sum(map(str.__eq__, a, b)), lambda a, b: 0.0]
        + [lambda a, b: sum(json.loads(x) == json.loads(y) for x, y in zip(a, b, strict=True)) / len(a)],
    ),
    "06.1": Case([3e-8, 1e-6], [0.0, 0.3, -3e-8, False, True], ("e-0",)),
    "06.2": Case([{4: 0.95, 1: 0.0}], [{4: 0.95, 1: 0.95}, {4: 0.0, 1: 0.95}, {4: 95, 1: 0}, {4: 0.3, 1: 0.0}, {4: 0.95}], ("0.95",)),
    "06.3": Case(
        [AdapterError("there is no adapter 'repyl' on this model: choose of ticket, reply, __base__")],
        [ValueError("repyl"), AdapterError("'x' has no adapter_model.safetensors"), AdapterError, "repyl", ["a", "b"]],
    ),
    "06.4": Case(
        [nucleus],
        [not_rescaled, lambda z, T, p: nucleus(z, 1 / T, p), lambda z, T, p: nucleus(z, 1.0, p), lambda z, T, p: nucleus(z, T, 1.0)]
        + [lambda z, T, p: nucleus(z, T, p)[:5]],
    ),
    "07.1": Case([by_rate], [dict.fromkeys(by_rate, FULL), {r: FULL if w == QLORA else QLORA for r, w in by_rate.items()}, {0.001: FULL}, {**by_rate, 0.003: FULL}]),
    "07.2": Case([2.0, 2.001], [1.29, 1.55, 0.5, 2.58, 3.0, "2"], ("2.0", "twice")),
    "07.3": Case([28.68], [29.3517, 27.8657, 3.36, 31.0, 26.0], ("28.6", "28.7")),
    "07.4": Case(
        [paired],
        [unpaired, lambda a, b: (-paired(a, b)[0], paired(a, b)[1]), lambda a, b: (paired(a, b)[0], 2 * paired(a, b)[1])]
        + [lambda a, b: paired(a, b)[0], lambda a, b: (paired(a, b)[0], paired(a, b)[1] * math.sqrt(len(a)))],
    ),
    "08.1": Case(
        [{2: (2, 4), 3: None, 4: (1, 4), 8: (1, 2)}],
        [{2: (4, 2), 3: None, 4: (4, 1), 8: (2, 1)}, {2: (2, 4), 3: (1, 5), 4: (1, 4), 8: (1, 2)}, {2: (4, 4), 3: None, 4: (4, 4), 8: (4, 4)}]
        + [{2: (2, 4), 3: None, 4: (1, 4), 8: None}, {2: (2, 4)}],
    ),
    "08.2": Case(
        [("workspace", "context", "casts")],
        [("weights", "rest", "context"), ("casts", "context", "workspace"), ("adapter", "gradients", "optimizer"), (1.56, 0.6, 0.59)]
        + [("workspace", "context", "magic"), ("workspace", "context", "weights")],
        ("casts, context, workspace",),
    ),
    "08.3": Case([(1, 4)], [(2, 4), (1, 3), (1, 2), (4, 1), (1, 5), 1], ("4",)),
    "08.4": Case(
        [whole_gradient],
        [lambda g, n: sum(g) / len(g), lambda g, n: sum(g), lambda g, n: whole_gradient(g, n) * sum(n), lambda g, n: whole_gradient(g, n).tolist()]
        + [lambda g, n: whole_gradient(g, n) / 3],
    ),
}  # fmt: skip
