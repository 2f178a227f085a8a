"""Every option of every command line, given something wrong: exit status, the value and the way out in one line, no traceback.

`COMMANDS` holds each command that a reader runs; the options are read from its own --help, so that a new one without a case fails.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ask, command, loading, memory, rehearsal, sharding, training, weights
from helpers.errors import TutorialError
from helpers.study import __main__ as study
from tests import float16, mutations, soak
from tests.notebooks import ROOT


def script(path: str):
    """A script of this repository as a module, loaded as `python path` would, its own folder first on the path."""
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


COMMANDS = {
    "python -m helpers.training": training.main,
    "python -m helpers.sharding": sharding.main,
    "python -m helpers.ask": ask.main,
    "python -m helpers.memory": memory.main,
    "python -m helpers.rehearsal": rehearsal.main,
    "python -m helpers.study": study.main,
    "python -m helpers.weights": weights.main,
    "python data/build_tiny_falcon.py": script("data/build_tiny_falcon.py").main,
    "python -m tests.float16": float16.main,
    "python -m tests.soak": soak.main,
}
NUMBERS = ("0", "-1", "1.5", "nan", "inf", "1e3", "²", "many", "", "9" * 5000)  # none of them a number of steps
RUN = ("python -m helpers.training", "python -m helpers.sharding")

# (command, arguments, error or "usage", words that name the value and the way out). {0} is an empty folder, {0}/file a file in it.
CASES = [
    *((run, ["--steps", text], "usage", rf"--steps: '{text[:20]}.*' is no number of steps: give a whole number from 1") for run in RUN for text in NUMBERS),
    *((run, ["--save-steps", text], "usage", rf"--save-steps: '{text[:20]}.*' is no number of steps: give a whole number from 1") for run in RUN for text in ("0", "-5", "nan")),
    *((run, ["--seed", text], "usage", rf"--seed: '{text}' is no seed: give a whole number from 0 to 4,294,967,295") for run in RUN for text in ("-1", "4294967296", "0.5", "x")),
    *((run, ["--profile", "colab-t5"], "ProfileError", "no profile 'colab-t5': choose auto or one of tiny") for run in RUN),
    *((run, ["--output", "  "], "usage", "--output: '  ' names nothing: give a name, or leave the option out") for run in RUN),
    *((run, ["--output", "{0}/file/run"], "OutputError", "output folder '.*file/run' cannot be written .*: choose another with --output") for run in RUN),
    *((run, ["--resume=maybe"], "usage", "--resume: ignored explicit argument 'maybe'") for run in RUN),
    ("python -m helpers.sharding", ["--resume", "--output", "{0}"], "CheckpointError", "'.*' holds no complete sharded checkpoint: train without --resume"),
    ("python -m helpers.training", ["--data", "{0}/gone.csv", "--output", "{0}"], "DataError", "no file '.*gone.csv': check the name"),
    ("python -m helpers.training", ["--data", "", "--output", "{0}"], "usage", "--data: '' names nothing: give a name"),
    ("python -m helpers.training", ["--data", "{0}/pairs.csv", "--prompt-column", "promt", "--output", "{0}"], "DataError", "no column 'promt': choose one of 'prompt'"),
    ("python -m helpers.training", ["--data", "{0}/pairs.csv", "--answer-column", "", "--output", "{0}"], "DataError", "no column '': choose one of 'prompt', 'answer'"),
    ("python -m helpers.training", ["--cache-4bit", "", "--output", "{0}"], "usage", "--cache-4bit: '' names nothing: give a name, or leave the option out"),
    ("python -m helpers.training", ["--cache-4bit", "{0}/file", "--no-scoring", "--output", "{0}"], "OutputError", "'.*file/data--tiny-falcon.*' cannot be written, since '.*file' is no folder or is read-only: choose another folder for the 4-bit copy"),
    ("python -m helpers.training", ["--no-scoring=1"], "usage", "--no-scoring: ignored explicit argument '1'"),
    ("python -m helpers.training", ["--learning-rate", "1"], "usage", "unrecognized arguments: --learning-rate 1"),
    ("python -m helpers.ask", [], "usage", "the following arguments are required: --adapter"),
    ("python -m helpers.ask", ["--adapter", "{0}/gone"], "AdapterError", "'.*gone' holds no readable adapter_config.json: name the folder that save_adapter wrote"),
    ("python -m helpers.ask", ["--adapter", "", "--profile", "tiny"], "usage", "--adapter: '' names nothing: give a name"),
    ("python -m helpers.ask", ["--adapter", "{0}", "--profile", "colab-t4"], "ProfileError", "'colab-t4' needs a GPU and none was found: use profile 'tiny'"),
    *(("python -m helpers.ask", ["--adapter", "{0}", "--batch", text], "usage", f"'{text}' is no batch size: give a whole number from 1") for text in ("0", "-1", "x")),
    ("python -m helpers.memory", ["--model", "llama"], "ModelError", "'llama' is neither known nor a readable config.json: give one"),
    ("python -m helpers.memory", ["--model", "{0}/broken.json"], "ModelError", "'.*broken.json' is neither known nor a readable config.json: give one"),
    ("python -m helpers.memory", ["--gpu", "T5"], "PlanError", "no GPU 'T5' in the table: choose one of .*T4"),
    *(("python -m helpers.memory", ["--batch", text], "usage", f"'{text}' is no batch size: give a whole number from 1") for text in ("0", "-2", "half")),
    *(("python -m helpers.memory", ["--length", text], "usage", f"'{text}' is no length in tokens: give a whole number from 1") for text in ("0", "-1", "nan")),
    *(("python -m helpers.memory", ["--rank", text], "usage", f"'{text}' is no rank: give a whole number from 1") for text in ("0", "-16", "1.0")),
    ("python -m helpers.memory", ["--optimizer", "adam"], "PlanError", "no optimizer 'adam' in this planner: choose one of adamw_torch"),
    ("python -m helpers.memory", ["--attention", "flash"], "PlanError", "no attention implementation 'flash' in this planner: choose one of sdpa"),
    ("python -m helpers.memory", ["--no-checkpointing=x"], "usage", "--no-checkpointing: ignored explicit argument 'x'"),
    ("python -m helpers.rehearsal", ["--layout", "zip"], "usage", "--layout: invalid choice: 'zip' .choose from .*hub"),
    ("python -m helpers.rehearsal", ["--folder", "{0}/file/in", "--model", "data/tiny-falcon"], "OutputError", "the folder '.*file/in' cannot be made .*: choose another with --folder"),
    ("python -m helpers.rehearsal", ["--folder", ""], "usage", "--folder: '' names nothing: give a name"),
    ("python -m helpers.rehearsal", ["--model", "falcon-8b"], "ModelError", "no config of 'falcon-8b' is stored here: choose one of"),
    *(("python -m helpers.rehearsal", ["--layers", text], "usage", f"'{text}' is no number of layers: give a whole number from 1") for text in ("0", "-1", "all")),
    ("python -m helpers.rehearsal", ["--layers", "33", "--folder", "{0}"], "PlanError", "tiiuae/falcon-7b has 32 layers and 33 were asked for: give fewer with --layers"),
    ("python -m helpers.rehearsal", ["--json", "{0}/broken.json", "--folder", "{0}"], "OutputError", "'.*broken.json' is no JSON object .*: choose another file.* with --json"),
    ("python -m helpers.rehearsal", ["--json", "{0}/no/such.json", "--folder", "{0}"], "OutputError", "'.*such.json' is no JSON object .*: choose another file.* with --json"),
    ("python -m helpers.rehearsal", ["--phases", "loed"], "usage", "--phases: invalid choice: 'loed' .choose from .*load"),
    ("python -m helpers.rehearsal", ["--keep=yes"], "usage", "--keep: ignored explicit argument 'yes'"),
    ("python -m helpers.study", ["--experiment", "metods"], "usage", "--experiment: invalid choice: 'metods' .choose from .*methods"),
    *(("python -m helpers.study", ["--workers", text], "usage", f"'{text}' is no number of workers: give a whole number from 1") for text in ("0", "-1", "1001")),
    ("python -m helpers.study", ["--file", "{0}"], "DataError", "'.*' is a folder, or lies in none: name a CSV file in a folder that is there"),
    ("python -m helpers.study", ["--file", "{0}/no/study.csv"], "DataError", "'.*no/study.csv' is a folder, or lies in none: name a CSV file"),
    ("python -m helpers.study", ["--file", "{0}/latin.csv"], "DataError", "latin.csv is not UTF-8 at byte 1: take the file of the repository"),
    ("python -m helpers.study", ["--file", "{0}/pairs.csv"], "DataError", "pairs.csv line 1 has unknown columns .*'answer', 'prompt'.*: move the file away"),
    ("python -m helpers.weights", [], "usage", "the following arguments are required: FOLDER"),
    ("python -m helpers.weights", [""], "usage", "FOLDER: '' names nothing: give a name"),
    ("python -m helpers.weights", ["{0}"], "ModelError", "no pytorch_model.*bin in '.*': name the folder of a model that has them"),
    ("python -m helpers.weights", ["{0}/gone"], "ModelError", "no pytorch_model.*bin in '.*gone': name the folder of a model that has them"),
    ("python -m helpers.weights", ["{0}/pickled"], "ModelError", "pytorch_model.bin in '.*pickled' is no sound file of tensors: fetch it again"),
    *(("python data/build_tiny_falcon.py", ["--steps", text], "usage", f"'{text}' is no number of steps: give a whole number from 1") for text in ("0", "-1", "nan")),
    ("python data/build_tiny_falcon.py", ["--seed", "-1"], "usage", "'-1' is no seed: give a whole number from 0"),
    ("python data/build_tiny_falcon.py", ["--vocab", "10"], "usage", "'10' is no vocabulary size: give a whole number from 512"),
    ("python data/build_tiny_falcon.py", ["--every", "0"], "usage", "'0' is no number of steps: give a whole number from 1"),
    ("python data/build_tiny_falcon.py", ["--cache", ""], "usage", "--cache: '' names nothing: give a name"),
    ("python data/build_tiny_falcon.py", ["--output", ""], "usage", "--output: '' names nothing: give a name"),
    ("python -m tests.soak", ["kils"], "usage", "there is no part 'kils': choose of kills"),
    *(("python -m tests.soak", [option, "-1"], "usage", f"{option}: '-1' is no number of {what}: give a whole number from") for option, what in (("--kills", "runs"), ("--interrupts", "runs"), ("--rounds", "rounds"), ("--repeats", "repetitions"))),
    ("python -m tests.soak", ["--only", "99"], "usage", "--only: invalid choice: '99' .choose from .*01"),
    ("python -m tests.soak", ["--seed", "x"], "usage", "--seed: 'x' is no seed: give a whole number from 0"),
    ("python -m tests.float16", ["--seeds", "0"], "usage", "'0' is no number of seeds: give a whole number from 1 to 100"),
    ("python -m tests.float16", ["--steps", "x"], "usage", "'x' is no number of steps: give a whole number from 1"),
    ("python -m tests.float16", ["--dtypes", "int8"], "usage", "--dtypes: invalid choice: 'int8' .choose from .*float32"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder with what the cases name: a file in the way, a CSV file with two columns, broken ones."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "pairs.csv").write_text("prompt,answer\n" + "a,b\n" * 20)
    (tmp_path / "latin.csv").write_bytes(b"m\xe9thode\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"no pickle")
    return tmp_path


def outcome(main, arguments: list[str], capsys) -> tuple[int, str]:
    """Exit status and stderr of a command line, run in this process."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def is_one_error(text: str, status: int, error: str, words: str) -> None:
    """What a reader sees: usage and one line from argparse with status 2, or one line of an error of ours with status 1."""
    lines = text.strip().splitlines()
    assert "Traceback" not in text
    if error == "usage":
        assert status == 2 and lines[0].startswith("usage: ") and ": error: " in lines[-1]
    else:
        assert status == 1 and [line for line in lines if "Error:" in line] == lines[-1:]
        assert issubclass(getattr(importlib.import_module("helpers.errors"), error), TutorialError)
        assert lines[-1].startswith(f"{error}: ")
    assert re.search(words, lines[-1]), lines[-1]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"), CASES, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None
)
def test_bad_command_line(name, arguments, error, words, place, capsys, monkeypatch):
    for module, expensive in ((loading, "load_base"), (rehearsal, "rehearse"), (study, "execute_all")):
        if error != "CheckpointError":  # which needs the model that the checkpoint is for
            monkeypatch.setattr(module, expensive, lambda *a, **k: pytest.fail("something expensive began before the check"))
    status, text = outcome(COMMANDS[name], [argument.format(place) for argument in arguments], capsys)
    is_one_error(text, status, error, words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_case(name, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[name](["--help"])
    options = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    tried = {argument.split("=")[0] for of, arguments, _, _ in CASES for argument in arguments if of == name}
    assert options <= tried, f"no case for {sorted(options - tried)}"


def test_every_command_line_is_in_the_table():
    with_parser = {
        path.relative_to(ROOT)
        for folder in ("helpers", "data", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if "ArgumentParser(" in path.read_text() and not path.name.startswith("test_")
    }
    listed = set()
    for name in COMMANDS:
        path = Path(name.split()[-1]) if name.endswith(".py") else Path(*name.split()[-1].split("."))
        listed.add(path / "__main__.py" if (ROOT / path).is_dir() else path.with_suffix(".py"))
    without_options = {Path("data/build_tickets.py"), Path("data/build_hero.py")}
    assert with_parser == listed | without_options


def test_there_are_many(capsys):
    with capsys.disabled():
        print(f"\nbad command lines: {len(CASES)} cases over {len(COMMANDS)} commands")
    assert len(CASES) >= 60


def test_mutations_of_no_name(capsys):
    status, text = outcome(mutations.main, ["no such fault"], capsys)
    assert status == 2 and "no fault is called 'no such fault': give words of alpha/r is r/alpha" in text


def test_another_runs_checkpoint_is_not_resumed(place, capsys):
    folder = place / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps({"identity": "other", "files": {}}))
    status, text = outcome(training.main, ["--resume", "--no-scoring", "--output", str(place)], capsys)
    is_one_error(text, status, "CheckpointError", "checkpoint-1 in .* belongs to a run .*: choose another --output")


# --- in processes of their own ------------------------------------------------------------------------------------------------

PROCESSES = [
    (["-m", "helpers.training", "--profile", "tinny"], 1, "ProfileError: there is no profile 'tinny': choose auto"),
    (["-m", "helpers.memory", "--batch", "0"], 2, "'0' is no batch size: give a whole number from 1"),
    (["-m", "helpers.weights", "/nowhere"], 1, "ModelError: no pytorch_model.*bin in '/nowhere': name the folder"),
    (["data/build_tickets.py", "--seed", "1"], 2, "unrecognized arguments: --seed 1"),
    (["data/build_hero.py", "x.png"], 2, "unrecognized arguments: x.png"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "words"), PROCESSES, ids=lambda value: value[-1] if isinstance(value, list) else None
)
def test_what_a_shell_sees(arguments, status, words, tmp_path):
    tickets = (ROOT / "data" / "tickets" / "train.jsonl").stat().st_mtime_ns
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and done.stdout == ""
    assert "Traceback" not in done.stderr and re.search(words, done.stderr.strip().splitlines()[-1])
    assert (ROOT / "data" / "tickets" / "train.jsonl").stat().st_mtime_ns == tickets


def test_an_interrupt_while_the_model_is_awaited_ends_with_130(tmp_path):
    """Ctrl-C before there is anything to resume: a FIFO keeps the command line waiting for its first message's adapter."""
    waiting = tmp_path / "adapter"
    waiting.mkdir()
    os.mkfifo(waiting / "adapter_config.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.ask", "--adapter", str(waiting)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    end = os.open(waiting / "adapter_config.json", os.O_WRONLY)  # opens when the other side reads, and gives it nothing
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(end)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err


def test_the_exit_statuses_are_documented():
    said = re.search(
        r"Exit status of .*?: 0 done; 1 an error .*; 2 wrong usage,.*; 130 interrupted", command.__doc__.replace("\n", " ")
    )
    assert said, "helpers.command says what each exit status means"
    assert "exit status is 0, 1 after an error of ours, 2 after wrong usage, 130" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    ).replace("\n", " ")
