"""The reports of data/upstream: their script prints what they say, and their change repairs it."""

import os
import re

import pytest

from tests.notebooks import ROOT, python

REPORTS = [path for path in (ROOT / "data" / "upstream").glob("*.md") if path.name != "README.md"]
PATCH = """import importlib, pathlib
for name, old, new in {patches!r}:
    module = importlib.import_module(name)
    code = pathlib.Path(module.__file__).read_text()
    assert code.count(old) == 1, name
    exec(compile(code.replace(old, new), module.__file__, "exec"), vars(module))
"""


def changes(diff: str) -> list[tuple[str, str, str]]:
    """(module, old code, new code) of each file of a report's diff."""
    found = re.findall(r"--- (\S+)\.py\n((?:-.*\n)+)((?:\+.*\n)+)", diff)
    cut = [[re.sub("^[-+]", "", code, flags=re.MULTILINE) for code in codes] for _, *codes in found]
    return [(name.replace("/", "."), *codes) for (name, *_), codes in zip(found, cut, strict=True)]


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_the_script_prints_what_the_report_says_before_and_after_its_change(report):
    blocks = re.findall(r"```(\w+)\n(.*?)```", report.read_text(encoding="utf-8"), re.DOTALL)
    (_, script), (_, before), (_, diff), (_, after) = blocks
    for code, wanted in ((script, before), (PATCH.format(patches=changes(diff)) + script, after)):
        done = python("-c", code, env=os.environ | {"PYTHONWARNINGS": "ignore"})
        assert done.returncode == 0, done.stderr
        said, promised = (text.splitlines()[1:] for text in (done.stdout, wanted))
        assert said == promised  # the first line names the versions
