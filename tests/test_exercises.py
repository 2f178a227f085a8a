"""Exercises: each has a judge, right answers pass, wrong ones get a hint that helps and gives nothing away."""

import re

import pytest
import torch

from helpers import exercises
from helpers.errors import ExerciseError, WrongAnswer
from helpers.exercises import judging
from tests.exercise_answers import CASES
from tests.notebooks import NOTEBOOKS, code_cells, read, source, tags

JUNK = (None, "8", -3, True, float("nan"), [], {}, (), [None] * 3, (1, 2, 3), {4: None, 1: "x"}, torch.zeros(16), object(), int)
JUNK += (
    lambda *a: None,
    lambda *a: "text",
    lambda *a: [],
    lambda *a: (1, 2),
    lambda *a: torch.zeros(3),
    lambda *a: 1 / 0,
    lambda: 1,
)
by_exercise = pytest.mark.parametrize("number", CASES)


def hint(number: str, answer: object) -> str:
    with pytest.raises(WrongAnswer) as refused:
        exercises.check(number, answer)
    return str(refused.value)


def test_every_exercise_of_the_notebooks_has_its_judge_and_its_place_to_answer():
    posed, asked, solved = set(), set(), set()
    for path in NOTEBOOKS:
        text = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
        here = re.findall(r"^\*\*(\d+)\.\*\*", text.split("## Exercises")[1].split("## Sources")[0], re.MULTILINE)
        assert here == [str(i + 1) for i in range(len(here))] and len(here) >= 3, path.name
        posed |= {f"{path.name[:2]}.{number}" for number in here}
        for cell in code_cells(path):
            checked = re.findall(r'^ *check\("(\d\d\.\d)", ', source(cell), re.MULTILINE)
            if "solution" in tags(cell):
                number = re.match(r"# @title Solution of exercise (\d) ", source(cell)).group(1)
                assert checked == [f"{path.name[:2]}.{number}"], "a solution checks itself"
                assert cell["metadata"]["jupyter"] == {"source_hidden": True, "outputs_hidden": True}, (
                    "code and answer are folded"
                )
                solved |= set(checked)
            elif "exercise" in tags(cell):
                asked |= set(checked)
    assert posed == asked == solved == set(exercises.known()) == set(CASES)


def test_every_notebook_ends_with_something_to_build():
    for path in NOTEBOOKS:
        skeletons = [cell for cell in code_cells(path) if "exercise" in tags(cell) and "def " in source(cell)]
        assert skeletons and all("return ..." in source(cell) for cell in skeletons), path.name


@by_exercise
def test_right_answers_pass(number, capsys):
    for answer in CASES[number].right:
        exercises.check(number, answer)
        assert capsys.readouterr().out.startswith(f"✓ {number}: ")


@by_exercise
def test_wrong_answers_get_different_hints_without_the_answer(number):
    hints = [hint(number, answer) for answer in CASES[number].wrong]
    assert len(hints) >= 4 and len(set(hints)) > len(hints) // 2 >= 2, hints
    for text in hints:
        assert text.startswith(f"{number}: ") and len(text) > 30
        for secret in CASES[number].secrets:
            assert not re.search(rf"(?<![\w.]){re.escape(secret)}(?![\w])", text.removeprefix(number)), (
                f"{secret!r} is in {text!r}"
            )


@by_exercise
def test_nonsense_is_refused_with_a_hint_and_nothing_else(number):
    for junk in JUNK:
        assert "Error" not in type(hint(number, junk)).__name__


@by_exercise
def test_an_open_exercise_stops_nothing(number, capsys):
    for unfinished in (..., lambda *arguments: ...) if callable(CASES[number].right[0]) else (...,):
        exercises.check(number, unfinished)
        assert capsys.readouterr().out.startswith(f"○ {number} is open")


@pytest.mark.parametrize("number", ["01.9", "09.1", "1.1", "", 1.1, None])
def test_an_unknown_number_names_the_known_ones(number):
    with pytest.raises(ExerciseError, match=r"choose one of 01\.1, .*08\.4"):
        exercises.check(number, 1)


@pytest.mark.parametrize(
    ("answer", "word"),
    [(2, "twice or half"), (0.5, "twice or half"), (8, "bits and bytes"), (1.0737, "GiB"), (1e9, "power of ten")],
)
def test_a_constant_factor_is_recognised(answer, word):
    with pytest.raises(WrongAnswer, match=word):
        judging.judge_number(answer, 1.0, "it")


def test_a_hint_shows_in_a_notebook_as_one_line():
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell()
    with capture_output() as shown:
        shell.run_cell('from helpers.exercises import check\ncheck("01.1", 4544)')
    assert "✗ 01.1: that counts B alone" in shown.stdout and "Traceback" not in shown.stdout
