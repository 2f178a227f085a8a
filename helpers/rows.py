"""Files and hub data sets as numbered rows, before anyone asks what the rows mean. Imports errors."""

import csv
import io
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
from datasets import load_dataset

from helpers.errors import DataError

READABLE = (".jsonl", ".json", ".csv", ".parquet")
MAX_CHARACTERS = 1_000_000  # of a line or a text; no Falcon reads a hundredth of it


class BadRow(Exception):
    """What is wrong with one row: (kind, reason). `records` turns it into a DataError or into an entry of a list."""


def rows_of_file(path: Path) -> Iterator[tuple[str, dict | BadRow]]:
    """(place, row) for every row of a JSONL, JSON, CSV or Parquet file; a row that is no row is a BadRow. DataError if no rows can be told."""
    ending = path.suffix.lower()
    if not os.path.exists(path):
        raise DataError(f"there is no file {str(path)!r}: check the name and the folder you started in")
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder: name one file in it, ending in {', '.join(READABLE)}")
    if not path.is_file():
        raise DataError(f"{str(path)!r} is not an ordinary file but a pipe or device: write the data to a file first")
    if ending not in READABLE:
        raise DataError(f"{path.name} ends in {path.suffix!r}: rename or convert it to one of {', '.join(READABLE)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name} cannot be read ({error.strerror}): check its permissions") from error
    if not data:
        raise DataError(f"{path.name} is empty: give a file with at least one row")
    if ending == ".parquet":
        return _rows_of_parquet(path.name, data)
    text = _decode(path.name, data)
    if ending == ".csv":
        return _rows_of_csv(path.name, text)
    if ending == ".json" and text.lstrip().startswith("["):
        return _rows_of_json_array(path.name, text)
    return _rows_of_json_lines(text)


def _decode(name: str, data: bytes) -> str:
    """UTF-8, with or without a byte order mark. UTF-16 and binary data are told apart from other encodings for the message's sake."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} is UTF-16: save it with the encoding UTF-8")
    if (at := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, at) + 1
        raise DataError(f"{name}, line {line} holds a zero byte (byte {at}), so it is binary or UTF-16: save it as UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + 3 * data.startswith(b"\xef\xbb\xbf")  # the decoder counts from behind the mark
        line = data.count(b"\n", 0, at) + 1
        raise DataError(f"{name}, line {line} is not UTF-8 at byte {at}: save it with the encoding UTF-8") from None


def _rows_of_parquet(name: str, data: bytes) -> Iterator[tuple[str, dict]]:
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:  # pyarrow's errors share no base class below Exception
        reason = reprlib.repr(str(error).split("\n")[0])
        raise DataError(f"{name} is not a readable Parquet file: write it again ({reason})") from None
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _rows_of_csv(name: str, text: str) -> Iterator[tuple[str, dict | BadRow]]:
    """Rows by number; row 1 holds the column names. Quoting is strict: an unclosed quote would swallow the rest of the file unseen."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[str, dict | BadRow]] = []
    try:
        header = next((fields for fields in reader if fields), [])
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise DataError(f"{name}, row 1 names the column {reprlib.repr(twice)} twice: rename one of them")
        for number, fields in enumerate((fields for fields in reader if fields), start=2):
            row = dict(zip(header, fields, strict=False))
            if len(fields) != len(header):
                reason = f" has {len(fields)} fields and the header has {len(header)}: quote texts that contain commas"
                rows.append((f"row {number}", BadRow("ragged", reason)))
            else:
                rows.append((f"row {number}", row))
    except csv.Error as error:
        raise DataError(
            f"{name}, line {reader.line_num} is not valid CSV ({error}): check its quotes, or save it as JSONL"
        ) from None
    return iter(rows)


def _rows_of_json_lines(text: str) -> Iterator[tuple[str, dict | BadRow]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _parse(line)
            yield f"line {number}" if isinstance(row, BadRow) else f"row {number}", row


def _rows_of_json_array(name: str, text: str) -> Iterator[tuple[str, dict | BadRow]]:
    try:
        rows = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError, BadRow) as error:
        reason = "a column named twice" if isinstance(error, BadRow) else str(error)
        raise DataError(f"{name} is not valid JSON ({reason}): give one list of objects, or one object a line") from None
    for number, row in enumerate(rows, start=1):
        bad = None if isinstance(row, dict) else BadRow("not an object", f" is a JSON {type(row).__name__}: give an object")
        yield f"row {number}", bad or row


def _parse(line: str) -> dict | BadRow:
    """One JSON object, or what keeps the line from being one."""
    if len(line) > MAX_CHARACTERS:
        return BadRow("oversized", f" has {len(line):,} characters, more than {MAX_CHARACTERS:,}: split or remove it")
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f" is not valid JSON ({error}): each line must be one JSON object")
    except BadRow as bad:
        return bad
    if not isinstance(row, dict):
        return BadRow("not an object", f" is a JSON {type(row).__name__}: each line must be one JSON object")
    return row


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow("repeated column", " names a column twice: json would keep only the last one, so rename or remove it")
    return row


def rows_of_hub(name: str, split: str) -> Iterator[tuple[str, dict]]:
    """(place, row) for every row of a hub data set's split; DataError if it cannot be read."""
    try:
        data = load_dataset(name, split=split)
    except Exception as error:  # hub, network and format errors share no base class
        raise DataError(
            f"no file and no hub data set {name!r} (split {split!r}) could be read: check the name and the network ({error})"
        ) from error
    return ((f"row {number}", row) for number, row in enumerate(data, start=1))
