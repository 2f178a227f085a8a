"""The planted faults stay plantable: code that moves takes its fault along. `make mutations` tries them."""

import json

import pytest

from tests import mutations


def test_there_are_enough_and_each_has_its_own_name():
    names = [name for name, *_ in mutations.FAULTS]
    assert len(names) == len(set(names)) >= 25


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: fault[0])
def test_its_text_stands_once_and_its_tests_exist(fault):
    _, file, text, replacement, tests = fault
    for test in tests.split():
        assert (mutations.ROOT / "tests" / test).is_file()
    assert text != replacement
    if replacement != "LEAK":
        stored = json.dumps(text)[1:-1] if file.endswith(".ipynb") else text
        assert (mutations.ROOT / file).read_text(encoding="utf-8").count(stored) == 1, f"{text!r} in {file}"


def test_a_text_that_moved_is_told(tmp_path):
    (tmp_path / "module.py").write_text("a = 1\n")
    with pytest.raises(LookupError, match="'b = 1' stands 0 times in module.py"):
        mutations.plant(tmp_path, "module.py", "b = 1", "b = 2")
