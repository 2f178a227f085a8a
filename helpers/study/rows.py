"""data/study.csv: one row a run, appended so that a kill loses no finished run. Imports files, results, study.run."""

import csv
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from helpers import files, results
from helpers.errors import DataError
from helpers.profiles import ROOT
from helpers.study.run import Run

FILE = ROOT / "data" / "study.csv"
RUN_COLUMNS = tuple(field.name for field in fields(Run))
MEASURED = (
    "trainable", "bytes", "steps", "steps_to_90", "least_validation_loss", "least_at", "train_loss", "validation_loss", "validation_exact",
    "test_loss", "test_exact", "test_reworded_loss", "test_reworded_exact", "perplexity_before", "perplexity",
    "urgent_group_before", "urgent_other_before", "urgent_group", "urgent_other", "seconds",
)  # fmt: skip
COLUMNS = RUN_COLUMNS + MEASURED + ("python", *results.PACKAGES)
WORDS = {"experiment", "method", "format", "targets", "data", "python", *results.PACKAGES}  # columns that hold text
INTEGERS = {"rank", "examples", "seed", "trainable", "bytes", "steps", "steps_to_90", "least_at"}


def read_rows(path: Path = FILE, repair: bool = False) -> list[dict]:
    """The rows of a study file; an empty list if there is none. With `repair` a last line that a kill cut off is removed from the file.

    DataError for a place where no file can be, and, with the line's number, for unknown columns and for a line that does not hold what
    its columns ask for.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{str(path)!r} is a folder, or lies in none: name a CSV file in a folder that is there")
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 at byte {error.start}: take the file of the repository") from error
    whole, _, cut = text.rpartition("\n")
    if cut:
        number = text.count("\n") + 1
        if not repair:
            raise DataError(
                f"{path.name} ends within line {number}: run python -m helpers.study, which repairs it, and runs that run again"
            )
        files.write_text(path, whole + "\n" if whole else "")
        print(f"{path.name}: line {number} was cut off and is removed; its run will be run again", file=sys.stderr)
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines:
        return []
    if tuple(lines[0]) != COLUMNS:
        unknown, lacking = sorted(set(lines[0]) - set(COLUMNS)), sorted(set(COLUMNS) - set(lines[0]))
        raise DataError(
            f"{path.name} line 1 has unknown columns {unknown}, lacks {lacking}, or orders them otherwise: move the file away, or take the one of the repository"
        )
    return [read_row(path, number, line) for number, line in enumerate(lines[1:], start=2)]


def read_row(path: Path, number: int, line: Sequence[str]) -> dict:
    """One line as a row: text, integers and floats by column, None where nothing stands."""
    if len(line) != len(COLUMNS):
        raise DataError(
            f"{path.name} line {number} has {len(line)} values for {len(COLUMNS)} columns: correct or remove that line"
        )
    row = {}
    for column, value in zip(COLUMNS, line, strict=True):
        try:
            row[column] = (
                value if column in WORDS else None if value == "" else int(value) if column in INTEGERS else float(value)
            )
        except ValueError as error:
            raise DataError(
                f"{path.name} line {number}: {column} is {value!r}, not a number: correct or remove that line"
            ) from error
    return row


def as_run(row: dict) -> Run:
    return Run(**{column: row[column] for column in RUN_COLUMNS})


def append(path: Path, row: dict) -> None:
    """Add a row in one write that reaches the disk before this returns; a new file gets its header first. OutputError if the disk refuses."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writerow(COLUMNS)
    values = [row.get(column) for column in COLUMNS]
    writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
    way_out = "make room on that disk, then run the same command, which goes on"
    with files.writing(path, way_out), path.open("a", encoding="utf-8") as out:
        out.write(lines.getvalue())
        out.flush()
        os.fsync(out.fileno())
