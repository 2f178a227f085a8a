"""No secret, person or machine is named in what is shipped; least of all in the outputs and metadata of notebooks."""

import getpass
import json
import platform
import re
import subprocess

import pytest

from tests.notebooks import NOTEBOOKS, ROOT, read, source

SECRETS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "GitHub token": r"\b(?:ghp|gho|ghs|ghr)_[A-Za-z0-9]{36}",
    "GitHub fine-grained token": r"\bgithub_pat_\w{30,}",
    "AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "OpenAI key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "password in an address": r"[a-z]+://[^\s/:@\"']+:[^\s/@\"']+@",
    "e-mail": r"\b[\w.+-]+@(?!example\.)[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|edu|io|ai|dev|de|fr|uk|cn|ae)\b",
    "home folder": r"(?:/home|/Users|/root|[A-Z]:\\+Users)[/\\]+\w+",
    "temporary folder": "/" + r"tmp/\w+",
}
PLANTED = {  # put together here, so that this file does not hold what the scan looks for
    "Hugging Face token": "hf_" + "a1B2" * 9,
    "GitHub token": "ghp_" + "a1B2" * 9,
    "GitHub fine-grained token": "github_pat_" + "a1B2" * 9,
    "AWS key": "AKIA" + "Z7" * 8,
    "Google key": "AIza" + "x" * 35,
    "OpenAI key": "sk-" + "a1B2" * 9,
    "Slack token": "xoxb-" + "a1B2" * 9,
    "web token": ".".join(["eyJ" + "a1B2" * 4] * 2 + ["c3D4" * 4]),
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "password in an address": "https://me:secret" + "@localhost/index",
    "e-mail": "alice.b" + "@mail-server.org",
    "home folder": "C:\\Users" + "\\alice\\data",
    "temporary folder": "/" + "tmp/run1",
}
SHIPPED = (".py", ".ipynb", ".md", ".json", ".jsonl", ".toml", ".txt", ".csv", ".yml", ".yaml", ".cfg", ".cff")


def secrets(text: str) -> list[str]:
    return [name for name, pattern in SECRETS.items() if re.search(pattern, text)]


def shipped() -> list:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    listed = [ROOT / name for name in names if name] or [p for p in ROOT.rglob("*") if not {".venv", ".git"} & set(p.parts)]
    return [path for path in listed if path.is_file() and path.suffix in SHIPPED]


@pytest.mark.parametrize("name", SECRETS)
def test_the_scan_finds_what_is_planted(name):
    notebook = json.dumps({"cells": [{"outputs": [{"text": [f"loaded {PLANTED[name]} and went on"]}]}]})
    assert secrets(notebook) == [name]


@pytest.mark.parametrize("folder", ["/home" + "/alice", "/Users" + "/alice", "/root" + "/work", "C:\\Users" + "\\alice"])
def test_the_scan_knows_the_folders_of_every_system(folder):
    assert secrets(json.dumps(folder)) == secrets(folder) == ["home folder"]


def test_nothing_that_is_shipped_holds_a_secret_or_a_machines_path():
    found = {path.name: names for path in shipped() if (names := secrets(path.read_text(encoding="utf-8", errors="ignore")))}
    found.pop("test_contract.py", None)  # names the patterns that it looks for in outputs
    assert not found


def stored(notebook: dict) -> str:
    """A notebook's outputs and metadata: all of it that its author did not write."""
    cells = [{"outputs": cell.get("outputs"), "metadata": cell["metadata"]} for cell in notebook["cells"]]
    return json.dumps([notebook["metadata"], cells])


def named(text: str, names: set[str], vocabulary: str) -> set[str]:
    """The names that stand in a text as words of their own; a name that the lessons use as a word (a user "falcon") says nothing."""

    def holds(where: str, name: str) -> bool:
        return bool(re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", where, re.IGNORECASE))

    return {name for name in names if len(name) > 3 and holds(text, name) and not holds(vocabulary, name)}


def test_no_output_names_this_machine_or_its_user():
    """Outputs are written where `make refresh` runs, which is where this test runs too before they are committed."""
    here = {platform.node(), platform.node().partition(".")[0], getpass.getuser()} - {"localhost", "root"}
    vocabulary = " ".join(source(cell) for path in NOTEBOOKS for cell in read(path)["cells"])
    for path in NOTEBOOKS:
        assert not named(stored(read(path)), here, vocabulary), path.name


def test_a_machine_that_is_named_is_found():
    notebook = read(NOTEBOOKS[0])
    next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")["metadata"]["host"] = "gpu-box-17.lab"
    assert named(stored(notebook), {"gpu-box-17", "matrix"}, "a matrix") == {"gpu-box-17"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_hold_text_and_pictures_and_nothing_that_runs_in_a_browser(path):
    outputs = [output for cell in read(path)["cells"] for output in cell.get("outputs", [])]
    assert {mime for output in outputs for mime in output.get("data", {})} <= {"text/plain", "text/markdown", "image/png"}
    assert not re.search(
        r"<\s*(?:script|iframe|object|embed)|javascript:|\bon\w+\s*=\s*[\"']", json.dumps(outputs), re.IGNORECASE
    )
