"""Reading data: a table of bad files, a fuzz test over generated ones, chats, and the report that comes before training."""

import csv
import io
import json
import os
import random
import signal

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from helpers import data_report, prompting, records
from helpers.errors import DataError

GOOD = '{"prompt": "a", "answer": "b"}\n'
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def as_line(prompt="a", answer="b", **more) -> bytes:
    return (json.dumps({"prompt": prompt, "answer": answer, **more}) + "\n").encode()


# --- the table of bad input -------------------------------------------------------------------------------------------------

# name of the case: file name, its bytes, what the one-sentence error must say: the file, the row, the way out
WHOLE_FILE = {
    "empty": ("d.jsonl", b"", "d.jsonl is empty: give a file"),
    "binary garbage": ("d.jsonl", bytes(range(256)) * 4, "d.jsonl, line 1 holds a zero byte .* save it as UTF-8 text"),
    "binary without zeros": ("d.csv", b"a,b\n\x80\x81\x82", "d.csv, line 2 is not UTF-8 at byte 4: save it"),
    "UTF-16 with mark": ("d.jsonl", GOOD.encode("utf-16"), "d.jsonl is UTF-16: save it with the encoding UTF-8"),
    "UTF-16 without mark": ("d.jsonl", GOOD.encode("utf-16-le"), "line 1 holds a zero byte .* binary or UTF-16: save it"),
    "Latin-1": (
        "d.jsonl",
        GOOD.encode() + as_line().replace(b"a", "é".encode("latin-1")),
        "d.jsonl, line 2 is not UTF-8 at byte 43: save it",
    ),
    "Latin-1 behind a mark": ("d.csv", b"\xef\xbb\xbfprompt\n\xe9", "d.csv, line 2 is not UTF-8 at byte 10: save it"),
    "only a header": ("d.csv", b"prompt,answer\n", "d.csv holds no rows: give a file"),
    "unclosed quote": ("d.csv", b'prompt,answer\n"a,b\nc,d\n', "d.csv, line 3 is not valid CSV .*: check its quotes"),
    "10 MB field": ("d.csv", b"prompt,answer\na," + b"x" * 10**7, "d.csv, line 2 is not valid CSV .*field limit"),
    "column twice": ("d.csv", b"prompt,answer,answer\na,b,c\n", "row 1 names the column 'answer' twice: rename"),
    "broken JSON list": ("d.json", b'[{"prompt": "a", ', "d.json is not valid JSON .*: give one list of objects"),
    "broken Parquet": ("d.parquet", b"PAR1" * 20, "d.parquet is not a readable Parquet file: write it again"),
    "unknown ending": ("d.xlsx", b"PK", "d.xlsx ends in '.xlsx': rename or convert it to one of .jsonl"),
}

# name of the case: the bytes of the second row, the kind that is listed, what the error must say
ONE_ROW = {
    "invalid JSON": (b'{"prompt": \n', "not JSON", "d.jsonl, line 2 is not valid JSON .* one JSON object"),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"\n", "not JSON", "line 2 is not valid JSON"),
    "number with 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}\n", "not JSON", "line 2 is not valid JSON"),
    "a list": (b"[1]\n", "not an object", "line 2 is a JSON list: each line"),
    "10 MB line": (as_line("x" * 10**7), "oversized", r"line 2 has 10,\d+,\d+ characters, more than 1,000,000: split or remove"),
    "key twice": (b'{"prompt": "a", "prompt": "c", "answer": "b"}\n', "repeated column", "line 2 names a column twice.*rename"),
    "missing column": (b'{"promt": "a", "answer": "b"}\n', "missing column", "row 2 has no column 'prompt': choose one of 'promt'"),
    "no columns": (b"{}\n", "missing column", "row 2 has no column 'prompt': choose one of none, the row is empty"),
    "number": (as_line(answer=3), "not a text", "row 2: 'answer' is 3, not a text: correct or remove the row"),
    "null": (as_line(prompt=None), "not a text", "row 2: 'prompt' is None"),
    "list for text": (as_line(answer=["b"]), "not a text", r"row 2: 'answer' is \['b'\]"),
    "empty": (as_line(answer=""), "empty", "row 2: 'answer' is ''"),
    "white space": (as_line(prompt=" \t"), "empty", r"row 2: 'prompt' is ' \\t'"),
    "half a surrogate pair": (as_line("ok \ud800"), "broken character", "row 2: 'prompt' has half a surrogate pair at character 3"),
    "template in the answer": (as_line(answer="b\nUser: more?"), "separator", r"answer contains '\\nUser:'.*remove it or the row"),
    "other turn in the answer": (as_line(answer="b\nAssistant: c"), "separator", "row 2: the answer contains"),
    "end token in the answer": (as_line(answer="b<|endoftext|>"), "separator", "'answer' contains the end token '<|endoftext|>'"),
    "end token in the prompt": (as_line("<|endoftext|>a"), "separator", "'prompt' contains the end token"),
    "chat without answer": (as_line(CHAT[:1]), "not a chat", "'prompt' has the roles .*alternate user and assistant"),
    "chat with unknown role": (as_line([{"role": "bot", "content": "a"}, CHAT[1]]), "not a chat", r"has the roles \['bot', "),
    "chat without role": (as_line([{"from": "human", "value": "a"}]), "not a chat", "no text under 'role' and 'content' in message 1"),
    "empty chat": (as_line([]), "not a chat", "alternate user and assistant"),
    "template in a chat": (as_line([CHAT[0], {"role": "assistant", "content": "x\nUser: y"}]), "not a chat", "turn .* message 2"),
}  # fmt: skip


def fails_with_one_sentence(read, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(("name", "content", "message"), WHOLE_FILE.values(), ids=WHOLE_FILE)
def test_a_file_that_cannot_be_read_raises_whatever_the_caller_allows(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    fails_with_one_sentence(lambda: records.read_records(path), message)
    fails_with_one_sentence(lambda: records.read_records(path, dropped=[]), message)


@pytest.mark.parametrize(("line", "kind", "message"), ONE_ROW.values(), ids=ONE_ROW)
def test_a_bad_row_raises_or_is_listed(tmp_path, line, kind, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD.encode() + line + GOOD.encode())
    fails_with_one_sentence(lambda: records.read_records(path), message)
    dropped = []
    read = records.read_records(path, dropped=dropped)
    assert read["place"][:] == ["d.jsonl, row 1", "d.jsonl, row 3"]
    assert [(row.kind, row.place.split()[-1]) for row in dropped] == [(kind, "2")]
    path.write_bytes(line)
    fails_with_one_sentence(
        lambda: records.read_records(path, dropped=[]), "none of the 1 rows can be used; the first: d.jsonl, "
    )


def test_a_ragged_csv_row_raises_or_is_listed(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,answer\na,b\nc\nd,e,f\n\ng,h\n")
    fails_with_one_sentence(lambda: records.read_records(path), "d.csv, row 3 has 1 fields and the header has 2: quote")
    dropped = []
    assert records.read_records(path, dropped=dropped)["prompt"][:] == ["a", "g"]
    assert [row.place for row in dropped] == ["d.csv, row 3", "d.csv, row 4"]


def test_missing_file_directory_and_pipe(tmp_path):
    fails_with_one_sentence(lambda: records.read_records(tmp_path / "gone.csv"), "no file '.*gone.csv': check the name")
    (tmp_path / "folder.jsonl").mkdir()
    fails_with_one_sentence(lambda: records.read_records(tmp_path / "folder.jsonl"), "is a folder: name one file in it")
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would wait for ever
    fails_with_one_sentence(lambda: records.read_records(tmp_path / "pipe.jsonl"), "is not an ordinary file but a pipe")
    fails_with_one_sentence(lambda: records.read_records("x" * 300 + ".csv"), "there is no file")  # longer than a name may be


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + GOOD.encode(), GOOD.replace("\n", "\r\n").encode(), GOOD.strip().encode()])
def test_byte_order_mark_crlf_and_a_missing_last_newline_do_no_harm(tmp_path, content):
    (tmp_path / "d.jsonl").write_bytes(content)
    assert records.read_records(tmp_path / "d.jsonl").to_list() == [{"prompt": "a", "answer": "b", "place": "d.jsonl, row 1"}]
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfprompt,answer\r\na,b\r\n")
    assert records.read_records(tmp_path / "d.csv").to_list() == [{"prompt": "a", "answer": "b", "place": "d.csv, row 2"}]


def test_a_json_list_reads_like_json_lines(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}, 3], indent=1))
    dropped = []
    assert records.read_records(tmp_path / "d.json", dropped=dropped)["answer"][:] == ["b"]
    assert [row.place for row in dropped] == ["d.json, row 2"]


def test_one_row_cannot_be_split(tmp_path):
    (tmp_path / "d.jsonl").write_text(GOOD)
    fails_with_one_sentence(
        lambda: records.split_records(records.read_records(tmp_path / "d.jsonl")), "1 rows are too few.*at least 10"
    )


def test_all_rows_too_long_names_the_shortest(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_bytes(as_line("word " * 90) + as_line("word " * 50))
    data = records.read_records(tmp_path / "d.jsonl")
    fails_with_one_sentence(
        lambda: prompting.encode(data, tokenizer, 40), r"all 2 .* \(shortest: \d+, d.jsonl, row 2\): raise max_length"
    )


# --- chats ------------------------------------------------------------------------------------------------------------------


def test_a_chat_becomes_the_template(tmp_path, tokenizer):
    chat = [
        {"role": "system", "content": "Be short."},
        *CHAT,
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    data = records.read_records(tmp_path / "d.jsonl")
    assert prompting.build_prompt(data[0]["prompt"]) == "User: Be short.\na\nAssistant: b\nUser: c\nAssistant:"
    assert data["answer"][:] == ["d", "b"]
    example = prompting.encode_example(tokenizer, data[0]["prompt"], data[0]["answer"])
    learned = [label for label in example["labels"] if label != prompting.IGNORED]
    assert tokenizer.decode(learned) == " d" + tokenizer.eos_token  # only the last answer


def test_chats_in_parquet_and_under_another_name(tmp_path):
    Dataset.from_list([{"talk": CHAT}]).to_parquet(str(tmp_path / "d.parquet"))
    assert records.read_records(tmp_path / "d.parquet", "talk").to_list() == [
        {"prompt": "a", "answer": "b", "place": "d.parquet, row 1"}
    ]


# --- the report -------------------------------------------------------------------------------------------------------------


def test_the_report_counts_and_names_every_problem(tmp_path, tokenizer):
    rows = [("How?", "So."), ("how? ", "So."), ("How?", "Not so."), ("x " * 99, "long"), ("fine", "yes"), ("empty", "")]
    (tmp_path / "train.jsonl").write_bytes(b"".join(as_line(*row) for row in rows))
    (tmp_path / "test.jsonl").write_bytes(as_line("Fine", "no") + as_line("new", "y"))
    dropped = []
    train = records.read_records(tmp_path / "train.jsonl", dropped=dropped)
    test = records.read_records(tmp_path / "test.jsonl", dropped=dropped)
    report = data_report.inspect_data(train, test, tokenizer, 64, dropped)
    assert report.rows_read == 8
    assert report.repeated == ("train.jsonl, row 2",)
    assert report.contradicting == ("train.jsonl, row 3",)
    assert report.too_long == ("train.jsonl, row 4",)
    assert report.overlapping == ("test.jsonl, row 1",)
    assert [row.kind for row in report.dropped] == ["empty"]
    for place in ("train.jsonl, row 2", "train.jsonl, row 3", "train.jsonl, row 4", "test.jsonl, row 1", "train.jsonl, row 6"):
        assert place in str(report)
    encoded, left_out = prompting.encode(train, tokenizer, 64)
    assert left_out == len(report.too_long)
    assert [len(ids) for ids in encoded["input_ids"]] == [n for n in report.train_lengths if n <= 64]
    kept = data_report.without_repeats(train, dropped)
    assert kept["place"][:] == ["train.jsonl, row 1", "train.jsonl, row 4", "train.jsonl, row 5"]
    assert len(kept) + len(dropped) == 6


# --- fuzz -------------------------------------------------------------------------------------------------------------------

WORDS = (
    "kettle",
    "où",
    "日本",
    '"quoted"',
    "a, b",
    "line\nbreak",
    "tab\t",
    "😀",
    "{",
    "]",
    "\\",
    "''",
    "K4821",
    "\u2028",
    "User:",
)
ODD = (
    None,
    3,
    -1.5,
    True,
    "",
    "  ",
    [],
    {},
    ["a"],
    {"a": 1},
    "x" * 200_000,
    "\nUser: x",
    "<|endoftext|>",
    "\ud83d",
    CHAT,
    CHAT[:1],
    [3],
)


def make_file(generator: random.Random) -> tuple[str, bytes]:
    """(ending, bytes) of a data file with a few rows that went wrong in up to three ways; sometimes in none."""
    ending = generator.choice(["jsonl", "jsonl", "csv", "csv", "json", "parquet"])
    text = lambda: " ".join(generator.choices(WORDS, k=generator.randint(1, 8)))  # noqa: E731
    rows = [{"prompt": text(), "answer": text()} for _ in range(generator.randint(0, 12))]
    for row in generator.sample(rows, k=min(len(rows), generator.randint(0, 3))):
        key = generator.choice(["prompt", "answer", "messages"])
        row[key] = generator.choice(ODD) if ending != "parquet" else generator.choice([None, "", "\nUser: x", "x" * 2000])
        if generator.random() < 0.3:
            row.pop(generator.choice(list(row)))
    data = serialize(ending, rows)
    for _ in range(generator.choice([0, 1, 1, 2, 3])):
        data = generator.choice([flip, cut, insert, repeat, other_encoding, line_ends])(data, generator)
    return ending, data


def serialize(ending: str, rows: list[dict]) -> bytes:
    if ending == "parquet":
        out = io.BytesIO()
        table = {key: [row.get(key) for row in rows] for key in ("prompt", "answer")}
        pyarrow.parquet.write_table(pyarrow.table(table), out)
        return out.getvalue()
    if ending == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, ["prompt", "answer"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode("utf-8", "surrogatepass")
    if ending == "json":
        return json.dumps(rows, indent=1).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def flip(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        if changed:
            changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


def cut(data: bytes, generator: random.Random) -> bytes:
    a, b = sorted(generator.choices(range(len(data) + 1), k=2))
    return generator.choice([data[:a], data[b:], data[:a] + data[b:]])


def insert(data: bytes, generator: random.Random) -> bytes:
    at = generator.randint(0, len(data))
    junk = generator.choice(
        [b'"', b"\n", b",", b"{", b"[" * 5000, b"\0", b"\xff\xfe", b"\r", generator.randbytes(20), b"9" * 5000, b"NaN"]
    )
    return data[:at] + junk + data[at:]


def repeat(data: bytes, generator: random.Random) -> bytes:
    lines = data.split(b"\n")
    return b"\n".join(lines + generator.choices(lines, k=2))


def other_encoding(data: bytes, generator: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return generator.choice(
        [b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-16-be"), text.encode("latin-1", "replace")]
    )


def line_ends(data: bytes, generator: random.Random) -> bytes:
    return data.replace(b"\n", generator.choice([b"\r\n", b"\r", b"\n\n", b"\n \n"]))


def count_rows(ending: str, data: bytes) -> int:
    """The rows of a file that could be read, counted another way than records does."""
    if ending == "parquet":
        return pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata.num_rows
    text = data.decode("utf-8-sig")
    if ending == "csv":
        return (
            sum(
                1
                for fields in csv.reader(
                    text.splitlines(keepends=True) if "\u2028" not in text else io.StringIO(text, newline="")
                )
                if fields
            )
            - 1
        )
    if ending == "json" and text.lstrip().startswith("["):
        return len(json.loads(text))
    return sum(1 for line in text.split("\n") if line.strip())


def read_or_refuse(path, dropped) -> tuple[Dataset | None, str]:
    try:
        return records.read_records(path, dropped=dropped), ""
    except DataError as error:
        return None, str(error)


def test_fuzz(tmp_path, tokenizer):
    """400 generated files: a typed error of one sentence that names the file, or a data set whose rows and dropped rows add up."""

    def hang(*_):
        raise TimeoutError(f"file {number} was not read within a minute")

    previous = signal.signal(signal.SIGALRM, hang)
    generator, outcomes = random.Random(7), {"raised": 0, "all kept": 0, "some dropped": 0}
    try:
        for number in range(400):
            ending, data = make_file(generator)
            path = tmp_path / f"file{number}.{ending}"
            path.write_bytes(data)
            signal.alarm(60)
            dropped: list[records.Dropped] = []
            read, error = read_or_refuse(path, dropped)
            strict, strict_error = read_or_refuse(path, None)
            for sentence in [text for text in (error, strict_error) if text] + [row.reason for row in dropped]:
                assert path.name in sentence
                assert "\n" not in sentence
                assert len(sentence) < 900
            # strict reading fails exactly where something would be left out
            assert bool(strict_error) == (bool(dropped) or bool(error)), path.name
            if error:
                assert not dropped
            else:
                assert len(read) + len(dropped) == count_rows(ending, data), path.name
                places = [*read["place"], *(row.place.replace(", line", ", row") for row in dropped)]
                assert len(set(places)) == len(places)
                report = data_report.inspect_data(read, read, tokenizer, 64, dropped)
                assert report.rows_read == 2 * len(read) + len(dropped)
            outcomes["raised" if error else "some dropped" if dropped else "all kept"] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert min(outcomes.values()) >= 50, outcomes  # the generator reaches all three ends
