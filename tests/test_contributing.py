"""What CONTRIBUTING tells people to do can be done; forms and citation keep their schemas; the commit hooks run and find what they are for."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.notebooks import NOTEBOOKS, ROOT, read
from tests.schemas import against_schema

PAGES = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "tests" / "README.md",
    ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md",
]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_is_named_exists(page):
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in re.findall(r"^make [^\n#]+|`make [^`]+`", page.read_text(encoding="utf-8"), re.MULTILINE):
        named = [word for word in shlex.split(command.strip("`"))[1:] if "=" not in word and word != ".venv/ready"]
        assert set(named) <= targets, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    for name in re.findall(r"\b(?:notebooks|helpers|data|tests)/[\w./-]*\w", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_the_tests_that_are_named_are_there():
    """Read, not collected: collecting loads torch and transformers."""
    text, makefile = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), (ROOT / "Makefile").read_text()
    commands = [shlex.split(line) for line in re.findall(r"\.venv/bin/python -m pytest ([^`\n]*)", text)]
    assert len(commands) == 3
    for command in commands:
        (file,) = (word for word in command if word.endswith((".py", ".ipynb")))
        assert (ROOT / file).is_file()
        if "-k" in command:
            word = command[command.index("-k") + 1]
            assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), re.MULTILINE), word
        assert all(word in makefile for word in command if word.startswith("--"))


def test_forms_and_citation_keep_their_schemas():
    forms = [path for path in FORMS if path.name != "config.yml"]
    assert len(forms) == 3
    for schema, paths in (
        ("github-issue-forms", forms),
        ("github-issue-config", [FORMS[0].with_name("config.yml")]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ):
        done = against_schema(schema, *paths)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("sound", "broken"), [("type: dropdown", "type: menu"), ("label: What", "lable: What")])
def test_the_schema_refuses_a_broken_form(sound, broken, tmp_path):
    text = FORMS[0].with_name("bug.yml").read_text()
    assert sound in text
    (tmp_path / "bug.yml").write_text(text.replace(sound, broken))
    assert against_schema("github-issue-forms", tmp_path / "bug.yml").exit_code == 1


def test_the_citation_names_the_version_that_the_setup_cell_fetches():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'"v{citation["version"]}"' in (ROOT / "tests" / "setup_cell.py").read_text()
    assert citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def hook(name: str, *files: Path) -> subprocess.CompletedProcess:
    """Run a hook's entry on files, as pre-commit does, with this Python's environment in the place of .venv."""
    command = (
        HOOKS[name]["entry"].replace(".venv/bin/python", sys.executable).replace(".venv/bin/ruff", f"{sys.executable} -m ruff")
    )
    return subprocess.run([*shlex.split(command), *map(str, files)], cwd=ROOT, capture_output=True, text=True)


def test_every_hook_runs_from_the_environment_and_fetches_nothing():
    for one in HOOKS.values():
        assert set(one) <= {"id", "name", "entry", "language", "types", "types_or"}
        assert one["language"] == "system" and one["entry"].startswith(".venv/bin/")
    assert len(yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]) == 1


def test_the_ruff_hooks_find_what_they_are_for(tmp_path):
    (tmp_path / "untidy.py").write_text("import os\nx = {'a':1}\n")
    assert hook("ruff-check", tmp_path / "untidy.py").returncode == 1
    assert hook("ruff-format", tmp_path / "untidy.py").returncode == 0
    assert '{"a": 1}' in (tmp_path / "untidy.py").read_text()


def test_the_scrubbing_hook_takes_out_what_saving_in_jupyter_adds(tmp_path):
    stored = NOTEBOOKS[0]
    sound, saved = tmp_path / "sound.ipynb", tmp_path / "saved.ipynb"
    shutil.copy(stored, sound)
    notebook = read(stored)
    notebook["metadata"]["language_info"]["version"] = "3.11.7"
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell["metadata"]["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    cell["outputs"].append({"output_type": "stream", "name": "stderr", "text": ["a warning of this machine\n"]})
    saved.write_text(json.dumps(notebook))
    done = hook("scrubbed", sound, saved)
    assert done.returncode == 1
    assert "saved.ipynb" in done.stderr and "sound.ipynb" not in done.stderr
    assert read(saved) == read(stored)
    assert sound.read_bytes() == stored.read_bytes()
