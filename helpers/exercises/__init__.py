"""Check your own answer to an exercise: `check("01.1", answer)` says that it is right, or raises a hint. Imports the lessons on demand.

Each judge computes the truth itself or tests what a right answer must do; no judge holds a copy of a printed number.
"""

from importlib import import_module

from helpers.errors import ExerciseError, WrongAnswer
from helpers.exercises.judging import JUDGES, Open

LESSONS = ("01", "02", "03", "04", "05", "06", "07", "08")


def known() -> list[str]:
    """The numbers of all exercises, in order."""
    for lesson in LESSONS:
        import_module(f"helpers.exercises.lesson_{lesson}")
    return sorted(JUDGES)


def check(number: str, answer: object) -> None:
    """Print that `answer` to exercise `number` ("01.1") is right, or, for `...`, that it is still open.

    WrongAnswer, with a hint that does not contain the answer, if it is not right. ExerciseError if there is no such exercise.
    """
    lesson = str(number)[:2]
    if lesson in LESSONS:
        import_module(f"helpers.exercises.lesson_{lesson}")
    if number not in JUDGES:
        raise ExerciseError(f"there is no exercise {number!r}: choose one of {', '.join(known())}")
    try:
        if answer is ...:
            raise Open
        praise = JUDGES[number](answer)
    except Open:
        print(f"○ {number} is open: put your answer in the place of ... and run this cell again")
        return
    except WrongAnswer as hint:
        raise WrongAnswer(f"{number}: {hint}") from None
    print(f"✓ {number}: {praise}")
