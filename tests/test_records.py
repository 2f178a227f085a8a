"""Reading data: cases, values as files have them, bad files and rows, hub data sets, splits."""

import datetime
import gzip
import json
import os
import random
import re
from decimal import Decimal
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from helpers import prompting, records, training
from helpers.errors import DataError

CASES = Path(__file__).parent / "cases" / "data"
EXPECTED = json.loads((CASES / "expected.json").read_text())
GOOD = b'{"prompt": "a", "answer": "b"}\n'
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SPECIAL = {"special_tokens": ["<|endoftext|>", ">>TITLE<<"]}


def as_line(prompt="a", answer="b", **more) -> bytes:
    return (json.dumps({"prompt": prompt, "answer": answer, **more}) + "\n").encode()


@pytest.fixture
def read(tmp_path):
    """Writes a file and reads it; options as in `read_records`."""

    def write_and_read(name: str, content: bytes | str, *columns, **options) -> Dataset:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return records.read_records(tmp_path / name, *columns, **options)

    return write_and_read


def pairs(data: Dataset) -> list[tuple[str, str]]:
    return list(zip(data["prompt"], data["answer"], strict=True))


def fails(message: str, work, *arguments, **options) -> None:
    """`work` raises a DataError of one short sentence that matches `message`."""
    with pytest.raises(DataError, match=message) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def read_or_refuse(path, dropped) -> tuple[list | None, str]:
    """(rows, what was recognised), or (None, the sentence of the DataError)."""
    try:
        data = records.read_records(path, "prompt", "answer", dropped=dropped)
        return data.to_list(), data.info.description
    except DataError as error:
        return None, str(error)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_cases_on_the_command_line(name, tmp_path, capsys, monkeypatch):
    expected, read, found = EXPECTED[name], records.read_records, []
    keep = lambda *a, **k: found.append(read(*a, **k)) or found[-1]  # noqa: E731
    monkeypatch.setattr(records, "read_records", keep)
    for case in (expected, *filter(None, [expected.get("also")])):
        command = ["--data", str(CASES / name), *case.get("options", [])]
        done = training.main([*command, *"--steps 2 --no-scoring --output".split(), str(tmp_path)])
        said = "".join(capsys.readouterr())
        assert (done == 0 and "read" or "refused") in case["expect"]
        assert case.get("says", "") in said or "or" in case["expect"]
        if case is not expected:
            assert len(found[-1]) == 59 and "the answer is empty" in said
        elif found:
            assert len(found[-1]) == (300 if "duplicates" in name else 60)
            assert all(answer == answer.strip() for answer in found[-1]["answer"])


def test_values_arrive_as_the_file_has_them(read):
    values = ["007", "NA", "None", "2024-01-31", "1.10", "true", "1e5", "null", "nan"]
    text = "prompt,answer\n" + "".join(f"{value},{value}\n" for value in values)
    assert pairs(read("d.csv", text)) == [(value, value) for value in values]
    lines = b"".join(as_line(value, value) for value in values)
    for more in (b"", as_line("x", 1)):  # with the second none of the lines is read by pyarrow
        data = read("d.jsonl", lines + more)
        assert pairs(data)[: len(values)] == [(value, value) for value in values]
    texts = ['{"a": 1}', '{"b": "2024-01-31"}', '[null, "x"]', "true", "2.50", "1e5", "[[0.10]]"]
    data = read("d.jsonl", "".join(f'{{"prompt": "a", "answer": {text}}}\n' for text in texts))
    assert data["answer"][:] == texts
    assert data.info.description.endswith("; 7 values written as JSON text")


def test_one_broken_line_among_good_ones_is_a_bad_row_with_its_number(read):
    lines, dropped = GOOD * 3000 + b'{"prompt": "a", \n' + GOOD * 3000, []
    fails("d.jsonl, line 3001: not JSON.*--drop-bad-rows", read, "d.jsonl", lines)
    data = read("d.jsonl", lines, dropped=dropped)
    assert data["place"][2999:3001] == ["d.jsonl, line 3000", "d.jsonl, line 3002"]
    assert len(read("d.json", b"{broken\n" + GOOD * 2, dropped=dropped)) == 2
    assert [row.place for row in dropped] == ["d.jsonl, line 3001", "d.json, line 1"]


def test_plain_lines_are_not_looked_at_one_by_one(read, monkeypatch):
    lines = b"".join(as_line(f"Où est {i}?", f"日本 {i}", more=[i]) for i in range(50_000))
    slow = read("d.jsonl", lines[:-1] + b" \n" + as_line(7))[:50_000]
    monkeypatch.setattr(records, "_pair", None)
    assert read("d.jsonl", lines)[:] == slow
    assert read("d.jsonl.gz", gzip.compress(lines, mtime=0))["answer"][:] == slow["answer"]


# file name, its bytes, what the sentence must say
WHOLE_FILE = [
    ("empty.jsonl", b"", "empty.jsonl holds no row"),
    ("utf16.csv", "prompt,answer\na,b\n".encode("utf-16"), "is UTF-16 or binary"),
    ("header.csv", b"prompt,answer\n", "header.csv holds no row"),
    ("quote.csv", b'prompt,answer\n"a,b\nc,d\n', "quote.csv, line 2: a quote is opened"),
    ("twice.csv", b"prompt,answer,answer\na,b,c\n", r"columns twice: rename one of \['answer'"),
    ("cut.json", b'[{"prompt": "a", ', "cut.json is not JSON.*give objects"),
    ("broken.parquet", b"PAR1" * 20, "broken.parquet cannot be read"),
    ("cut.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:30], "cut.jsonl.gz cannot be read"),
    ("sheet.xlsx", b"PK", "sheet.xlsx' is of another kind: name a file ending in .jsonl"),
    ("pointer.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS pointer"),
    ("sentiment.csv", b"text,label\nI love it,1\n", "'text' has no turns Human: and Assistant:"),
    ("columns.csv", b"ask,reply\na,b\n", "no known layout among its columns 'ask', 'reply'"),
    ("latin.csv", b"Frage;L\xf6sung\na;b\n", "known layout among its columns .*: save it as UTF-8"),
    ("unquoted.csv", b"prompt,answer\na, b, c\n", "line 2: 3 fields where the header has 2"),
    ("head.csv", b'"a"b,answer\n"a"b,c\n', "head.csv, line 1: not CSV"),
    ("two.json", b'{"en": [{"q": "a"}], "de": [{"q": "b"}]}', r"no split 'train': .*'en', 'de'\]"),
]

# the bytes of the second row, what is wrong with it
ONE_ROW = {
    "invalid JSON": (b'{"prompt": \n', "not JSON: Expecting value"),
    "deep nesting": (b'{"prompt":' + b"[" * 100_000 + b"\n", "not JSON"),
    "a list": (b"[1]\n", "a list, not an object"),
    "key twice": (b'{"prompt": "a", "prompt": "c", "answer": "b"}\n', "names a column twice"),
    "missing column": (b'{"promt": "a", "answer": "b"}\n', "no column 'prompt'"),
    "white space": (as_line(prompt=" \t\u3000"), "the prompt is empty"),
    "null prompt": (as_line(prompt=None), "the prompt is empty"),
    "zero width": (as_line(answer="\u200b\ufeff \u2060"), "the answer is empty"),
    "half a surrogate pair": (as_line("ok \ud800"), "the prompt is not UTF-8"),
    "Latin-1": (as_line("xyz").replace(b"y", b"\xe9"), "the prompt is not UTF-8"),
    "turn in the answer": (as_line(answer="b\nUser: more?"), "User: or Assistant: begins"),
    "answer begins two": (as_line(answer="Assistant: Assistant: c"), "User: or Assistant: begins"),
    "prompt of the assistant": (as_line("Assistant: c"), "User: or Assistant: begins"),
    "end token": (as_line("a<|endoftext|>"), r"prompt holds the special token '<\|endoftext\|>'"),
    "special token": (as_line(answer=">>TITLE<<b"), "answer holds the special token '>>TITLE<<'"),
    "chat and answer": (as_line(CHAT), "'prompt' has the roles .*turns alternate"),
    "user, then a chat": (as_line("a", CHAT), r"'prompt' has the roles \['user', 'user'"),
    "unknown role": (as_line([{"role": "bot", "content": "a"}]), r"has the roles \['bot'"),
    "no role": (as_line([{"content": "a"}]), "no text under 'role' and 'content' in message 1"),
    "not a number": (as_line(answer=float("nan")), "the answer is empty"),
    "image": (as_line([{"role": "user", "content": [{"type": "image_url"}]}]), "in message 1"),
    "tools": (as_line([CHAT[0], CHAT[1] | {"tool_calls": [{}]}]), "has 'tool_calls' .leave it"),
    "turn in a chat": (as_line([{"role": "user", "content": "\nUser: y"}]), "inside a message"),
}


@pytest.mark.parametrize(("name", "content", "message"), WHOLE_FILE)
def test_a_file_without_rows_raises_whatever_the_caller_allows(read, name, content, message):
    fails(message, read, name, content)
    fails(message, read, name, content, dropped=[])


@pytest.mark.parametrize(("line", "wrong"), ONE_ROW.values(), ids=ONE_ROW)
def test_a_bad_row_raises_or_is_listed(read, line, wrong):
    lines, dropped = GOOD + line + GOOD, []
    fails(f"d.jsonl, line 2: .*{wrong}.*--drop-bad-rows", read, "d.jsonl", lines, **SPECIAL)
    data = read("d.jsonl", lines, dropped=dropped, **SPECIAL)
    assert data["place"][:] == ["d.jsonl, line 1", "d.jsonl, line 3"]
    assert [row.place for row in dropped] == ["d.jsonl, line 2"]


def test_names_that_are_no_files(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    fails("is a folder: name a file", records.read_records, tmp_path / "folder.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would wait for ever
    fails("pipe.jsonl' is of another kind", records.read_records, tmp_path / "pipe.jsonl")
    for name in ("gone.csv", "~/gone.txt"):
        fails("is not here", records.read_records, name)
    for name in ("https://example.org/d.jsonl", "hf://datasets/owner/name"):
        fails(f"'{name}' is a web address: download .* as owner/name", records.read_records, name)
    fails("too long|is not here", records.read_records, "x" * 300 + ".csv")


ROWS = [{"prompt": f"p, {i}", "answer": f"a {i}"} for i in range(3)]
TEXT = 'prompt,answer\n"p, 0",a 0\n"p, 1",a 1\n"p, 2",a 2\n'
SHAPES = {
    "sep.csv": "SEP=;\nprompt;answer\np, 0;a 0\np, 1;a 1\np, 2;a 2\n",
    "crlf.csv": "\ufeff" + TEXT.replace("\n", "\r\n,\r\n\r\n"),
    "spaced.csv": TEXT.replace(",a", ", a"),
    "quoted.csv": re.sub(",(a .)", r', "\1",', TEXT).replace("er\n", 'er,"n; o; p; q"\n'),
    "marks.csv": "prompt;answer;tags, a, b, c\np, 0;a 0;1\np, 1;a 1;1\np, 2;a 2;1\n",
    "excel.csv": TEXT.replace("\n", ",,\n"),
    "key.json": json.dumps({"version": [1, 2, 3], "rows": ROWS}, indent=1),
    "splits.json": json.dumps({"test": [{"prompt": "x", "answer": "y"}], "train": ROWS}),
    "pandas.json": pd.DataFrame(ROWS).to_json(),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "lines.ndjson": "\n".join(map(json.dumps, ROWS)),
    "lines.txt": "\ufeff" + "\r\n\r\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_same_rows(read, name):
    assert pairs(read(name, SHAPES[name])) == [(row["prompt"], row["answer"]) for row in ROWS]
    assert len(read(name + ".gz", gzip.compress(SHAPES[name].encode()))) == 3


def test_one_row_and_a_broken_head(read):
    for text in ('{"rows": [\n%s\n]}', "\ufeff[\n%s\n]"):
        assert pairs(read("d.json", text % GOOD.decode())) == [("a", "b")]
    assert pairs(read("d.jsonl", b"{\n{\n" + GOOD, dropped=[])) == [("a", "b")]
    row = {"instruction": "I", "output": "b"}
    late = [row] * 1200 + [row | {"input": "C"}]
    few, many = (read("d.jsonl", "\n".join(map(json.dumps, rows))) for rows in (late[:2], late))
    assert "Alpaca: instruction -> output" in few.info.description
    assert pairs(many)[-2:] == [("I", "b"), ("I\nC", "b")]
    text = "\n".join(map(json.dumps, late)).replace("input", "source")
    assert pairs(read("d.jsonl", text, ["instruction", "source"], "output")) == pairs(many)
    jobs = '[{"role": "CEO", "content": "Ann"}]'  # no messages
    assert pairs(read("d.json", f'[{{"prompt": "a", "answer": {jobs}}}]')) == [("a", jobs)]
    fails("has no 'context' among", read, "d.jsonl", b'{"a": "context"}\n' * 2, "context")
    fails("a file without configs and splits", read, "d.jsonl", GOOD * 2, split="test")


def test_of_parquet_the_needed_columns_are_read_as_they_are_written(tmp_path):
    rows = {"prompt": [CHAT[:1]], "day": [datetime.date(2024, 1, 31)], "image": [{"x": b"\x89"}]}
    table = pa.table(rows | {"price": [Decimal("1.10")]})
    pairs_of_a_map = pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(table.append_column("unused", pairs_of_a_map), path := tmp_path / "d.parquet")
    (packed := tmp_path / "d.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        assert pairs(records.read_records(file, "day", "price")) == [("2024-01-31", "1.10")]
    fails("the answer is not UTF-8", records.read_records, path, "day", "image")
    fails("is a conversation, which", records.read_records, path, ["prompt", "day"], "price")
    pq.write_table(pa.table({"day": ["b"], "end": pa.array([2**48], pa.timestamp("ms"))}), path)
    fails("cannot be read .date value out of range", records.read_records, path, "day", "end")


def test_csv_rows_are_named_by_their_line(read):
    text, dropped = '"p\nq",a\n"two\nlines",b\nc\nd,e,f\n"g\nl" h,i\n,\nj,k\n', []
    wrong, named = "d.csv, line 5: 1 fields where the header has 2.*--drop-bad-rows", ("p\nq", "a")
    fails(wrong, read, "d.csv", text, *named)
    assert pairs(read("d.csv", text, *named, dropped=dropped)) == [("two\nlines", "b"), ("j", "k")]
    assert [row.place for row in dropped] == [f"d.csv, line {line}" for line in (5, 6, "7 to 8")]
    assert "a quote inside quotes is doubled" in dropped[2].kind
    assert pairs(read("d.csv", "text\n### Human: a, b\tc### Assistant: d\n")) == [("a, b\tc", "d")]
    fails("cannot be read", read, "\udcff.csv", TEXT)  # as names in old archives
    long = "x, y\n" * 30
    assert pairs(read("d.csv", f'prompt;answer;a, b\n"{long}";b;c\n')) == [(long, "b")]


LAYOUTS = [
    ({"instruction": "I", "input": "", "output": "b"}, "I", "Alpaca: .* . input -> output"),
    ({"instruction": "I", "context": "C", "response": "b", "x": 1}, "I\nC", "Dolly.*used: 'x'"),
    ({"id": 1, "question": "Q", "answer": "b"}, "Q", "question -> answer; not used: 'id'"),
    ({"prompt": "P", "messages": CHAT}, "a", "OpenAI chat: messages; not used: 'prompt'"),
    ({"text": "Be short.\n\nHuman: a\n\nAssistant: b"}, "Be short.\na", "Human and Assistant"),
    ({"prompt": CHAT[:1], "completion": "b"}, "a", "prompt and completion"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "a", "prompt and completion"),
    ({"instruction": "a", "input": "", "output": CHAT[1:]}, "a", "Alpaca"),
    ({"messages": [{"role": "developer", "content": ""}, *CHAT]}, "a", "OpenAI chat"),
    ({"instruction": "", "input": "C", "output": "b"}, "C", "Alpaca"),
    ({"prompt": "User: a\nAssistant:", "answer": "Assistant: b"}, "a", "1 rows .* removed"),
]


@pytest.mark.parametrize(("row", "prompt", "line"), LAYOUTS)
def test_known_layouts(read, row, prompt, line):
    data = read("d.json", json.dumps([row]))
    assert pairs(data) == [(prompt, "b")] and re.search(line, data.info.description)


def test_columns_by_name(read, tmp_path):
    rows = json.dumps([{"a": "x", "b": 7, "c": "", "d": "y"}])
    data = read("d.json", rows, ["b", "a", "c"], "d")
    assert pairs(data) == [("7\nx", "y")]
    assert data.info.description == "b + a + c -> d; 1 values written as JSON text"
    fails("has no 'e' among its columns 'a', 'b'", read, "d.json", rows, "e", "d")
    fails("the same column 'd'", read, "d.json", rows, ["a", "d"], "d")
    fails("an answer: name it", read, "d.jsonl", b'{"a": "x", "b": "y"}\n' * 2, ["a", "b"])
    Dataset.from_list([{"talk": CHAT, "n": 1}]).to_parquet(tmp_path / "d.parquet")
    data = records.read_records(tmp_path / "d.parquet", "talk")
    assert data[0] == {"prompt": "a", "answer": "b", "place": "d.parquet, row 1"}


def test_a_chat_becomes_the_template(tokenizer):
    system = {"role": "system", "content": "Be short."}
    more = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    prompt, answer = records.chat_to_pair([system, *CHAT, *more])
    assert prompting.build_prompt(prompt) == "User: Be short.\na\nAssistant: b\nUser: c\nAssistant:"
    row = Dataset.from_list([{"prompt": prompt, "answer": answer}])
    (example,), _ = prompting.encode(row, tokenizer, 99)
    learned = [label for label in example["labels"] if label != prompting.IGNORED]
    assert tokenizer.decode(learned) == " d" + tokenizer.eos_token  # only the last answer
    text = "### Human: a### Assistant: b### Human: c### Assistant: d"
    assert records.chat_to_pair(text) == ("a\nAssistant: b\nUser: c", "d")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set with two configs: one with images that no library can read, one whose files differ
    in their columns; every name on the hub leads to its folder."""
    configs = "".join(f"- config_name: {c}\n  data_files: '{c}*.parquet'\n" for c in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    images = [{"bytes": b"\xff no image", "path": None}] * 20
    rows = Dataset.from_dict({"prompt": [*"abcdefghijklmnopqrst"], "answer": ["7"] * 20})
    rows = rows.add_column("image", images).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "en.parquet")
    Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}).to_parquet(tmp_path / "de1.parquet")
    Dataset.from_dict({"question": ["a"], "reply": ["b"]}).to_parquet(tmp_path / "de2.parquet")
    texts = {"csv": "prompt,answer\na,007\nb,NA", "jsonl": as_line(answer="2024-01-05").decode()}
    for ending, text in texts.items():
        (tmp_path / ending).mkdir()
        (tmp_path / ending / f"d.{ending}").write_text(text)

    def load(name, config, load=datasets.load_dataset, **options):
        folder = tmp_path / name.removeprefix("me/set").lstrip("-")
        return load(str(folder), config, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(records, "load_dataset", load)


def test_hub_data_sets(hub):
    fails("config None.*('en', 'de'|'de', 'en')", records.read_records, "me/set")
    fails("config fr.*'en'", records.read_records, "me/set", config="fr")
    fails("split dev.*train", records.read_records, "me/set", config="en", split="dev")
    fails("config de.*column names", records.read_records, "me/set", config="de")
    data = records.read_records("me/set", config="en", split="train[:10%]")
    assert data["place"][:] == ["me/set, row 1", "me/set, row 2"]
    assert data.info.description.endswith("not used: 'image'")
    assert records.read_records("me/set-csv")["answer"][:] == ["007", "NA"]
    fails("alters 'answer' of 'me/set-jsonl': it", records.read_records, "me/set-jsonl")
    image = ("me/set", "prompt", "image")
    fails("cannot be read .cannot identify", records.read_records, *image, config="en")


def test_the_network_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWORK_GUARD_LOG", str(tmp_path / "attempts"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub is asked six times
    fails("no file and no hub data set 'nobody/nothing'", records.read_records, "nobody/nothing")


def test_splits_are_seeded_and_hold_no_prompt_of_the_other(read):
    lines = [as_line(f"{i % 40}" if i % 3 else f" {i % 40} ", f"{i}") for i in range(100)]
    data, dropped = read("d.jsonl", b"".join(lines)), []
    train, test = records.split_records(data, seed=1, dropped=dropped)
    assert len(test) == 4 and len(train) + len(test) + len(dropped) == 100
    assert {row.kind for row in dropped} == {"repeats a held-out prompt"}
    assert not {p.strip() for p in train["prompt"]} & {p.strip() for p in test["prompt"]}
    assert records.split_records(data, seed=1)[1][:] == test[:]
    assert records.split_records(data, seed=2)[1][:] != test[:]


@pytest.mark.parametrize("least", [1, 16, 20])
def test_the_number_of_rows_that_is_asked_for_suffices(least):
    rows = [{"prompt": f"{i}", "answer": "b", "place": ""} for i in range(50)]
    with pytest.raises(DataError, match="give at least") as caught:
        records.split_records(Dataset.from_list(rows[:least]), least=least)
    enough = int(str(caught.value).split()[-1])
    assert len(records.split_records(Dataset.from_list(rows[:enough]), least=least)[0]) >= least
    few = Dataset.from_list(rows[: enough - 1])
    fails(f"give at least {enough}", records.split_records, few, least=least)


def test_the_report_counts_and_names_every_kind(read):
    rows = [("How?", "So."), ("how?  ", "So."), ("How?", "Not so."), ("fine", "yes"), ("x", "")]
    dropped = []
    train = read("train.jsonl", b"".join(as_line(*row) for row in rows), dropped=dropped)
    test = read("test.jsonl", as_line("Fine", "no") * 2)
    report = records.inspect_data(train, test, dropped)
    assert list(report["rows"]) == [1, 1, 1, 2]
    lines = [f"train.jsonl, line {line}" for line in (5, 2, 3)]
    assert list(report["where"]) == [*lines, "test.jsonl, line 1; test.jsonl, line 2"]


def test_own_splits_say_what_they_found(tmp_path, capsys, monkeypatch):
    lines = [as_line(f"{i % 40}", f"{i}") for i in range(100)] + [as_line("x", "")]
    (tmp_path / "d.jsonl").write_bytes(b"".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path))
    data = records.read_records("~/d.jsonl", dropped=(dropped := []))
    fails("give at least 109$", records.own_splits, data, dropped, least=90)
    splits = records.own_splits(data, dropped, least=32)
    assert [len(splits[name]) for name in ("validation", "test")] == [3, 4]
    said = capsys.readouterr().out
    for line in ("read as prompt and answer", "the answer is empty", "repeats a held-out prompt"):
        assert line in said


JUNK = [b'"', b"\n", b",", b"{", b"[" * 5000, b"\0", b"\xff", b"\r", b"9" * 5000, b"null", b"}\n"]


def make_file(generator: random.Random) -> tuple[str, bytes]:
    """(name, bytes) of a data file, some of its rows bad, in which up to three places are odd."""
    lines = generator.choices([GOOD, as_line("où, 日本 😀", 'a "b" \\')], k=6)
    bad = [b"\n"] * 3 + [line for line, _ in ONE_ROW.values()]
    lines += generator.sample(bad, generator.randint(0, 2))
    shapes = [(name, text.encode()) for name, text in SHAPES.items()]
    name, data = generator.choice([*shapes, *[("rows.jsonl", b"".join(lines))] * len(shapes)])
    for _ in range(generator.choice([0, 0, 1, 2, 3])):
        at, to = sorted(generator.choices(range(len(data) + 1), k=2))
        cuts = [data[:at] + data[to:], data[:at] + generator.choice(JUNK) + data[at:]]
        data = generator.choice([*cuts, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n")])
    return name, data


def test_generated_files(tmp_path, monkeypatch):
    """With and without pyarrow the same; strict reading fails just where a row would be dropped."""
    generator, outcomes = random.Random(7), {"refused": 0, "all kept": 0, "some dropped": 0}
    for number in range(400):
        name, data = make_file(generator)
        path, dropped, again = tmp_path / f"{number}-{name}", [], []
        path.write_bytes(data)
        rows, said = read_or_refuse(path, dropped)
        strict, why = read_or_refuse(path, None)
        with monkeypatch.context() as patch:
            patch.setattr(records, "read_json", lambda *a: [])
            assert read_or_refuse(path, again) == (rows, said)
        assert again == dropped and strict == (None if dropped else rows)
        said = [said] if rows is None else []
        why = [why] if strict is None else []
        for sentence in [*said, *why, *map(": ".join, dropped)]:
            assert path.name in sentence and "\n" not in sentence and len(sentence) < 900
        places = [row["place"] for row in rows or []] + [row.place for row in dropped]
        assert len(set(places)) == len(places)
        outcomes["refused" if rows is None else "some dropped" if dropped else "all kept"] += 1
    assert min(outcomes.values()) >= 50, outcomes  # the generator reaches all three ends
