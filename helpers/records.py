"""Read prompt / answer pairs from files or a hub data set, and check every row. Imports rows, prompting, profiles, errors.

Nothing is lost silently: a row that cannot be used raises a DataError that names it, or, if the caller passes a list, is appended to it.
"""

import difflib
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from helpers import prompting
from helpers.errors import DataError
from helpers.profiles import ROOT
from helpers.rows import MAX_CHARACTERS, READABLE, BadRow, rows_of_file, rows_of_hub

TICKETS = ROOT / "data" / "tickets"
CHAT_COLUMN = "messages"


@dataclass(frozen=True)
class Dropped:
    """A row that was left out: where it is ("my.csv, row 3"), what is wrong with it in a word or two, and in full."""

    place: str
    kind: str
    reason: str


def read_tickets(split: str, answer_column: str = "ticket") -> Dataset:
    """A split of the customer messages: train, validation, test or test_reworded; the answer is the JSON ticket or the `reply`."""
    return read_records(TICKETS / f"{split}.jsonl", "message", answer_column)


def read_records(
    source: str | Path,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    split: str = "train",
    dropped: list[Dropped] | None = None,
) -> Dataset:
    """`source` as a Dataset with the columns `prompt`, `answer` and `place` (file and row). A known ending is a file, else a hub data set.

    A row whose prompt column is missing but which has a list of role/content `messages`, or whose prompt column is such a list, is
    read as a chat: its last message is the answer, all before it the prompt (`prompting.chat_to_pair`).

    The first row that cannot be used raises a DataError that names file, row and way out. With a list as `dropped` such rows are
    left out and appended to it instead, so that rows kept and rows dropped add up to the rows of the file. A file that cannot be
    told into rows at all (missing, empty, a folder, not UTF-8, broken CSV or Parquet), or without one usable row, always raises.
    """
    path = Path(source)
    is_file = path.suffix.lower() in READABLE or os.path.exists(path)
    name, rows = (path.name, rows_of_file(path)) if is_file else (str(source), rows_of_hub(str(source), split))
    pairs, left_out = [], []
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            prompt, answer = _pair(row, prompt_column, answer_column)
        except BadRow as bad:
            kind, reason = bad.args
            if dropped is None:
                raise DataError(f"{name}, {place}{reason}") from None
            left_out.append(Dropped(f"{name}, {place}", kind, f"{name}, {place}{reason}"))
        else:
            pairs.append({"prompt": prompt, "answer": answer, "place": f"{name}, {place}"})
    if not pairs:
        if left_out:
            raise DataError(f"none of the {len(left_out)} rows can be used; the first: {left_out[0].reason}")
        raise DataError(f"{name} holds no rows: give a file with at least one")
    if dropped is not None:
        dropped += left_out
    return Dataset.from_list(pairs)


def split_records(records: Dataset, test_share: float = 0.1, max_test: int = 300, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(train, test) of a data set that has no test split of its own; DataError if it is too small to be split."""
    size = min(max_test, int(len(records) * test_share))
    if size < 1:
        raise DataError(
            f"{len(records)} rows are too few to hold out {test_share:.0%} for a test: give at least {round(1 / test_share)}"
        )
    parts = records.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def _pair(row: dict, prompt_column: str, answer_column: str) -> tuple[str, str]:
    """(prompt, answer) of one row, both proven to be usable text; BadRow if they are not."""
    chat = CHAT_COLUMN if prompt_column not in row and CHAT_COLUMN in row else prompt_column
    if isinstance(row.get(chat), list):
        try:
            prompt, answer = prompting.chat_to_pair(row[chat])
        except DataError as error:
            raise BadRow("not a chat", f": {chat!r} {error}") from None
        columns = {"prompt": prompt, "answer": answer}
    else:
        for column in (prompt_column, answer_column):
            if column not in row:
                raise BadRow("missing column", f" has no column {column!r}: choose one of {_nearest(column, row)}")
        columns = {prompt_column: row[prompt_column], answer_column: row[answer_column]}
        prompt, answer = row[prompt_column], row[answer_column]
    for column, value in columns.items():
        _check_text(column, value)
    for marker in prompting.TURNS:
        if marker in answer:
            raise BadRow(
                "separator", f": the answer contains {marker!r}, which begins a turn in the template: remove it or the row"
            )
    return prompt, answer


def _check_text(column: str, value: object) -> None:
    """BadRow unless `value` is a non-empty text of reasonable length that can be encoded and holds no end token."""
    if not isinstance(value, str):
        raise BadRow("not a text", f": {column!r} is {reprlib.repr(value)}, not a text: correct or remove the row")
    if not value.strip():
        raise BadRow("empty", f": {column!r} is {reprlib.repr(value)}, not a text: correct or remove the row")
    if len(value) > MAX_CHARACTERS:
        raise BadRow(
            "oversized", f": {column!r} has {len(value):,} characters, more than {MAX_CHARACTERS:,}: shorten or remove it"
        )
    if prompting.END in value:
        raise BadRow("separator", f": {column!r} contains the end token {prompting.END!r}: remove it, the series adds its own")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            "broken character", f": {column!r} has half a surrogate pair at character {error.start}: replace it"
        ) from None


def _nearest(column: str, row: dict) -> str:
    names = [str(name) for name in row]
    return (
        ", ".join(reprlib.repr(name) for name in (difflib.get_close_matches(column, names) or names[:8]))
        or "none, the row is empty"
    )
