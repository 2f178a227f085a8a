"""The setup cell: in a checkout, in an empty folder, on Colab, Kaggle, VS Code and plain Jupyter; and what it may ask of pip."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers import environment, setup
from helpers.errors import SetupError
from tests.notebooks import ROOT, SETUP_CELL

CELL = SETUP_CELL.read_text(encoding="utf-8")
FAKE_COLAB = ROOT / "tests" / "fake_colab"
COLAB_ADDS = ("bitsandbytes", "loralib")  # what googlecolab/backend-info does not list
PLACE_VARIABLES = [variable for variables in environment.PLACES.values() for variable in variables]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for variable in PLACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def run_cell(cell: str, folder: Path, **variables) -> subprocess.CompletedProcess:
    """The cell in a Python of its own that starts in `folder`, with an audit of every process it starts."""
    audit = 'import sys\nsys.addaudithook(lambda e, a: e == "subprocess.Popen" and print("STARTED", a[1]))\n'
    return subprocess.run(
        [sys.executable, "-c", audit + cell + "\nprint('ROOT', root)"],
        cwd=folder, env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip


# --- a checkout -------------------------------------------------------------------------------------------------------------


def test_a_checkout_is_found_from_any_folder_and_nothing_is_started(monkeypatch, capsys):
    path, finding = sys.path[:], CELL.partition("from helpers.environment")[0]
    for folder in (ROOT, ROOT / "notebooks", ROOT / "data" / "tickets", ROOT.parent):
        if folder == ROOT.parent and ROOT.name != "qlora-by-hand":
            continue
        monkeypatch.chdir(folder)
        namespace = {}
        exec(finding.replace("import subprocess", "subprocess = None"), namespace)  # noqa: S102 - the cell; it may start nothing
        assert namespace["root"] == ROOT
        assert sys.path[0] == str(ROOT)
    sys.path[:] = path


def test_the_cell_is_short():
    assert len(CELL.splitlines()) <= 30


# --- no checkout ------------------------------------------------------------------------------------------------------------


def test_a_placeholder_is_told_before_anything_is_tried(tmp_path):
    done = run_cell(CELL, tmp_path)
    assert "RuntimeError: https://github.com/OWNER/qlora-by-hand is a placeholder: put the address of your copy" in done.stderr
    assert "STARTED" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository with two commits and a tag at the first, in which helpers only say that they were called."""
    folder = tmp_path_factory.mktemp("origin") / "qlora-by-hand"
    (folder / "helpers").mkdir(parents=True)
    (folder / "helpers" / "__init__.py").write_text("")
    (folder / "helpers" / "environment.py").write_text("def prepare():\n    print('prepared')\n")

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        return subprocess.run(
            ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    commits = []
    for number in ("first", "second"):
        (folder / "helpers" / "setup.py").write_text(f"def show_setup():\n    print('{number} revision')\n")
        git("add", ".")
        git("commit", "--quiet", "-m", number)
        commits.append(git("rev-parse", "HEAD"))
    git("tag", "v1.2.3", commits[0])
    return f"file://{folder}", commits


def pointed_at(repository: str, revision: str) -> str:
    cell, count = re.subn(
        r'^REPOSITORY, REVISION = "[^"]*", "[^"]*"', f'REPOSITORY, REVISION = "{repository}", "{revision}"', CELL, flags=re.M
    )
    assert count == 1, "one line names the repository and the revision"
    return cell


@pytest.mark.parametrize(
    ("revision", "shown"), [("v1.2.3", "first"), (0, "first"), (1, "second")], ids=["tag", "commit", "newest"]
)
def test_an_empty_folder_gets_the_named_revision_shallow(origin, tmp_path, revision, shown):
    address, commits = origin
    cell = pointed_at(address, commits[revision] if isinstance(revision, int) else revision)
    done = run_cell(cell, tmp_path)
    assert f"prepared\n{shown} revision\nROOT {tmp_path / 'qlora-by-hand'}\n" in done.stdout, done.stderr
    log = subprocess.run(
        ["git", "-C", tmp_path / "qlora-by-hand", "rev-list", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert log.split() == [commits[0] if shown == "first" else commits[1]]  # this one commit, no history
    again = run_cell(cell, tmp_path)  # Run All a second time: found, not fetched
    assert f"{shown} revision" in again.stdout and "STARTED" not in again.stdout


def test_a_revision_that_is_not_there_is_told_and_a_second_try_works(origin, tmp_path):
    address, commits = origin
    done = run_cell(pointed_at(address, "v9.9.9"), tmp_path)
    assert re.search(r"RuntimeError: file://.* at v9.9.9 could not be fetched: check both names and the network", done.stderr)
    assert "second revision" in run_cell(pointed_at(address, commits[1]), tmp_path).stdout


def test_the_revision_is_fixed():
    """A branch would give tomorrow's helpers to today's notebook."""
    revision = re.search(r'^REPOSITORY, REVISION = "[^"]*", "([^"]*)"', CELL, re.M).group(1)
    assert re.fullmatch(r"v\d+\.\d+\.\d+|[0-9a-f]{40}", revision)


# --- places -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"COLAB_RELEASE_TAG": "release-colab_20260819", "COLAB_GPU": "1", "JPY_PARENT_PID": "7"}, "Colab"),
        ({"COLAB_RELEASE_TAG": "release-colab_20260819", "COLAB_GPU": "", "VSCODE_PID": "3"}, "Colab"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "JPY_PARENT_PID": "7"}, "Kaggle"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "Kaggle"),
        ({"VSCODE_CWD": "/x", "JPY_PARENT_PID": "7"}, "VS Code"),
        ({"JPY_SESSION_NAME": "a.ipynb"}, "Jupyter"),
        ({"JPY_PARENT_PID": "7"}, "Jupyter"),
        ({}, "Python"),
    ],
)
def test_places_are_told_apart_by_their_variables(monkeypatch, capsys, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.place() == expected
    setup.show_setup()
    assert f"place         {expected}\n" in capsys.readouterr().out


def test_the_table_names_no_path_and_no_host(capsys):
    setup.show_setup()
    shown = capsys.readouterr().out
    names = [line.split()[0] for line in shown.splitlines()]
    assert names == ["place", "python", "torch", "transformers", "peft", "bitsandbytes", "GPU", "dtype", "RAM", "disk", "profile"]
    assert "/" not in shown
    assert os.uname().nodename not in shown


def test_the_table_is_in_no_compared_output():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if "show_setup" in "".join(cell["source"]):
                assert "NBVAL_CHECK_OUTPUT" not in "".join(cell["source"])


# --- packages ---------------------------------------------------------------------------------------------------------------


def test_every_needed_package_has_a_pin_and_is_imported_by_its_own_name():
    assert set(environment.NEEDED) <= set(environment.pins())
    assert environment.missing() == []


def test_where_nothing_is_missing_nothing_is_started(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.setattr(subprocess, "run", None)
    environment.prepare()


def colab_versions() -> dict[str, str]:
    """What Colab has preinstalled: tests/requirements-colab.txt, with the torch of Colab's image."""
    lines = (ROOT / "tests" / "requirements-colab.txt").read_text().splitlines()
    found = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name: v for name, v in found.items() if name not in COLAB_ADDS} | {"torch": "2.11.0", "packaging": "25.0"}


def test_what_colab_lacks_asks_for_nothing_that_would_replace_what_it_has():
    """The pins' own requirements hold for Colab's versions, torch 2.11.0 among them, and none of the pins is of a package it has."""
    have = colab_versions()
    absent = [name for name in environment.NEEDED if name not in have and name != "tqdm"]  # tqdm comes with several of the others
    assert absent == list(COLAB_ADDS)
    for name in absent:
        if os.environ.get("QLORA_NEWEST"):
            pytest.skip("the weekly run has newer packages than the pins, so the requirements of the pins cannot be read here")
        assert environment.pins()[name] == f"{name}=={version(name)}", (
            "the requirements of the pin are read from its installation"
        )
        for needed in map(Requirement, requires(name) or []):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.specifier.contains(have[needed.name]), f"{name} would replace {needed.name} {have[needed.name]}"


@pytest.fixture
def lacking(monkeypatch, tmp_path):
    """Two packages too many: one that the stand-in for pip can find, one that nobody can. Returns the log of its calls."""
    (tmp_path / "wheels" / "qlora_extra").mkdir(parents=True)
    (tmp_path / "wheels" / "qlora_extra" / "__init__.py").write_text("")
    info = tmp_path / "wheels" / "qlora_extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qlora_extra\nVersion: 1.0\nRequires-Dist: torch>=2\n")
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (FAKE_COLAB, site, os.environ.get("PYTHONPATH", "")))))
    for name, value in {"LOG": tmp_path / "log", "FROM": tmp_path / "wheels", "TO": site}.items():
        monkeypatch.setenv(f"PIP_SHIM_{name}", str(value))
    monkeypatch.setattr(environment, "NEEDED", (*environment.NEEDED, "qlora_extra"))
    tested = environment.pins()
    monkeypatch.setattr(environment, "pins", lambda: tested | {"qlora_extra": "qlora_extra==1.0"})
    return tmp_path / "log", info


def test_on_colab_only_the_missing_package_is_asked_for(monkeypatch, lacking):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    environment.prepare()
    (call,) = map(json.loads, lacking[0].read_text().splitlines())
    assert call["wanted"] == ["qlora_extra==1.0"]
    assert f"torch=={version('torch')}" in call["constraints"]
    assert not {"--upgrade", "-U", "--force-reinstall"} & set(call["arguments"])
    assert environment.missing() == []


def test_a_package_that_would_replace_torch_is_not_added(monkeypatch, lacking):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    log, info = lacking
    (info / "METADATA").write_text((info / "METADATA").read_text().replace("torch>=2", "torch==2.3.0"))
    with pytest.raises(
        SetupError, match=r"pip could not add qlora_extra==1.0 beside what is installed \(ERROR: torch==2.3.0 would replace"
    ):
        environment.prepare()
    assert environment.missing() == ["qlora_extra==1.0"]


@pytest.mark.parametrize("variable", [None, "VSCODE_PID", "JPY_SESSION_NAME"])
def test_elsewhere_nothing_is_installed_and_the_way_is_told(monkeypatch, lacking, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(
        SetupError, match=r"lacks qlora_extra==1.0: start with `make lab`, or run pip install -r requirements.txt"
    ):
        environment.prepare()
    assert not lacking[0].exists()


# --- Drive ------------------------------------------------------------------------------------------------------------------


def test_runs_go_to_drive_only_where_it_is_mounted(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(FAKE_COLAB))
    monkeypatch.setattr(environment, "DRIVE", tmp_path / "drive")
    assert environment.runs_folder() == ROOT / "runs"
    with pytest.raises(SetupError, match="can be mounted on Colab only and this is Python: set DRIVE = False"):
        environment.mount_drive()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    assert environment.runs_folder() == ROOT / "runs"
    environment.mount_drive()
    assert environment.runs_folder() == tmp_path / "drive" / "MyDrive" / "qlora-by-hand" / "runs"
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    assert environment.runs_folder() == ROOT / "runs"
