"""Your own data as prompts and answers: read, checked row by row, split, and reported.

Values arrive as the file has them, and no row is lost silently. pyarrow reads Parquet and
JSON lines of text, json and csv the rest: faster readers alter 007, NA, dates and objects' keys."""

import contextlib
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Value, load_dataset
from pyarrow.json import ParseOptions, ReadOptions, read_json
from pyarrow.parquet import ParquetFile

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
USER, ASSISTANT = map(str.strip, TURNS)
ROLES = {"human": "user", "developer": "system"} | dict.fromkeys(("gpt", "chatgpt"), "assistant")
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
TURN = re.compile(r"(?:^|\n|###)[ \t]*(Human|User|Assistant)[ \t]*:", re.IGNORECASE)
# White space beyond ASCII's and characters without width, for Python's re and for pyarrow's RE2
INVISIBLE = "\x0b\x1c-\x1f\x85\xa0\xad\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000"
INVISIBLE += "\u034f\u115f\u1160\u180b-\u180f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb"
BLANK = re.compile(rf"[\s{INVISIBLE}]*")
BROKEN = re.compile("[\ud800-\udfff]")  # half a character, or a byte that is not UTF-8
SCHEMA = pa.schema([(column, pa.string()) for column in ("prompt", "answer", "place")])
# What `datasets` makes of hub JSON that its file has not; before 5.0 objects get all keys
ALTERED = r"Value\((dtype=)?'(timestamp|float)" + ("" if hasattr(datasets, "Json") else "|^{")
PLAIN = ("builtins", "datetime", "decimal", "pandas", "uuid")  # modules whose values str() writes
BATCH = 1_000  # rows
UNREADABLE = (OSError, EOFError, ImportError, UnicodeError, OverflowError, zlib.error)
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
    return {name: read_tickets(name) for name in ("train", "validation", "test", "test_reworded")}


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
    asked = [prompt_column] if isinstance(prompt_column, str) else list(prompt_column or [])
    name = Path(source := os.path.expanduser(source)).name
    tables, bad, notes = [SCHEMA.empty_table()], [], Counter()
    try:
        at, columns, read = _open(source, config, split, [*asked, answer_column])
        prompts, answer, line = _layout(name, columns, asked, answer_column)
        for batch in read([*prompts, *filter(None, [answer])], special_tokens):
            if isinstance(batch, pa.Table):  # of rows that need no closer look
                tables.append(batch)
                continue
            good = []
            for number, row in batch:
                place = f"{at} {number}"
                try:
                    pair = _pair(row, prompts, answer, special_tokens, notes)
                    good.append(pair | {"place": place})
                except DataError as error:
                    bad.append(Dropped(place, str(error)))
            if bad and dropped is None:
                advice = "correct or drop it (--drop-bad-rows, DROP_BAD_ROWS, dropped=[])"
                raise DataError(f"{': '.join(bad[0])}; {advice}")
            tables.append(pa.Table.from_pylist(good, SCHEMA))  # takes less memory than a list
    except (*UNREADABLE, pa.ArrowException) as error:
        wrong = f"{name} cannot be read ({error}): check the file, its name and its rights"
        raise DataError(wrong) from error
    table = pa.concat_tables(tables)
    if not len(table):
        kinds = Counter(row.kind for row in bad)
        most = max(bad, key=lambda row: kinds[row.kind], default=())
        first = f"; such as {': '.join(most)} ({kinds[most.kind]} of {len(bad)})" if bad else ""
        raise DataError(f"{name} holds no row that can be used{first}: give at least one")
    if dropped is not None:
        dropped += bad
    line = "; ".join([line, *(f"{count} {note}" for note, count in notes.items() if count)])
    return Dataset(table, DatasetInfo(description=line), fingerprint=os.urandom(8).hex())


def _layout(name: str, columns: Sequence[str], prompts: list[str], answer: str | None) -> tuple:
    """(prompt columns, answer column, a line about them): those given, else of a known layout."""
    if not columns:
        raise DataError(f"{name} holds no row with columns: give objects, or a header and rows")
    if twice := [column for column, count in Counter(columns).items() if column and count > 1]:
        raise DataError(f"{name} names columns twice: rename one of {twice[:3]}")
    for label, (known, known_answer) in LAYOUTS.items():  # noqa: B007
        prompt_columns, answer_column = prompts or known, answer or known_answer
        if {*prompts, prompt_columns[0], answer_column or prompt_columns[0]} <= set(columns):
            break
    else:
        missing = [column for column in (*prompts, answer) if column and column not in columns]
        wanted = " and ".join(map(repr, missing)) or "known layout"
        found = f"{name} has no {wanted} among its columns {', '.join(map(repr, columns))[:300]}"
        advice = "name its columns (--prompt-column, --answer-column; PROMPT_COLUMN, ANSWER_COLUMN)"
        advice = "save it as UTF-8" if BROKEN.search("".join(columns)) else advice
        raise DataError(f"{found}: {advice}")
    if not answer_column and prompts[1:]:
        raise DataError("several prompt columns need an answer: name it with --answer-column")
    if twice := [c for c in prompt_columns if [*prompt_columns, answer_column].count(c) > 1]:
        raise DataError(f"prompt and answer are the same column {twice[0]!r}: name each once")
    prompt_columns = [column for column in prompt_columns if column in columns]
    unused = [repr(column) for column in columns if column not in (*prompt_columns, answer_column)]
    line = ("" if prompts or answer else f"read as {label}: ") + " + ".join(prompt_columns)
    line += f" -> {answer_column}" if answer_column else ""
    line += f"; not used: {', '.join(unused)}" if unused else ""
    return prompt_columns, answer_column, line


def _pair(
    row, columns: list[str], answer_column: str | None, special: Sequence[str], notes: Counter
) -> dict[str, str]:
    """Prompt and answer of a row, both proven to be usable text; DataError says what is wrong."""
    if not isinstance(row, dict):
        raise DataError(row.split(": line")[0] if isinstance(row, str) else "a list, not an object")
    if missing := [c for c in (columns[0], answer_column) if c not in (None, *row)]:
        raise DataError(f"no column {missing[0]!r}")
    prompt, answer = row[columns[0]], row.get(answer_column)
    turns = answer if isinstance(answer, list) and isinstance(prompt, str) else ()
    roles = {str(turn.get("role")) for turn in turns if isinstance(turn, dict)}
    if roles and roles <= {"user", "assistant", "system"} and not any(map(row.get, columns[1:])):
        prompt = [{"role": "user", "content": prompt}]
    if answer_column and not isinstance(prompt, list):
        answer, *parts = (_text(row.get(column), notes) for column in (answer_column, *columns))
        prompt = "\n".join(filter(None, parts))
    else:  # a conversation, whose last turn may have a column of its own
        if any(row.get(column) not in (None, "") for column in columns[1:]):
            raise DataError(f"{columns[0]!r} is a conversation, which no other column can join")
        if answer_column and not isinstance(answer, list):
            answer = [{"role": "assistant", "content": _text(answer, notes)}]
        turns = [*prompt, *answer] if answer_column else prompt
        prompt, answer = chat_to_pair(turns, repr(columns[0]))
    notes["answers stripped at both ends"] += answer != answer.strip()
    answer = answer.strip()
    bare_prompt = prompt.strip().removeprefix(USER).removesuffix(TURNS[1])
    bare_answer = answer.removeprefix(ASSISTANT)
    if (bare_prompt, bare_answer) != (prompt.strip(), answer):
        notes[f"rows had the template's own {USER} or {ASSISTANT} removed"] += 1
        prompt, answer = bare_prompt.strip(), bare_answer.strip()
    for name, text in (("answer", answer), ("prompt", prompt)):
        if BLANK.fullmatch(text):
            raise DataError(f"the {name} is empty")
        if found := [token for token in special if token in text]:
            raise DataError(f"the {name} holds the special token {found[0]!r}")
        if BROKEN.search(text):
            raise DataError(f"the {name} is not UTF-8: save the file as that (Excel: CSV UTF-8)")
    if any(turn in f"\n{answer}" for turn in TURNS) or f"\n{prompt}".startswith(TURNS):
        raise DataError(f"{USER} or {ASSISTANT} begins the prompt, or a line of the answer")
    return {"prompt": prompt, "answer": answer}


def _text(value: object, notes: Counter) -> str:
    """A value as text, "" for none; DataError for what is no text, such as an image."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, dict | list | int | float | bytearray):
        notes["values written as JSON text"] += 1

        def written(part: object) -> str:  # JSON keeps a float as the bytes of its spelling
            return f"\ufdd0{part.decode()}" if isinstance(part, bytearray) else _text(part, notes)

        text = json.dumps(value, ensure_ascii=False, default=written)
        return re.sub('"\ufdd0(.*?)"', r"\1", text)  # a float, marked above, loses its quotes
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if type(value).__module__.split(".")[0] in PLAIN:
        return str(value)
    raise DataError(f"a value of type {type(value).__name__} is no text")


def chat_to_pair(messages: Sequence[dict] | str, name="the conversation") -> tuple[str, str]:
    """(prompt, answer) of a conversation: all but the last answer in the template, and the answer.
    Messages have "role" and "content" (OpenAI; the content may be in parts) or "from" and "value"
    (ShareGPT), or are their JSON text, or one text of Human/Assistant turns. A system message may
    stand first. DataError, with `name` as its subject, for anything else."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        found = _parse(messages.encode("utf-8", "surrogatepass"))
        if isinstance(found, str) and not TURN.search(messages):
            raise DataError(f"{name} begins as a list of messages and is {found}")
        messages = messages if isinstance(found, str) else found
    if isinstance(messages, str):
        system, *said = TURN.split(messages)  # a role, its text, the next role, ...
        if not said:
            raise DataError(f"{name} has no turns Human: and Assistant:; name the answer's column")
        said = [("system", system), *zip(said[::2], said[1::2], strict=True)]
        messages = [{"from": who, "value": text.strip()} for who, text in said if text.strip()]
    roles, texts, unread = [], [], []
    try:
        for message in messages:
            role = (message.get("role") or message["from"]).lower()
            role = ROLES.get(role, role)
            text = message.get("content") or message.get("value") or ""
            text = text if isinstance(text, str) else "\n".join(part["text"] for part in text)
            unread = [key for key in UNREAD if message.get(key)]
            if unread or (not text and role != "system"):
                raise ValueError
            roles.append(role)
            texts.append(text)
    except (AttributeError, KeyError, TypeError, ValueError):
        what = f"{unread[0]!r} (leave it out)" if unread else "no text under 'role' and 'content'"
        raise DataError(f"{name} has {what} in message {len(roles) + 1}") from None
    first = int(roles[:1] == ["system"])  # where the user begins
    if len(roles) < 2 or roles[first:] != ["user", "assistant"] * (len(roles) // 2):
        wanted = "let a user begin, turns alternate, an assistant end, or name the answer's column"
        raise DataError(f"{name} has the roles {roles[first:][:4]} to {roles[-2:]}: {wanted}")
    if any(marker in f"\n{text}" for text in texts for marker in TURNS):
        raise DataError(f"{name} holds {' or '.join(map(repr, TURNS))} inside a message")
    later = zip(itertools.cycle(TURNS[::-1]), texts[first + 1 : -1], strict=False)
    prompt = "\n".join(filter(None, texts[: first + 1]))
    return prompt + "".join(f"{turn} {text}" for turn, text in later), texts[-1]


def _open(source: str, config: str | None, split: str, asked: list) -> tuple[str, list, Callable]:
    """(how its places begin, its columns, a function of needed columns and special tokens). That
    gives batches: lists of numbered rows, each a dict or a str that says what is wrong with it, and
    tables of rows that need no closer look. `asked` are columns that may begin late."""
    if "://" in source:
        advice = "download the file and name it here, or name a hub data set as owner/name"
        raise DataError(f"{source!r} is a web address: {advice}")
    path = Path(source)
    ending, name = Path(path.name.lower().removesuffix(".gz")).suffix, path.name
    if ending not in READABLE and not os.path.exists(path):
        try:
            table = load_dataset(str(path), config, split=split)
            if table.info.builder_name == "csv":  # else it makes 7 of 007 and nothing of NA
                text = Features(dict.fromkeys(table.column_names, Value("string")))
                options = {"features": text, "keep_default_na": False}
                table = load_dataset(str(path), config, split=split, **options)
        except Exception as error:  # of the hub, the network, a format: no base class in common
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:500]
            wanted = f"no file and no hub data set {str(path)!r} (config {config}, split {split})"
            raise DataError(f"{wanted} can be read: {reason}") from error

        def rows(needed: list[str], _) -> Iterator:
            for column in needed:
                kind = str(table.features[column])
                if table.info.builder_name == "json" and re.search(ALTERED, kind):
                    wrong = f"`datasets` alters {column!r} of {str(path)!r}: it reads {kind}"
                    raise DataError(f"{wrong}; download the file and name it here")
            return _batches(enumerate(table.select_columns(needed), 1))

        return f"{path}, row", table.column_names, rows
    if not path.is_file() or ending not in READABLE:
        kind = ("is not here", "is of another kind", "is a folder")[path.exists() + path.is_dir()]
        raise DataError(f"{str(path)!r} {kind}: name a file ending in {', '.join(READABLE)}")
    file = path.open("rb")
    if file.peek(2).startswith(b"\x1f\x8b"):  # whatever its name says
        file = gzip.GzipFile(fileobj=file)
    start, is_csv = file.peek(1000)[:1000], ending in (".csv", ".tsv")
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{name} is a Git LFS pointer: fetch the file with `git lfs pull`")
    is_parquet = start.startswith(b"PAR1")
    if b"\0" in start and not is_parquet:
        raise DataError(f"{name} is UTF-16 or binary: save it as text with the encoding UTF-8")
    by_line = not is_parquet and (is_csv or _is_lines(file))
    if config or (split != "train" and (by_line or is_parquet)):
        raise DataError(f"{name} is a file without configs and splits: leave them out")
    at = f"{name}, {'line' if by_line else 'row'}"
    file.seek(0)
    if is_parquet:
        table = ParquetFile(file)
        return at, table.schema_arrow.names, lambda needed, _: _parquet(table, needed)
    if is_csv:
        rows = _csv(name, file)
        return at, next(rows, []), lambda *_: _batches(rows)
    if not by_line:
        rows = _document(name, file, split)
        return at, _columns(rows), lambda *_: _batches(enumerate(rows, 1))
    columns = _columns(map(_parse, itertools.islice(file, BATCH)))
    later = [c for k, answer in LAYOUTS.values() if {k[0], answer} <= {*columns} for c in k[1:]]
    for column in filter(None, dict.fromkeys([*later, *asked])):  # each may begin later
        file.seek(0)
        lines = (line for line in file if f'"{column}"'.encode() in line)
        if column not in columns and any(column in _columns([row]) for row in map(_parse, lines)):
            columns.append(column)
    return at, columns, lambda *needs: _lines(file, at, *needs)


def _is_lines(file: BinaryIO) -> bool:
    """Whether JSON is an object a line, of which the first may be broken, and not one value."""
    lines = list(itertools.islice(filter(bytes.strip, file), 100))
    kinds = [type(_parse(line)) for line in lines]
    if len(lines) < 2 or dict not in kinds or re.match(rb"(\xef\xbb\xbf)?\s*\[", lines[0]):
        return False
    file.seek(0)
    return kinds[0] is dict or isinstance(_parse(file.read()), str)


def _columns(rows: Iterable) -> list[str]:
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def _parquet(file: ParquetFile, needed: list[str]) -> Iterator[list]:
    tables = file.iter_batches(BATCH, columns=needed)
    return _batches(enumerate((row for table in tables for row in table.to_pylist()), 1))


def _batches(rows: Iterator) -> Iterator[list]:
    return iter(lambda: list(itertools.islice(rows, BATCH)), [])


def _lines(file: BinaryIO, at: str, needed: list[str], special: Sequence[str]) -> Iterator:
    """JSON lines in batches: a table if each is an object with a prompt and an answer that `_pair`
    would return as they are, else numbered rows."""
    texts = pa.schema([(column, pa.string()) for column in needed])
    options = ParseOptions(explicit_schema=texts, unexpected_field_behavior="ignore")
    words = map(re.escape, [*special, USER, ASSISTANT])
    odd = "|".join([*words, rf"^\s|\s$|^$|[{INVISIBLE}]"])  # what needs a closer look at each row
    file.seek(0)
    start = 1
    for block in iter(lambda: file.read(2**19) + file.readline(), b""):
        numbers = range(start, start + block.count(b"\n") + (not block.endswith(b"\n")))
        start, table = numbers.stop, ()
        with contextlib.suppress(UnicodeDecodeError, pa.ArrowInvalid):
            block.decode()
            if block[:1] == b"{" and len(needed) > 1:  # pyarrow crashes on a block of null
                reading = ReadOptions(use_threads=False, block_size=len(block))
                table = read_json(pa.BufferReader(block), reading, options)
        if len(table) == len(numbers) and table[0].null_count == table[-1].null_count == 0:
            *parts, answer = table.columns  # the parts are joined as `_pair` does
            parts = [pc.if_else(pc.equal(part, ""), None, part) for part in parts]
            prompt = pc.binary_join_element_wise(*parts, "\n", null_handling="skip")  # drops nulls
            found = [pc.match_substring_regex(column, odd) for column in (prompt, answer)]
            if len(prompt) == len(answer) and not any(pc.any(c).as_py() for c in found):
                places = [f"{at} {number}" for number in numbers]
                yield pa.table([prompt, answer, places], schema=SCHEMA)
                continue
        lines = enumerate(block.split(b"\n"), numbers.start)
        yield [(number, _parse(line)) for number, line in lines if line.strip()]


def _csv(name: str, file: BinaryIO) -> Iterator:
    """Header, then numbered rows, all as text; cut as a `sep=;` line says, or by what cuts most."""
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    head = next(filter(str.strip, text), "")
    stated = re.match('(?i)"?sep=(.)', head)
    start = head + "".join(itertools.islice(text, 20))  # a column's name may have line breaks
    names, *rows = re.split("[\r\n][\r\n ]*", re.sub('(?s)"[^"]*"', "", start))  # unquoted
    first = next(filter(None, itertools.takewhile(lambda row: '"' not in row, rows)), names)
    cuts = {m: (min(names.count(m), first.count(m)), names.count(m)) for m in "\x1f\t,;|"}
    mark = stated[1] if stated else max(cuts, key=cuts.get)  # \x1f: cuts nothing
    quoted = rf'(?m){re.escape(mark)} "[^,;|"\s][^"\n]*" *([\t,;|]|\r?$)'  # behind a space
    spaced = f"{mark} " in names or bool(re.search(quoted, start))
    text.seek(0)
    reader = csv.reader(text, delimiter=mark, skipinitialspace=spaced, strict=True)
    header = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            wrong = f"not CSV ({error}): a quote inside quotes is doubled".replace("\x1f", ",")
            if (open_quote := "end of data" in str(error)) or not header:
                wrong = "a quote is opened, never closed" if open_quote else wrong
                raise DataError(f"{name}, line {line}: {wrong}") from None
            yield line if reader.line_num == line else f"{line} to {reader.line_num}", wrong
            continue
        if fields is None:
            return
        if not any(map(str.strip, fields)) or (stated and line == 1):
            continue
        if not header:
            header = [column.strip() for column in fields]
            yield header
        elif len(fields) < len(header) or any(fields[len(header) :]):
            yield line, f"{len(fields)} fields where the header has {len(header)}"
        else:
            yield line, dict(zip(header, fields, strict=False))


def _document(name: str, file: BinaryIO, split: str) -> list:
    """The rows of one JSON value: a list of objects, the same under a key, or columns of lists."""
    rows = _parse(data) if (data := file.read()).strip() else []
    if isinstance(rows, str):
        raise DataError(f"{name} is {rows}; give objects, one a line or a list; call a table .csv")
    tables = {}
    if isinstance(rows, dict):
        keys = [tuple(column) if isinstance(column, dict) else () for column in rows.values()]
        if len({*keys}) == 1 and "".join(keys[0]).isdigit():  # pandas: columns by row number
            rows = {key: list(column.values()) for key, column in rows.items()}
        lists = {key: value for key, value in rows.items() if isinstance(value, list)}
        tables = {k: v for k, v in lists.items() if not v or isinstance(v[0], dict)}
        known = any({columns[0], answer} <= {*lists} for columns, answer in LAYOUTS.values())
        if len(set(map(len, lists.values()))) == 1 and (known or not tables):  # columns of lists
            rows = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
            tables = {}
        elif {"messages", "conversations"} & {*tables} or not tables:  # one row
            rows, tables = [rows], {}
    if split not in tables and (len(tables) > 1 or split != "train"):
        raise DataError(f"{name} has no split {split!r}: it has {str([*tables] or 'train')[:300]}")
    if len(tables) > 1:
        print(f"{name}: of the splits {list(tables)} {split!r} is read")
    if tables:  # the split that was asked for, else the only list
        rows = tables.get(split, next(iter(tables.values())))
    return [r if isinstance(r, dict | list) else "a single value, no object" for r in rows]


def _parse(data: bytes) -> dict | list | str:
    """The JSON object or list in `data`, or, as a str, why there is none."""
    try:
        value = JSON.decode(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict | list) else "a single value, no object"


def _row(pairs: list[tuple[str, object]]) -> dict:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("it names a column twice")
    return row


JSON = json.JSONDecoder(object_pairs_hook=_row, parse_float=lambda text: bytearray(text, "ascii"))


def _keys(prompts: Sequence[str]) -> pd.Series:
    """A number for each prompt, the same for prompts that differ only in case and white space."""
    return pd.Series([hash(" ".join(prompt.lower().split())) for prompt in prompts])


def _where(records: Dataset, keep: Sequence[bool]) -> Dataset:
    """The rows to keep, as a table of their own: those of `select` are slow to read."""
    table = records.with_format("arrow")[:].filter(pa.array(keep))
    return Dataset(table, records.info, fingerprint=os.urandom(8).hex())


def split_records(
    records: Dataset, seed: int = 0, least: int = 1, dropped: list[Dropped] | None = None
) -> tuple[Dataset, Dataset]:
    """(rest, held out): `seed` draws the first rows of a tenth of the different prompts, at most
    300; later rows with these prompts are left out. DataError if fewer than `least` rows rest."""
    keys = _keys(records["prompt"][:])
    firsts = keys.index[~keys.duplicated()].to_list()
    held = keys.index.isin(random.Random(seed).sample(firsts, _tenth(len(firsts))))
    rest = ~keys.isin(keys[held])
    if rest.sum() < least:
        wrong = f"{len(firsts)} different prompts leave {rest.sum()} rows to train on"
        raise DataError(f"{wrong}, and {least} are needed: give at least {_enough(least)}")
    if dropped is not None:
        repeats = _where(records, ~rest & ~held)["place"]
        dropped += [Dropped(place, "repeats a held-out prompt") for place in repeats]
    return _where(records, rest), _where(records, held)


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
    data: Dataset, dropped: Sequence[Dropped] | None = None, seed: int = 0, least: int = 1
) -> dict[str, Dataset]:
    """What `read_records` read and dropped as train (`least` rows or more), validation and test, by
    twice `split_records`; what was found in it is printed."""
    print(data.info.description)
    dropped = list(dropped or ())
    rest, test = split_records(data, seed, _enough(least), dropped)
    train, validation = split_records(rest, seed, least, dropped)
    print(inspect_data(train, test, dropped).to_string())
    return {"train": train, "validation": validation, "test": test}
