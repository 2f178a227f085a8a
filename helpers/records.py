"""Read prompt / answer pairs from JSONL, CSV or Parquet files or a hub data set, and check them. Imports errors and profiles."""

import csv
import difflib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, load_dataset

from helpers.errors import DataError
from helpers.profiles import ROOT

TICKETS = ROOT / "data" / "tickets"
READABLE = (".jsonl", ".json", ".csv", ".parquet")


def read_tickets(split: str, answer_column: str = "ticket") -> Dataset:
    """A split of the customer messages: train, validation, test or test_reworded; the answer is the JSON ticket or the `reply`."""
    return read_records(TICKETS / f"{split}.jsonl", "message", answer_column)


def read_records(
    source: str | Path, prompt_column: str = "prompt", answer_column: str = "answer", split: str = "train"
) -> Dataset:
    """`source` as a Dataset with the columns `prompt` and `answer`. A path with a known ending is a file, anything else a hub data set.

    Raises DataError, naming the file, the row and the way out, for what cannot be read: a missing or empty file, invalid JSON, a
    missing column, a value that is not text.
    """
    path = Path(source)
    if path.suffix.lower() in READABLE or path.exists():
        rows = _rows_of_file(path)
    else:
        rows = _rows_of_hub(str(source), split)
    pairs = []
    for number, row in rows:
        for column in (prompt_column, answer_column):
            if column not in row:
                raise DataError(f"{path.name}, row {number} has no column {column!r}: choose one of {_nearest(column, row)}")
            if not isinstance(row[column], str) or not row[column].strip():
                raise DataError(
                    f"{path.name}, row {number}: {column!r} is {row[column]!r}, not a text: correct or remove the row"
                )
        pairs.append({"prompt": row[prompt_column], "answer": row[answer_column]})
    if not pairs:
        raise DataError(f"{path.name} holds no rows: give a file with at least one")
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


def _rows_of_file(path: Path) -> Iterator[tuple[int, dict]]:
    if not path.exists():
        raise DataError(f"there is no file {str(path)!r}: check the name and the folder you started in")
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder: name one file in it, ending in {', '.join(READABLE)}")
    if path.suffix.lower() not in READABLE:
        raise DataError(f"{path.name} ends in {path.suffix!r}: rename or convert it to one of {', '.join(READABLE)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty: give a file with at least one row")
    if path.suffix.lower() == ".parquet":
        try:
            yield from enumerate(Dataset.from_parquet(str(path)), start=1)
        except Exception as error:  # pyarrow's and datasets' own errors share no base class
            raise DataError(f"{path.name} is not a readable Parquet file: write it again ({error})") from error
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 at byte {error.start}: save it with the encoding UTF-8") from error
    yield from _rows_of_csv(text) if path.suffix.lower() == ".csv" else _rows_of_json_lines(path.name, text)


def _rows_of_csv(text: str) -> Iterator[tuple[int, dict]]:
    yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2)  # line 1 holds the column names


def _rows_of_json_lines(name: str, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}, line {number} is not valid JSON ({error}): each line must be one JSON object") from error
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number} is a JSON {type(row).__name__}: each line must be one JSON object")
        yield number, row


def _rows_of_hub(name: str, split: str) -> Iterator[tuple[int, dict]]:
    try:
        data = load_dataset(name, split=split)
    except Exception as error:  # hub, network and format errors share no base class
        raise DataError(
            f"no file and no hub data set {name!r} (split {split!r}) could be read: check the name and the network ({error})"
        ) from error
    yield from enumerate(data, start=1)


def _nearest(column: str, row: dict) -> str:
    names = [str(name) for name in row]
    return ", ".join(repr(name) for name in (difflib.get_close_matches(column, names) or names[:8]))
