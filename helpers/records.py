"""Your own data as prompts and answers: read, checked row by row, split, and reported.

Values arrive as the file has them, and no row is lost silently. JSON lines whose two columns are
text are read by pyarrow; the rest by Python's json and csv, since the faster readers alter values
(007, NA, dates, the keys of objects)."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, load_dataset
from pyarrow.json import ParseOptions, ReadOptions, read_json
from pyarrow.parquet import read_table

from helpers.environment import ROOT
from helpers.errors import DataError
from helpers.prompting import END, TURNS

TICKETS = ROOT / "data" / "tickets"
HELDOUT = ROOT / "data" / "tiny-falcon" / "heldout.txt"  # general text
READABLE = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet")  # .gz may follow
# Known layouts: columns of the prompt (all but the first may be missing) and of the answer, which
# is None where the column holds whole conversations
LAYOUTS = {
    "prompt and answer": (["prompt"], "answer"),
    "prompt and completion": (["prompt"], "completion"),
    "Alpaca": (["instruction", "input"], "output"),
    "Dolly": (["instruction", "context"], "response"),
    "question and answer": (["question"], "answer"),
    "OpenAI chat": (["messages"], None),
    "ShareGPT": (["conversations"], None),
    "text of Human and Assistant": (["text"], None),
}
ROLES = {"human": "user", "gpt": "assistant"}
TURN = re.compile(r"(?:^|\n|###)[ \t]*(Human|User|Assistant)[ \t]*:", re.IGNORECASE)
# White space beyond ASCII's and characters without width, for Python's re and for pyarrow's RE2
INVISIBLE = "\x0b\x1c-\x1f\x85\xa0\xad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff"
BLANK = re.compile(rf"[\s{INVISIBLE}]*")
BROKEN = re.compile("[\ud800-\udfff]")  # half a character, or a byte that is not UTF-8
SCHEMA = pa.schema([(column, pa.string()) for column in ("prompt", "answer", "place")])
AS_JSON = {"ensure_ascii": False, "default": str}
BATCH = 1_000  # rows
csv.field_size_limit(2**31 - 1)
pa.set_memory_pool(pa.system_memory_pool())  # the default one keeps what growing arrays give back


class Dropped(NamedTuple):
    """A row left out: where it is ("my.csv, line 3") and what is wrong with it."""

    place: str
    kind: str


def read_tickets(split: str, answer_column: str = "ticket") -> Dataset:
    """A split of the messages (train, validation, test, test_reworded) with `ticket` or `reply`."""
    return read_records(TICKETS / f"{split}.jsonl", "message", answer_column)


def ticket_splits() -> dict[str, Dataset]:
    """All four splits of the messages, with their tickets."""
    names = ("train", "validation", "test", "test_reworded")
    return {name: read_tickets(name) for name in names}


def read_records(
    source: str | Path,
    prompt_column: str | Sequence[str] | None = None,
    answer_column: str | None = None,
    split: str = "train",
    config: str | None = None,
    dropped: list[Dropped] | None = None,
    special_tokens: Sequence[str] = (END,),
) -> Dataset:
    """`source`, a file or a hub data set, as a Dataset of `prompt`, `answer` and `place`.

    Several prompt columns are joined by line breaks; without columns a known layout is recognised.
    `info.description` says in one line what was recognised, rewritten or left unread.

    DataError for the first row that cannot be used (no text, a turn marker, one of the tokenizer's
    `special_tokens`); with a list as `dropped` such rows are appended to it instead."""
    given = [prompt_column] if isinstance(prompt_column, str) else list(prompt_column or [])
    name, bad, good, tables, notes = os.path.basename(source), [], [], [], Counter()

    def keep() -> None:
        tables.append(pa.Table.from_pylist(good, SCHEMA))  # takes less memory than a list
        good.clear()

    try:
        at, columns, read = _open(Path(os.path.expanduser(source)), config, split)
        prompts, answer, line = _layout(name, columns, given, answer_column)
        rows = read([*prompts, *filter(None, [answer])])
        for pair in _pairs(at, rows, prompts, answer, special_tokens, notes):
            if isinstance(pair, pa.Table):
                keep()
                tables.append(pair)
            elif not isinstance(pair, Dropped):
                good.append(pair)
                if len(good) == BATCH:
                    keep()
            elif dropped is not None:
                bad.append(pair)
            else:
                way_on = "correct it, or leave such rows out with --drop-bad-rows (dropped=[])"
                raise DataError(f"{': '.join(pair)}; {way_on}")
        keep()
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        wrong = f"{name} cannot be read ({error}): check the file and its rights"
        raise DataError(wrong) from error
    table = pa.concat_tables(tables)
    if not len(table):
        first = bad and f"none of the {len(bad)} rows can be used; the first: {': '.join(bad[0])}"
        raise DataError(first or f"{name} holds no rows: give at least one")
    if dropped is not None:
        dropped += bad
    line = "; ".join([line, *(f"{count} {note}" for note, count in notes.items() if count)])
    return Dataset(table, DatasetInfo(description=line), fingerprint=os.urandom(8).hex())


def _pairs(
    at: str, rows: Iterator, prompts: list[str], answer: str | None, special: Sequence[str], notes
) -> Iterator[pa.Table | dict | Dropped]:
    """Prompt, answer and place of the numbered `rows` or what is wrong with them; see `_open`."""
    words = map(re.escape, [*special, *(turn.strip() for turn in TURNS)])
    odd = "|".join([*words, rf"^\s|\s$|^$|[{INVISIBLE}]"])  # what needs a closer look at each row
    for first, several in rows:
        columns = several.columns if isinstance(several, pa.Table) else []
        found = (pc.any(pc.match_substring_regex(texts, odd)).as_py() for texts in columns)
        if len(columns) == 2 and not any(found):
            places = [f"{at} {number}" for number in range(first, first + len(several))]
            yield pa.table([*columns, places], schema=SCHEMA)
        else:
            single = several.to_pylist() if columns else [several]
            for number, row in enumerate(single, first):
                place = f"{at} {number}"
                pair = _pair(row, prompts, answer, special, notes)
                yield Dropped(place, pair) if isinstance(pair, str) else pair | {"place": place}


def _layout(name: str, columns: Sequence[str], prompts: list[str], answer: str | None) -> tuple:
    """(prompt columns, answer column, a line about them): those given, else of a known layout."""
    if not columns:
        raise DataError(f"{name} holds no row with columns: give objects, or a header and rows")
    for label, (known, known_answer) in LAYOUTS.items():  # noqa: B007
        firsts, last = prompts or known, answer or known_answer
        if {*prompts, firsts[0], last or firsts[0]} <= set(columns):
            break
    else:
        wanted = " and ".join(map(repr, [*prompts, *filter(None, [answer])])) or "known layout"
        found = f"{name} has no {wanted} among its columns {', '.join(map(repr, columns))[:300]}"
        raise DataError(f"{found}: choose with --prompt-column and --answer-column")
    if last in firsts:
        raise DataError(f"prompt and answer are the same column {last!r}: name two")
    firsts = [column for column in firsts if column in columns]
    unused = [repr(column) for column in columns if column not in (*firsts, last)]
    line = f"read as {label}: " * (not prompts and not answer)
    line += " + ".join(firsts) + f" -> {last}" * bool(last)
    return firsts, last, line + f"; not used: {', '.join(unused)}" * bool(unused)


def _pair(
    row: object, prompts: list[str], answer: str | None, special: Sequence[str], notes: Counter
) -> dict[str, str] | str:
    """Prompt and answer of a row, both proven to be usable text, or what is wrong with it."""
    if not isinstance(row, dict):
        return row.split(": line")[0] if isinstance(row, str) else "a list, not an object"
    try:
        first, last = row[prompts[0]], row[answer] if answer else None
        if answer and not isinstance(first, list):
            beside = [row[column] for column in prompts[1:] if row.get(column) not in (None, "")]
            values = ["" if value is None else value for value in (last, first, *beside)]
            notes["values written as JSON text"] += sum(not isinstance(v, str) for v in values)
            last, *parts = [v if isinstance(v, str) else json.dumps(v, **AS_JSON) for v in values]
            first = "\n".join(parts)
        else:
            ending = [{"role": "assistant", "content": last}] if answer else []
            first, last = chat_to_pair([*first, *ending] if answer else first)
    except KeyError as column:
        return f"no column {column}"
    except DataError as error:
        return f"{prompts[0]!r} {error}"
    if last != (last := last.strip()):
        notes["answers stripped at both ends"] += 1
    for name, text in (("answer", last), ("prompt", first)):
        if BLANK.fullmatch(text):
            return f"the {name} is empty"
        if found := [token for token in special if token in text]:
            return f"the {name} holds the special token {found[0]!r}"
        if not text.isascii() and BROKEN.search(text):
            return f"the {name} is not UTF-8"
    if any(turn in f"\n{last}" for turn in TURNS) or f"\n{first}".startswith(TURNS):
        markers = " or ".join(turn.strip() for turn in TURNS)
        return f"{markers} begins the prompt, or a line of the answer"
    return {"prompt": first, "answer": last}


def chat_to_pair(messages: Sequence[dict] | str) -> tuple[str, str]:
    """(prompt, answer) of a conversation: all but the last answer in the template, and the answer.

    Messages have "role" and "content" (OpenAI; the content may be in parts) or "from" and "value"
    (ShareGPT), or are their JSON text, or one text of Human/Assistant turns. A system message may
    stand first. DataError, a sentence without a subject, for anything else."""
    turns = []
    try:
        if isinstance(messages, str) and messages.lstrip().startswith("["):
            messages = json.loads(messages)
        elif isinstance(messages, str):
            system, *said = TURN.split(messages)
            said = [("system", system), *zip(said[::2], said[1::2], strict=True)]
            messages = [{"from": who, "value": text.strip()} for who, text in said if text.strip()]
        for message in messages:
            role = (message.get("role") or message["from"]).lower()
            text = message.get("content") or message["value"]
            text = text if isinstance(text, str) else "\n".join(part["text"] for part in text)
            turns.append((ROLES.get(role, role), text))
    except (AttributeError, KeyError, TypeError, ValueError):
        number = len(turns) + 1
        raise DataError(f"has no text under 'role' and 'content' in message {number}") from None
    system = turns.pop(0)[1] + "\n" if turns and turns[0][0] == "system" else ""
    roles, texts = [role for role, _ in turns], [text for _, text in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        wanted = "let user and assistant take turns, or name the answer's column"
        raise DataError(f"has the roles {roles[:6]}: {wanted}")
    if any(marker in f"\n{text}" for text in (system, *texts) for marker in TURNS):
        raise DataError(f"holds {' or '.join(map(repr, TURNS))} inside a message")
    said = "".join(f"{TURNS[i % 2]} {text}" for i, text in enumerate(texts[:-1]))
    return system + said.removeprefix(f"{TURNS[0]} "), texts[-1]


def _open(path: Path, config: str | None, split: str) -> tuple[str, list[str], Callable]:
    """(how its places begin, its columns, a function from the needed ones to (number, row)).

    A row is a dict, or a str that says what is wrong; several are a table with the first's number.
    """
    ending, name = Path(path.name.lower().removesuffix(".gz")).suffix, path.name
    if ending not in READABLE and not os.path.exists(path):
        try:
            table = load_dataset(str(path), config, split=split)
        except Exception as error:  # of the hub, the network, a format: no base class in common
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:500]
            wanted = f"no file and no hub data set {str(path)!r} (config {config}, split {split})"
            raise DataError(f"{wanted} can be read: {reason}") from error
        return f"{path}, row", table.column_names, lambda c: enumerate(table.select_columns(c), 1)
    if not path.is_file() or ending not in READABLE:
        kind = "is a folder" if path.is_dir() else "is not here (but on the web?) or ends otherwise"
        raise DataError(f"{str(path)!r} {kind}: name a file ending in {', '.join(READABLE)}")
    with path.open("rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open  # whatever its name says
    file = opener(path, "rb")
    start = file.read(1000)
    file.seek(0)
    if start.startswith(b"PAR1"):
        table = Dataset(read_table(path), fingerprint=os.urandom(8).hex())
        return f"{name}, row", table.column_names, lambda c: enumerate(table.select_columns(c), 1)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise DataError(f"{name} is UTF-16 or binary: save it as text with the encoding UTF-8")
    is_csv = ending in (".csv", ".tsv")
    two = [] if is_csv else list(map(_parse, itertools.islice(filter(bytes.strip, file), 2)))
    by_line = len(two) == 2 and start[:1] != b"[" and dict in map(type, two)
    file.seek(0)
    if is_csv:
        rows = _csv(name, file)
    elif by_line:
        rows = enumerate(map(_parse, file), 1)
    else:
        rows = enumerate(_document(name, file, split), 1)
    head = list(itertools.islice(rows, BATCH))
    columns = list(dict.fromkeys(key for _, row in head if isinstance(row, dict) for key in row))
    at = f"{name}, {'line' if is_csv or by_line else 'row'}"
    return at, columns, lambda c: _lines(file, c) if by_line else itertools.chain(head, rows)


def _lines(file: BinaryIO, needed: list[str]) -> Iterator[tuple[int, pa.Table | dict | str]]:
    """JSON lines, 2 MB at a time: a table if each line is an object with text in these columns."""
    texts = pa.schema([(column, pa.string()) for column in needed])
    options = ParseOptions(explicit_schema=texts, unexpected_field_behavior="ignore")
    number = 1
    file.seek(0)
    while block := file.read(2**21) + file.readline():
        count = block.count(b"\n") + (not block.endswith(b"\n"))
        try:
            block.decode()
            reading = ReadOptions(use_threads=False, block_size=len(block))
            # pyarrow crashes on a block that starts with null
            rows = block[:1] == b"{" and read_json(pa.BufferReader(block), reading, options)
        except (UnicodeDecodeError, pa.ArrowInvalid):
            rows = False
        if rows and len(rows) == count and not any(column.null_count for column in rows.columns):
            yield number, rows
        else:
            lines = enumerate(block.split(b"\n"), number)
            yield from ((at, _parse(line)) for at, line in lines if line.strip())
        number += count


def _csv(name: str, file: BinaryIO) -> Iterator[tuple[int, dict | str]]:
    """Every value as text; a `sep=;` line names the separator, or what cuts the header most."""
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    head = next(filter(str.strip, text), "")
    stated = re.match('"?sep=(.)', head)
    counts = {mark: len(next(csv.reader([head], delimiter=mark))) for mark in ",;\t|"}
    mark = stated[1] if stated else max(counts, key=counts.get)
    text.seek(0)
    reader = csv.reader(text, delimiter=mark, skipinitialspace=f"{mark} " in head, strict=True)
    header = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(f"{name}, line {line}: a quote is opened, never closed") from None
            yield line, f"not CSV ({error}): a quote inside quotes is doubled"
            continue
        if fields is None:
            return
        if not any(map(str.strip, fields)) or (stated and line == 1):
            continue
        if not header:
            header = [column.strip() for column in fields]
            if twice := Counter(filter(None, header)) - Counter(set(header)):
                raise DataError(f"{name} names columns twice: rename one of {list(twice)[:3]}")
        elif len(fields) < len(header) or any(fields[len(header) :]):
            yield line, f"{len(fields)} fields where the header has {len(header)}"
        else:
            yield line, dict(zip(header, fields, strict=False))


def _document(name: str, file: BinaryIO, split: str) -> list:
    """The rows of one JSON value: a list of objects, the same under a key, or columns of lists."""
    data = file.read()
    rows = _parse(data) if data.strip() else []
    if isinstance(rows, str):
        raise DataError(f"{name} is {rows}; give a list of objects, or one object a line")
    if isinstance(rows, list):
        return rows
    chats = ("messages", "conversations")  # lists of turns, not of rows
    lists = {k: v for k, v in rows.items() if isinstance(v, list) and k not in chats}
    nested = [key for key, value in lists.items() if value and isinstance(value[0], dict)]
    if nested:
        return lists[split if split in nested else nested[0]]
    if len(set(map(len, lists.values()))) == 1:
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return [rows]


def _parse(data: bytes) -> dict | list | str:
    """The JSON object or list in `data`, or, as a str, why there is none."""
    try:
        value = DECODER.decode(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict | list) else f"a JSON {type(value).__name__}"


def _object(pairs: list[tuple[str, object]]) -> dict:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("it names a column twice")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _keys(prompts: Sequence[str]) -> pd.Series:
    """A number for each prompt, the same for prompts that differ only in case and white space."""
    return pd.Series([hash(" ".join(prompt.lower().split())) for prompt in prompts])


def split_records(
    records: Dataset, seed: int = 0, least: int = 1, dropped: list[Dropped] | None = None
) -> tuple[Dataset, Dataset]:
    """(rest, held out): `seed` draws the first rows of a tenth of the different prompts, at most
    300; later rows with these prompts are left out. DataError if fewer than `least` rows rest."""
    keys = _keys(records["prompt"][:])
    firsts = keys.index[~keys.duplicated()].to_list()
    held = sorted(random.Random(seed).sample(firsts, _tenth(len(firsts))))
    rest = keys.index[~keys.isin(keys[held])]
    if len(rest) < least:
        wrong = (
            f"{len(firsts)} different prompts leave {len(rest)} rows beside {len(held)} held out"
        )
        raise DataError(f"{wrong}, and {least} are needed: give at least {_enough(least)}")
    if dropped is not None:
        repeats = records.select(keys.index.difference(rest).difference(held))
        dropped += [Dropped(place, "repeats a held-out prompt") for place in repeats["place"]]
    return records.select(rest), records.select(held)


def _tenth(count: int) -> int:
    return min(300, max(1, count // 10))


def _enough(least: int) -> int:
    """The smallest number that leaves at least `least` when its tenth is taken away."""
    return next(count for count in itertools.count(least) if count - _tenth(count) >= least)


def inspect_data(train: Dataset, test: Dataset, dropped: Sequence[Dropped] = ()) -> pd.DataFrame:
    """How many rows of which kind there are to know of, and where the first three are."""
    keys, held = _keys(train["prompt"][:]), _keys(test["prompt"][:])
    same = pd.DataFrame({"prompt": keys, "answer": train["answer"][:]}).duplicated()
    again = keys.duplicated() & ~same
    found = {}
    for place, kind in dropped:
        found.setdefault(kind, []).append(place)
    found["repeat another row"] = train.select(keys.index[same])["place"][:]
    found["contradict another row"] = train.select(keys.index[again])["place"][:]
    found["test prompts also in train"] = test.select(held.index[held.isin(keys)])["place"][:]
    rows = [(len(places), "; ".join(places[:3])) for places in found.values()]
    return pd.DataFrame(rows, index=list(found), columns=["rows", "where"])


def own_splits(
    source: str | Path,
    prompt_column: str | Sequence[str] | None = None,
    answer_column: str | None = None,
    split: str = "train",
    config: str | None = None,
    drop_bad_rows: bool = False,
    seed: int = 0,
    least: int = 1,
    special_tokens: Sequence[str] = (END,),
) -> dict[str, Dataset]:
    """Your own data as train (`least` rows or more), validation and test, by `read_records` and
    twice `split_records`; what was found in it is printed."""
    columns, options, dropped = (prompt_column, answer_column), (split, config), []
    bad = dropped if drop_bad_rows else None
    data = read_records(source, *columns, *options, bad, special_tokens)
    print(data.info.description)
    rest, test = split_records(data, seed, _enough(least), dropped)
    train, validation = split_records(rest, seed, least, dropped)
    print(inspect_data(train, test, dropped).to_string())
    return {"train": train, "validation": validation, "test": test}
