"""What a data set holds and what would go wrong with it, counted before anything is trained. Imports prompting and records."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from helpers import prompting
from helpers.errors import DataError
from helpers.records import Dropped


@dataclass(frozen=True)
class DataReport:
    """Rows are named by their `place` ("my.csv, row 3"). Lengths are in tokens, of template, answer and end token together."""

    max_length: int
    train_lengths: tuple[int, ...]
    test_lengths: tuple[int, ...]
    dropped: tuple[Dropped, ...]  # left out when the file was read
    too_long: tuple[str, ...]  # rows that `prompting.encode` will leave out
    repeated: tuple[str, ...]  # training rows equal to an earlier one
    contradicting: tuple[str, ...]  # training rows with the prompt of an earlier one and another answer
    overlapping: tuple[str, ...]  # test rows whose prompt is in the training set

    @property
    def rows_read(self) -> int:
        return len(self.train_lengths) + len(self.test_lengths) + len(self.dropped)

    def __str__(self) -> str:
        kinds = {}
        for row in self.dropped:
            kinds.setdefault(row.kind, []).append(row.place)
        problems = [(f"left out: {kind}", places) for kind, places in kinds.items()]
        problems += [
            (f"longer than {self.max_length} tokens", self.too_long),
            ("repeat another row", self.repeated),
            ("contradict another row", self.contradicting),
            ("test prompts also in train", self.overlapping),
        ]
        kept = f"{len(self.train_lengths)} train + {len(self.test_lengths)} test + {len(self.dropped)} left out"
        lengths = sorted(self.train_lengths)
        lines = [
            f"{'rows read':<30}{self.rows_read:>6}   {kept}",
            f"{'tokens a training row':<30}{lengths[len(lengths) // 2]:>6}   median; {lengths[0]} to {lengths[-1]}",
        ]
        return "\n".join(lines + [f"{name:<30}{len(places):>6}   {_some(places)}".rstrip() for name, places in problems])


def inspect_data(train: Dataset, test: Dataset, tokenizer, max_length: int, dropped: Sequence[Dropped] = ()) -> DataReport:
    """Count what `train` and `test` (columns `prompt`, `answer`, `place`) hold; `dropped` is what `read_records` left out.

    Prompts are compared without regard to case and white space. DataError if `train` is empty.
    """
    if not len(train):
        raise DataError("the training set holds no rows: give at least one")
    seen: dict[str, set[str]] = {}
    repeated, contradicting = [], []
    for row in train:
        answers = seen.setdefault(_normal(row["prompt"]), set())
        if answers:
            (repeated if row["answer"] in answers else contradicting).append(row["place"])
        answers.add(row["answer"])
    lengths = [
        [len(prompting.encode_example(tokenizer, r["prompt"], r["answer"])["input_ids"]) for r in part] for part in (train, test)
    ]
    places = [*train["place"], *test["place"]]
    return DataReport(
        max_length=max_length,
        train_lengths=tuple(lengths[0]),
        test_lengths=tuple(lengths[1]),
        dropped=tuple(dropped),
        too_long=tuple(place for place, n in zip(places, lengths[0] + lengths[1], strict=True) if n > max_length),
        repeated=tuple(repeated),
        contradicting=tuple(contradicting),
        overlapping=tuple(row["place"] for row in test if _normal(row["prompt"]) in seen),
    )


def without_repeats(records: Dataset, dropped: list[Dropped]) -> Dataset:
    """`records` with only the first row of each prompt; the others are appended to `dropped`. Do this before a random split."""
    first: dict[str, str] = {}
    kept = []
    for i, row in enumerate(records):
        key = _normal(row["prompt"])
        if key in first:
            dropped.append(Dropped(row["place"], "repeated prompt", f"{row['place']} has the prompt of {first[key]}"))
        else:
            first[key] = row["place"]
            kept.append(i)
    return records.select(kept)


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _some(places: Sequence[str], count: int = 3) -> str:
    return "; ".join(places[:count]) + ("; ..." if len(places) > count else "")
