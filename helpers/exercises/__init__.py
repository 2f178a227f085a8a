"""Check your own answer to an exercise: `check("01.1", answer)`.

Exercise 1 of notebook 01 is judged by `exercise_1` in lesson_01.py, which knows the truth and the
likeliest mistakes; its docstring says what to give. No hint contains the answer.
"""

import copy
from collections.abc import Callable
from importlib import import_module, util
from numbers import Real

import numpy
import torch

from helpers.errors import TutorialError

Value = float | torch.Tensor
# What an answer that is off by a constant factor usually comes from.
FACTORS = {
    2: "is twice or half of what it should be: is something counted twice, or only once?",
    8: "is off by a factor of eight: bits and bytes are mixed up somewhere",
    2**30 / 1e9: "is off by the 7% between GiB and GB: the series counts in powers of ten",
} | dict.fromkeys((100, 1e3, 1e6, 1e9), "is right in its digits and wrong in its unit")


class WrongAnswer(TutorialError):
    """An answer that is not right yet; the message is a hint. A notebook shows it as one line."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


class StillOpen(Exception):
    """There is no answer yet: `...` stands in its place."""


def check(number: str, answer: object) -> None:
    """Print that `answer` to exercise `number` ("01.1") is right, or, for `...`, that it is open.

    WrongAnswer, with a hint, if it is not right; TutorialError if there is no such exercise.
    """
    lesson, _, place = str(number).partition(".")
    module = f"{__name__}.lesson_{lesson}"
    judges = vars(import_module(module)) if util.find_spec(module) else {}
    judge_answer = judges.get(f"exercise_{place}")
    if judge_answer is None:
        raise TutorialError(f"there is no exercise {number!r}: give notebook and number, as '05.1'")
    try:
        stop_if_open(answer)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            judge_answer(answer)
    except StillOpen:
        print(f"○ {number} is open: replace the ...")
    except WrongAnswer as hint:
        raise WrongAnswer(f"{number}: {hint}") from None
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WrongAnswer(f"{number}: give this: {judge_answer.__doc__} ({reason})") from error
    else:
        print(f"✓ {number}: right")


def stop_if_open(answer: object) -> None:
    """Raise StillOpen if `answer`, or a part of it, is `...`."""
    parts = answer.values() if isinstance(answer, dict) else answer
    if answer is ... or isinstance(answer, dict | list | tuple) and any(x is ... for x in parts):
        raise StillOpen


def expect(right: object, hint: str) -> None:
    """WrongAnswer with `hint` unless `right`."""
    if not right:
        raise WrongAnswer(hint)


def call(function: Callable, *arguments: object) -> object:
    """What the reader's function returns for copies of `arguments`; a hint if it fails."""
    expect(callable(function), "give the function itself, not what it returns")
    try:
        result = function(*copy.deepcopy(arguments))
    except Exception as error:
        frame = error.__traceback__.tb_next  # of the reader's function; None: it was not entered
        line = f" in line {frame.tb_lineno}" if frame else ""
        wrong = f"your function stops{line} with {type(error).__name__}: {error}"
        raise WrongAnswer(wrong) from error
    stop_if_open(result)
    return result


def judge(
    answer: object, truth: Value, mistakes: dict[Value, str], rel: float = 1e-4, what: str = "it"
) -> None:
    """Whether a number or a tensor is `truth`, within `rel` of the largest magnitude in it.

    WrongAnswer if not, with the hint of the one of `mistakes` (wrong value: hint) that it equals.
    TypeError for what is neither a number nor a tensor.
    """
    if isinstance(answer, bool) or not isinstance(answer, Real | torch.Tensor | numpy.ndarray):
        raise TypeError(f"{answer!r:.60} is neither a number nor a tensor")
    value, truth = torch.as_tensor(answer).detach().double().cpu(), torch.as_tensor(truth)
    shapes = tuple(value.shape), tuple(truth.shape)
    expect(shapes[0] == shapes[1], "{} has the shape {}, not {}".format(what, *shapes))

    def near(other: Value) -> bool:
        return bool((value - other).abs().max() <= rel * torch.as_tensor(other).abs().max())

    if near(truth):
        return
    for wrong, hint in mistakes.items():
        expect(not near(wrong), hint)
    expect(not value.isnan().any(), f"{what} is not a number (NaN), or holds one that is not")
    for factor, hint in FACTORS.items():
        off = near(truth * factor) or near(truth / factor)
        expect(not off or factor < 1 + 4 * rel, f"{what} {hint}")
    expect(truth.dim() == 0, f"{what} has the right shape and wrong values")
    raise WrongAnswer(f"{what} is too {'large' if value > truth else 'small'}")
