"""Exercises: each has a judge, right answers pass, wrong ones get the hint of their mistake."""

import csv
import io
import json
import re
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from helpers.errors import DataError
from helpers.exercises import WrongAnswer, check
from tests.notebooks import NOTEBOOKS, code_cells, source, tags


def stack(A1, B1, s1, A2, B2, s2, power=1):
    return torch.cat([A1, A2]), torch.cat([s1**power * B1, s2**power * B2], dim=1)


def factors(M, r, power=1):
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return Vh[:r], U[:, :r] * S[:r] ** power


def bits(block_size, scale=8.125):
    return 4 + scale / block_size


def fp4(w, size=16, dtype=torch.float8_e4m3fn):
    blocks = w.view(-1, size)
    scale = (blocks.abs().amax(1, keepdim=True) / 6).to(dtype).float()
    values = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = torch.bucketize(blocks / scale, (values[:-1] + values[1:]) / 2)
    return (values[nearest] * scale).flatten()


def gradients(x, grad, A, B, scaling, s=None):
    x, grad = x.flatten(0, -2), (s or scaling) * grad.flatten(0, -2)
    return (grad @ B).T @ x, grad.T @ (x @ A.T)


def collate(rows, fill=-100, end=None):
    rows = [torch.tensor(row["input_ids"]) for row in rows]
    ids, labels = pad_sequence(rows, True, rows[0][-1].item()), pad_sequence(rows, True, fill)
    return {"input_ids": ids, "labels": labels.where(ids != rows[0][-1], end or labels)}


def chats(table, key="chat", quoting=csv.QUOTE_MINIMAL):
    found = {}
    for row in csv.DictReader(io.StringIO(table), quoting=quoting):
        found.setdefault(row[key], []).append({"role": row["role"], "content": row["text"]})
    return [{"messages": turns} for turns in found.values()]


def exact(answers, references, load=json.loads):
    valid = [answer if answer.startswith("{") else "0" for answer in answers]
    same = [load(a) == load(b) for a, b in zip(valid, references, strict=True)]
    return sum(same) / len(same)


def nucleus(logits, T, p, rescale=True, q=None):
    values, order = (logits / T).softmax(-1).sort(descending=True)
    values = values * (values.cumsum(-1) - values < (q or p))
    return torch.zeros_like(logits).scatter(0, order, values / (values.sum() if rescale else 1))


def paired(a, b, t=4.302653, pairs=True):
    a, b = torch.tensor(a), torch.tensor(b)
    variance = (a - b).var() if pairs else a.var() + b.var()
    return (a - b).mean(), t * (variance / 3).sqrt()


def gradient(gradients, tokens, divisor=200):
    return sum(n * g for n, g in zip(tokens, gradients, strict=True)) / divisor


F32, BF16 = torch.float32, torch.bfloat16
UNIFORM = torch.cat([torch.linspace(-1, 0, 8)[:-1], torch.linspace(0, 1, 9)])
SPOKEN, TICKET = [f"It is order {i}." for i in range(30)], ['{"intent": "damage"}'] * 30
FULL, QLORA = ("full", "fp32"), ("lora", "nf4+dq")
GHOST = ValueError("non-existing adapter")
RATES = {1e-4: FULL, 3e-4: FULL, 1e-3: FULL, 3e-3: QLORA, 9e-3: QLORA}
LOSERS = {rate: FULL if way == QLORA else QLORA for rate, way in RATES.items()}
SHARES = {2: (2, 4), 3: None, 4: (1, 4), 8: (1, 2)}
PARTS = ("workspace", "context", "casts")

CASES = {  # a right answer, then pairs of a wrong one and words of its hint
    "01.1": (3636, 3635, "other way", 4544, "B alone"),
    "01.2": (8, 4.0, "LoRA's own", 2.0, "root"),
    "01.3": (stack, partial(stack, power=0), "forgotten", partial(stack, power=2), "twice"),
    "01.4": (factors, partial(factors, power=0), "missing", partial(factors, power=2), "twice"),
    "02.1": ((15, 0, 7), (1.0, -1.0, 0.0), "values", (0, 15, 7), "changed places"),
    "02.2": (bits, partial(bits, scale=32), "without", partial(bits, scale=8), "almost"),
    "02.3": (UNIFORM, torch.linspace(-1, 1, 16), "steps over", -UNIFORM.flip(0), "left over"),
    "02.4": (fp4, partial(fp4, dtype=F32), "a float32", partial(fp4, size=64), "blocks of 64"),
    "03.1": ({F32: 1, BF16: 0}, {F32: 0, BF16: 1}, "changed places", {F32: 1, BF16: 1}, "passed"),
    "03.2": ((0.22, 0.16, 0.5, 0.5), (0, 0, 0, 0), "agrees", (0.5, 0.5, 0.2, 0.1), "the order"),
    "03.3": (gradients, partial(gradients, s=1), "lacks", partial(gradients, s=0.175), "a mean"),
    "04.1": ((0.268, 689, 9), (0.0168, 689, 9), "one prompt's", (0.268, 928, 9), "the weights"),
    "04.2": (collate, partial(collate, end=-100), "no label", partial(collate, fill=0), "padding"),
    "04.3": (chats, partial(chats, key="text"), "each chat", partial(chats, quoting=3), "comma"),
    "05.1": (61_440, 122_880, "whole", 30_720, "twice or half"),
    "05.2": ((SPOKEN, SPOKEN), (TICKET, SPOKEN), "was on", (SPOKEN, TICKET), "after training"),
    "05.3": (DataError("has no 'x'"), DataError("no file"), "misspelt", KeyError("x"), "caught"),
    "05.4": (exact, lambda a, b: 1.0, "wrong value", partial(exact, load=str), "spacing"),
    "06.1": ({4: 0.9, 1: 0}, {4: 0.9, 1: 0.9}, "the same", {4: 0, 1: 0.9}, "changed places"),
    "06.2": (GHOST, ValueError("adapter"), "unknown", TypeError("x"), "caught"),
    "06.3": (nucleus, partial(nucleus, rescale=0), "add up", partial(nucleus, q=1), "no effect"),
    "07.1": (RATES, dict.fromkeys(RATES, FULL), "everywhere", LOSERS, "loser"),
    "07.2": (2.0, 1.29, "error alone", 1.55, "t alone"),
    "07.3": (23.54, 24.31, "no better", 22.9, "replaced"),
    "07.4": (paired, partial(paired, t=1), "t is missing", partial(paired, pairs=False), "pairing"),
    "08.1": (SHARES, {**SHARES, 3: (1, 5)}, "even", {**SHARES, 2: (4, 2)}, "accumulation first"),
    "08.2": (PARTS, ("weights", "rest", "context"), "on one card", PARTS[::-1], "another order"),
    "08.3": (gradient, lambda g, n: sum(g) / 3, "means", partial(gradient, divisor=1), "a sum"),
}
CASES["05.4"] += lambda a, b: exact([b[0] if x == "{}" else x for x in a], b), "too large"
JUNK = [None, "x", -3, True, float("nan"), [], {}, (1, -1, None), {4: None, 1: "x"}, object(), int]
JUNK += [torch.zeros(16), lambda: 1, lambda *a: None, lambda *a: "text", lambda *a: (1, 2)]
by_exercise = pytest.mark.parametrize("number", CASES)


def hint(number, answer):
    """The hint that a wrong answer gets; it must not hold a number of the right one."""
    with pytest.raises(WrongAnswer) as refused:
        check(number, answer)
    text, right = str(refused.value), CASES[number][0]
    for part in right if isinstance(right, tuple) else (right,):
        secret = isinstance(part, int | float) and part not in (0, 1) and re.escape(f"{part:g}")
        assert not secret or not re.search(rf"(?<![\w.]){secret}(?!\w)", text.removeprefix(number))
    return text


@by_exercise
def test_a_right_answer_passes_and_an_open_exercise_stops_nothing(number, capsys):
    right = CASES[number][0]
    check(number, right)
    assert capsys.readouterr().out == f"✓ {number}: right\n"
    for unfinished in (..., (1, ...), {1: ...}, (lambda *a: ...) if callable(right) else ...):
        check(number, unfinished)
        assert capsys.readouterr().out.startswith(f"○ {number} is open")


@by_exercise
def test_a_wrong_answer_gets_the_hint_of_its_mistake_and_nonsense_gets_one(number):
    for answer, words in zip(CASES[number][1::2], CASES[number][2::2], strict=True):
        assert re.match(rf"{number}: .*{words}", hint(number, answer))
    for junk in JUNK:
        hint(number, junk)


def test_notebooks_pose_check_and_solve_the_exercises_that_have_judges():
    checked = {"exercise": set(), "solution": set()}
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            for tag in checked.keys() & set(tags(cell)):
                checked[tag] |= set(re.findall(r'^ *check\("(\d\d\.\d)", ', source(cell), re.M))
        posed = "".join(source(cell) for cell in code_cells(path) if "exercise" in tags(cell))
        assert "    return ...\n" in posed, f"nothing to build in {path.name}"
    assert checked["exercise"] == checked["solution"] == set(CASES)


def test_a_hint_shows_in_a_notebook_as_one_line():
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    with capture_output() as shown:
        InteractiveShell().run_cell(f'from {check.__module__} import check\ncheck("01.1", 4544)')
    assert "✗ 01.1: that counts B alone" in shown.stdout and "Traceback" not in shown.stdout
