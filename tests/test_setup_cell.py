"""The setup cell: in a checkout, from a copy, in an empty folder; and what it may ask of pip."""

import os
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch import OutOfMemoryError

from helpers import environment, profiles
from helpers.errors import TutorialError
from tests.notebooks import ROOT, SETUP_CELL, copy_checkout, python
from tests.publish import KINDS, PLACEHOLDER, linked

CELL = SETUP_CELL.read_text(encoding="utf-8")
FAKE_COLAB = ROOT / "tests" / "fake_colab"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
COLAB_ADDS = ["bitsandbytes", "loralib"]  # what googlecolab/backend-info does not list


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No variable that tells a place, and none that says where runs go."""
    places = [key for key in os.environ if key.startswith(tuple(environment.PLACES.values()))]
    for variable in (*places, "QLORA_RUNS"):
        monkeypatch.delenv(variable, raising=False)


def run_cell(cell: str, folder: Path) -> subprocess.CompletedProcess:
    """The cell in a Python that starts in `folder` and prints each process that it starts."""
    hook = "lambda event, values: event == 'subprocess.Popen' and print('BEGIN', values)"
    code = f"import sys\nsys.addaudithook({hook})\n{cell}\nprint('ROOT', root)"
    return python("-c", code, cwd=folder)


def write_helpers(folder: Path, says: str) -> None:
    """A repository in which the helpers only say that they were called."""
    (folder / "helpers").mkdir(parents=True, exist_ok=True)
    shown = f"def prepare(): print('prepared')\ndef show_setup(profile): print('{says} revision')\n"
    styled, resolved = "def set_style(): pass\n", "def resolve(): pass\n"
    modules = {"environment": shown, "plotting": styled, "profiles": resolved}
    for name, text in modules.items():
        (folder / "helpers" / f"{name}.py").write_text(text)


def test_a_checkout_is_found_from_any_folder_and_nothing_is_started(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    finding = CELL.partition("from helpers.environment")[0]
    for folder in (ROOT, ROOT / "notebooks", ROOT / "data" / "tickets"):
        monkeypatch.chdir(folder)
        found = {}
        exec(finding.replace("import subprocess", "subprocess = None"), found)  # noqa: S102
        assert found["root"] == ROOT and sys.path[0] == str(ROOT)


def test_without_a_copy_a_placeholder_is_told_before_anything_is_tried(tmp_path):
    done = run_cell(CELL.replace(linked(CELL)[0], PLACEHOLDER), tmp_path)
    words = "RuntimeError: upload the repository as folder qlora-by-hand, here or to your Drive (mo"
    assert words in done.stderr and "BEGIN" not in done.stdout and not list(tmp_path.iterdir())
    assert len(CELL.splitlines()) <= 32
    assert re.search(r'^REVISION = "v\d+\.\d+\.\d+"', CELL, re.MULTILINE), "not tomorrow's branch"


def test_a_copy_that_was_uploaded_or_lies_on_drive_is_found(tmp_path):
    (tmp_path / "empty").mkdir()
    for place, says in (("drive", "stored"), ("here", "uploaded")):
        write_helpers(tmp_path / place / "qlora-by-hand", says)
    cell = CELL.replace('"/content/drive/MyDrive"', repr(str(tmp_path / "drive")))
    for folder, shown in (("here", "uploaded"), ("empty", "stored")):
        done = run_cell(cell, tmp_path / folder)
        assert f"prepared\n{shown} revision\n" in done.stdout and "BEGIN" not in done.stdout


def test_an_empty_folder_gets_the_tagged_revision_and_no_other(tmp_path):
    origin, here = tmp_path / "origin", tmp_path / "here"
    here.mkdir()
    for number, tag in (("first", "v1.0.0"), ("second", "v1.0.1")):
        write_helpers(origin, number)
        git = ["git", "-C", origin, "-c", "user.name=t", "-c", "user.email=t@example.com"]
        for command in ("init --quiet", "add .", f"commit --quiet -m {number}", f"tag {tag}"):
            subprocess.run([*git, *command.split()], check=True)
    address = f'REPOSITORY = "file://{origin}"'
    cell = re.sub(r'^REPOSITORY = ".*"', address, CELL, flags=re.MULTILINE)
    wrong = run_cell(cell.replace('"v1.0.0"', '"v9.9.9"'), here)
    assert "v9.9.9 not found" in wrong.stderr and not list(here.iterdir())
    done, clone = run_cell(cell, here), here / "qlora-by-hand"
    assert f"prepared\nfirst revision\nROOT {clone}\n" in done.stdout, done.stderr
    history = ["git", "-C", clone, "rev-list", "--count", "HEAD"]
    assert subprocess.run(history, capture_output=True, text=True).stdout == "1\n"  # shallow
    again = run_cell(cell, here)  # Run All a second time: found, not fetched
    assert "first revision" in again.stdout and "BEGIN" not in again.stdout


def test_publishing_writes_every_address_keeps_the_contract_and_can_be_undone(tmp_path):
    copy = tmp_path / "copy"
    copy_checkout(copy)
    run = partial(python, cwd=copy, env={k: v for k, v in os.environ.items() if "XDIST" not in k})
    publish = partial(run, "tests/publish.py")

    def texts() -> dict[Path, bytes]:
        return {p: p.read_bytes() for kind in KINDS for p in copy.glob(kind) if p.is_file()}

    for wrong in ([], ["two words"], ["-a"], ["a", "b/c"], ["huggingface", "transformers"]):
        assert publish(*wrong).returncode == 1
    publish("OWNER")
    before = texts()
    tag = re.search('REVISION = "(.*)"', CELL)[1]
    assert f"git tag {tag}" in publish("ada", "q.1").stdout
    links = [name for text in texts().values() for name in linked(text.decode())]
    assert "ada/q.1" in links and PLACEHOLDER not in links
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_contract.py")
    assert done.returncode == 0, done.stdout
    publish("someone")
    publish("OWNER")
    assert texts() == before


PLACES = [
    ({"COLAB_RELEASE_TAG": "x", "COLAB_GPU": "1", "JPY_PARENT_PID": "7"}, "Colab"),
    ({"COLAB_RELEASE_TAG": "x", "COLAB_GPU": "", "VSCODE_PID": "3"}, "Colab"),
    ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "JPY_PARENT_PID": "7"}, "Kaggle"),
    ({"VSCODE_CWD": "/x", "JPY_PARENT_PID": "7"}, "VS Code"),
    ({"JPY_SESSION_NAME": "a.ipynb"}, "Jupyter"),
    ({}, "Python"),
]


@pytest.mark.parametrize(("variables", "expected"), PLACES)
def test_the_table_tells_the_place_and_no_path_or_host(monkeypatch, capsys, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.show_setup(profiles.PROFILES["tiny"])
    shown = capsys.readouterr().out
    assert f"place         {expected}\n" in shown
    names = "place python torch transformers peft bitsandbytes accelerate datasets GPU dtype RAM"
    rows = [line.split()[0] for line in shown.splitlines()]
    assert rows == [*names.split(), "disk", "profile"]
    assert "/" not in shown and os.uname().nodename not in shown


def test_runs_go_to_drive_only_where_it_is_mounted(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "DRIVE", tmp_path / "drive")
    assert environment.runs_folder() == ROOT / "runs"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    assert environment.runs_folder() == ROOT / "runs"
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    assert environment.runs_folder() == tmp_path / "drive" / "MyDrive" / "qlora-by-hand" / "runs"
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path))
    assert environment.runs_folder() == tmp_path


def test_what_colab_lacks_asks_for_nothing_that_would_replace_what_it_has():
    """What the pins require holds for Colab's versions, torch 2.11.0 among them."""
    text = (ROOT / "tests" / "requirements-colab.txt").read_text()
    have = dict(re.findall(r"^([\w-]+)==(.*)", text, re.MULTILINE))
    have |= {"torch": "2.11.0", "packaging": "25.0"}
    there = set(have) - set(COLAB_ADDS)
    assert [name for name in environment.NEEDED if name not in there] == COLAB_ADDS
    if os.environ.get("QLORA_NEWEST"):
        pytest.skip("the weekly run takes the pins off, and requirements are read as installed")
    for name in COLAB_ADDS:
        assert f"{name}=={version(name)}" in (ROOT / "requirements.txt").read_text().split()
        for needed in map(Requirement, requires(name) or []):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.specifier.contains(have[needed.name]), f"{name} replaces {needed}"


def test_a_package_that_would_replace_torch_is_not_added_and_elsewhere_none(monkeypatch, tmp_path):
    """One that Python lacks and the stand-in for pip has; test_fresh_clone.py sees one added."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    for folder in (wheels / "loralib", wheels / "loralib-0.1.2.dist-info", site):
        folder.mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: loralib\nVersion: 0.1.2\n"
    file = wheels / "loralib-0.1.2.dist-info" / "METADATA"
    find = environment.importlib.util.find_spec

    def found(name: str):
        return (site / name).exists() or None if name == "loralib" else find(name)

    monkeypatch.setattr(environment.importlib.util, "find_spec", found)
    paths = map(str, (FAKE_COLAB, site, os.environ.get("PYTHONPATH", "")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name, value in {"LOG": tmp_path / "log", "FROM": wheels, "TO": site}.items():
        monkeypatch.setenv(f"PIP_SHIM_{name}", str(value))
    words = r"lacks loralib==0.1.2: start with `make lab`, or run pip install -r requirements.txt"
    with pytest.raises(TutorialError, match=words):
        environment.prepare()
    assert not (tmp_path / "log").exists()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    file.write_text(metadata + "Requires-Dist: torch==2.3.0\n")
    words = r"pip could not add loralib==0.1.2 beside .* \(ERROR: torch==2.3.0 would replace"
    with pytest.raises(TutorialError, match=words):
        environment.prepare()
    assert environment.missing() == ["loralib==0.1.2"]
    file.write_text(metadata)
    environment.prepare()
    monkeypatch.setattr(subprocess, "run", None)
    environment.prepare()  # nothing is missing now: nothing is started


def test_what_stands_there_stays_if_its_exchange_fails(tmp_path):
    (old := tmp_path / "adapter").mkdir()
    with pytest.raises(TutorialError, match="not be written"), environment.replace_folder(old) as p:
        p.rmdir()
    assert list(tmp_path.iterdir()) == [old]


def test_of_several_processes_the_first_reports_and_each_tells_its_errors(monkeypatch, capsys):
    def work():
        print("a report")
        raise TutorialError("the card is full")

    monkeypatch.setenv("RANK", "1")
    assert environment.exit_status(work) == 1
    assert capsys.readouterr() == ("", "process 1: TutorialError: the card is full\n")
    assert environment.exit_status(lambda: (_ for _ in ()).throw(OutOfMemoryError())) == 1
    assert environment.MEMORY_RAN_OUT in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_the_work_in_one_sentence():
    program = "import helpers.environment as e; e.exit_status(lambda: print(' ' * 10**7))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **PIPES)
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == b"the output was closed: the work ends here\n"
