"""Small judges of one number, one tensor, one function. Each raises WrongAnswer with a hint; no hint contains the answer. Imports errors."""

import math
import numbers
from collections.abc import Callable, Iterable

import torch

from helpers.errors import TutorialError, WrongAnswer

JUDGES: dict[str, Callable[[object], str]] = {}  # "01.1" -> what judges the answer; returns what to say of a right one

# What a number that is off by a constant factor usually comes from.
FACTORS = (
    (2.0, "exactly twice or half of what it should be: is something counted twice, or only once?"),
    (8.0, "off by exactly eight: bits and bytes are mixed up somewhere"),
    (2**30 / 1e9, "off by the 7% between GiB and GB: the series counts in GB, powers of ten"),
    (2**20 / 1e6, "off by the 5% between MiB and MB: the series counts in MB, powers of ten"),
    (100.0, "off by exactly a hundred: is one of the two a percentage?"),
    (1e3, "right in its digits and wrong in its unit: look at which power of ten is asked for"),
    (1e6, "right in its digits and wrong in its unit: look at which power of ten is asked for"),
    (1e9, "right in its digits and wrong in its unit: look at which power of ten is asked for"),
)


class Open(Exception):  # noqa: N818 - a state, not an error
    """There is no answer yet: what was given, or what the reader's function returns, is `...`."""


def exercise(number: str) -> Callable:
    """Register the decorated function as the judge of an exercise."""

    def register(judge: Callable[[object], str]) -> Callable[[object], str]:
        JUDGES[number] = judge
        return judge

    return register


def expect(right: object, hint: str) -> None:
    """WrongAnswer with `hint` unless `right`."""
    if not right:
        raise WrongAnswer(hint)


def as_number(answer: object, what: str) -> float:
    """`answer` as a float; a hint if it is none."""
    if answer is ...:
        raise Open
    expect(answer is not None, f"{what} is None: there is no answer yet, or a print() where a value is wanted")
    expect(not isinstance(answer, str), f"{what} is a text: give the number itself, without quotes or unit")
    expect(not isinstance(answer, bool), f"{what} is True or False: give a number")
    if isinstance(answer, torch.Tensor) and answer.numel() == 1:
        answer = answer.item()
    expect(isinstance(answer, numbers.Real), f"{what} is of type {type(answer).__name__}: give one number")
    expect(math.isfinite(answer), f"{what} is not finite: look for a division by zero")
    return float(answer)


def as_whole_number(answer: object, what: str) -> int:
    """`answer` as an int; a hint if it has decimals."""
    value = as_number(answer, what)
    expect(value == round(value), f"{what} has decimals: give the whole number that does what is asked")
    return round(value)


def judge_number(
    answer: object,
    truth: float,
    what: str,
    mistakes: Iterable[tuple[float, str]] = (),
    rel: float = 0.01,
    nudge: str = "Go through the exercise once more, one quantity at a time.",
) -> None:
    """Whether `answer` is `truth` within a relative `rel`; else the hint of the mistake it looks like, or in which direction it is off."""
    value = as_number(answer, what)
    if math.isclose(value, truth, rel_tol=rel):
        return
    close = rel or 1e-9
    for wrong, hint in mistakes:
        expect(not math.isclose(value, wrong, rel_tol=close), hint)
    for factor, hint in FACTORS:
        for wrong in (truth * factor, truth / factor):
            expect(not math.isclose(value, wrong, rel_tol=min(close, 0.01)), f"{what} is {hint}")
    if value * truth < 0:
        raise WrongAnswer(f"{what} has the wrong sign")
    raise WrongAnswer(f"{what} is too {'large' if abs(value) > abs(truth) else 'small'}. {nudge}")


def as_tuple(answer: object, length: int, what: str) -> tuple:
    """`answer` as a tuple of `length` parts; a hint if it is something else."""
    if answer is ...:
        raise Open
    expect(isinstance(answer, tuple | list), f"give {what}, as a tuple of {length}; this is of type {type(answer).__name__}")
    expect(len(answer) == length, f"give {what}: {length} parts, and there are {len(answer)}")
    if any(part is ... for part in answer):
        raise Open
    return tuple(answer)


def as_mapping(answer: object, keys: Iterable, what: str) -> dict:
    """`answer` as a dict that has `keys`; a hint if it is something else."""
    keys = list(keys)
    expect(isinstance(answer, dict), f"give {what}, as a dict; this is of type {type(answer).__name__}")
    lacking = [key for key in keys if key not in answer]
    expect(not lacking, f"give {what}: there is nothing for {', '.join(map(str, lacking))}")
    if any(answer[key] is ... for key in keys):
        raise Open
    return {key: answer[key] for key in keys}


def judge_error(answer: object, kind: type[TutorialError], words: str, nothing: str, foreign: str, other: str) -> None:
    """Whether `answer` is a caught error of `kind` that says `words`; else why not: `nothing` was raised, a `foreign` error, or an `other`."""
    expect(
        not isinstance(answer, str), f"that is only a text: give the error itself, as `except {kind.__name__} as error` caught it"
    )
    expect(not isinstance(answer, type), "that is the class: give the error that was raised")
    expect(isinstance(answer, BaseException), f"that is a {type(answer).__name__}, so nothing went wrong: {nothing}")
    expect(isinstance(answer, TutorialError), f"that is a {type(answer).__name__} of another library: {foreign}")
    expect(isinstance(answer, kind) and words in str(answer), f"that error is about something else: {other}")


def call(function: object, *arguments: object) -> object:
    """What the reader's function returns; a hint if it is none, fails, or returns nothing."""
    expect(callable(function), f"that is a {type(function).__name__}: give the function itself, without calling it")
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]  # theirs to change
    try:
        result = function(*given)
    except Exception as error:
        raise WrongAnswer(f"your function stops with {type(error).__name__}: {error}") from error
    if result is ...:
        raise Open
    expect(result is not None, "your function returns None: does it end in a return?")
    return result


def judge_tensor(
    answer: object, truth: torch.Tensor, what: str, mistakes: Iterable[tuple[torch.Tensor, str]] = (), tolerance: float = 1e-4
) -> None:
    """Whether `answer` has the shape and the values of `truth`; else the hint of the mistake that it looks like."""
    expect(isinstance(answer, torch.Tensor), f"{what} is of type {type(answer).__name__}: give a tensor")
    if answer.shape != truth.shape and truth.dim() == 2 and answer.T.shape == truth.shape:
        raise WrongAnswer(f"{what} is transposed: rows and columns have changed places")
    expect(
        answer.shape == truth.shape, f"{what} has shape {tuple(answer.shape)}, which does not fit: {tuple(truth.shape)} is needed"
    )
    answer, truth = answer.detach().double(), truth.detach().double()
    expect(answer.isfinite().all(), f"{what} holds values that are not finite")
    scale = truth.abs().max().clamp(min=1e-30)

    def near(other: torch.Tensor) -> bool:
        return other.shape == answer.shape and bool((answer - other.double()).abs().max() <= tolerance * scale)

    if near(truth):
        return
    for wrong, hint in mistakes:
        expect(not near(wrong.detach()), hint)
    factor = (answer * truth).sum() / truth.square().sum()
    expect(
        factor == 0 or not near(truth * factor),
        f"{what} is right up to one constant factor: which scale is missing, or there twice?",
    )
    raise WrongAnswer(f"{what} has the right shape and wrong values")
