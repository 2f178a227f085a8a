"""Killed at random moments, every run ends where an undisturbed one does; killed at any file operation, what was there stays whole."""

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path

import pytest

from helpers import checkpoints, files, loading, results
from helpers.errors import OutputError
from tests import kills
from tests.notebooks import ROOT
from tests.soak_record import SOAK, quotes

# --- the fine-tune ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return kills.reference(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *((phase, signal.SIGKILL) for phase in (*kills.PHASES, "checkpoint writing")),
        ("final save", signal.SIGINT),  # during training: test_finetune.py
    ],
)
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(known, tmp_path, phase, number):
    found = kills.disturbed(tmp_path, known, phase, number, f"ci {phase}")
    assert not found["faults"]
    if phase == "final save":
        assert found["resumed"] == f"checkpoint-{kills.STEPS}"


def test_a_fault_is_seen(known, tmp_path):
    """The comparison that the tests above rest on, tried on folders that are wrong."""
    folder = kills.with_earlier(tmp_path / "run", known.earlier)
    assert not kills.faults_after_the_strike(folder, known)
    assert kills.faults_at_the_end(folder, known)[0] == "another adapter"
    for path in (known.earlier.parent / "undisturbed" / "adapter").iterdir():
        (folder / "adapter" / path.name).write_bytes(path.read_bytes())
    assert kills.faults_after_the_strike(folder, known) == ["a results.json of another adapter"]
    with (folder / "adapter" / "adapter_model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    assert kills.faults_after_the_strike(folder, known) == ["an adapter that neither run wrote"]
    files.remove(folder / "adapter")
    assert kills.faults_after_the_strike(folder, known) == ["the adapter before was lost"]
    (folder / "results.json.1.part").write_text("{")
    assert "left behind: results.json.1.part" in kills.faults_at_the_end(folder, known)


def test_half_checkpoints_do_not_push_out_sound_ones(tmp_path):
    """The Trainer keeps the newest two, sound or not: what is not sound has to go before it saves the next."""
    for step, sound in ((4, True), (8, False), (12, False)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("whole" if sound else "ha")
        if sound:
            checkpoints.seal(checkpoint, "me")
    (tmp_path / "checkpoint-12.123456789.part").mkdir()
    checkpoints.discard_unsound(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


# --- files and folders --------------------------------------------------------------------------------------------------------


OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}


def write_folder(folder: Path, text: str) -> None:
    with files.whole_folder(folder, [folder.with_name("told")]) as part:
        for name in ("a", "b"):
            (part / name).write_text(text)


def killed_at(count: int, write, path: Path, text: str) -> None:
    """In a process of its own: write, and die by SIGKILL just before file operation number `count`."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    write(path, text)


def strikes(write, path: Path):
    """Kill a process that writes "new" over "old" before its first file operation, its second, and so on until one lives to the end."""
    for count in range(1, 200):
        write(path, "old")
        path.with_name("told").write_text("old")
        process = kills.CONTEXT.Process(target=killed_at, args=(count, write, path, "new"))
        process.start()
        process.join()
        yield process.exitcode
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL


def test_a_file_is_old_or_new_wherever_its_writer_is_killed(tmp_path):
    path, seen = tmp_path / "file", set()
    for _ in strikes(files.write_text, path):
        seen.add(path.read_text())
        files.clean(path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "told"]
    assert seen == {"old", "new"}


def test_a_folder_is_old_or_new_wherever_its_writer_is_killed(tmp_path):
    folder, seen, moments = tmp_path / "folder", set(), 0
    for _ in strikes(write_folder, folder):
        moments += 1
        told = (tmp_path / "told").exists()
        seen.add("moved aside" if not folder.exists() else "in its place")
        files.clean(folder)
        contents = {p.read_text() for p in folder.iterdir()}
        assert {p.name for p in folder.iterdir()} == {"a", "b"} and len(contents) == 1
        assert contents == {"old"} or not told  # what tells of the old folder never stands beside the new one
        seen |= contents
        assert {p.name for p in tmp_path.iterdir()} <= {"folder", "told"}
    assert seen == {"old", "new", "moved aside", "in its place"} and moments > 15


def test_what_belongs_to_others_stays(tmp_path):
    """Only the temporary names of the named path are cleaned up, and not those of a process that still runs."""
    names = ["notes.old", "adapter.zip.part", f"adapter.{os.getppid()}.part", "my.adapter.1.part"]
    for name in [*names, "adapter.part", f"adapter.{os.getpid()}.part", "adapter.999999999.old"]:
        (tmp_path / name).mkdir()
    (tmp_path / "adapter").mkdir()
    files.clean(tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "adapter"])


def fail_halfway(write, path: Path) -> None:
    with write(path) as part:
        (part / "a" if part.is_dir() else part).write_text("new")
        raise ZeroDivisionError


def test_an_error_leaves_what_was_there(tmp_path):
    write_folder(tmp_path / "folder", "old")
    (tmp_path / "told").write_text("old")
    for write in (files.whole_folder, files.whole_file):
        with pytest.raises(ZeroDivisionError):
            fail_halfway(write, tmp_path / ("folder" if write is files.whole_folder else "told"))
    assert {p.name: p.read_text() for p in (tmp_path / "folder").iterdir()} == {"a": "old", "b": "old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "told"] and (tmp_path / "told").read_text() == "old"


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path):
    write_folder(tmp_path / "folder", "old")
    with pytest.raises(FileNotFoundError):
        files.put_in_place(tmp_path / "missing", tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"] and (tmp_path / "folder" / "a").read_text() == "old"


# --- a disk that is full when the adapter is saved --------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """Call it: from then on no file of more than 100 kB can be written."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_run_that_cannot_save_its_adapter_leaves_the_one_before(base, tiny, tmp_path, full_disk):
    folder = loading.save_adapter(loading.attach_lora(base, tiny), tmp_path / "adapter")
    results.write({"seed": 0}, tmp_path)
    before = kills.adapter(tmp_path)
    assert len(before) >= 3
    full_disk()
    other = loading.attach_lora(loading.load_base(tiny), tiny, seed=1)
    with pytest.raises(
        OutputError, match="adapter could not be written to .*: make room on that disk, then run the same command"
    ):
        loading.save_adapter(other, folder)
    assert kills.adapter(tmp_path) == before and json.loads((tmp_path / "results.json").read_text()) == {"seed": 0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "results.json"]


def test_a_new_adapter_takes_the_record_of_the_one_before_with_it(base, tiny, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    loading.save_adapter(loading.attach_lora(base, tiny), tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_a_killed_run_left_aside_is_found_again(base, tiny, tmp_path):
    folder = loading.save_adapter(loading.attach_lora(base, tiny), tmp_path / "adapter")
    folder.rename(tmp_path / "adapter.999999999.old")
    loading.check_adapter(folder, tiny, base.config)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_results_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="results.json could not be written to .*: make room"):
        results.write({}, tmp_path / "file")


def test_what_is_read_back_is_written_through_one_module():
    """No module but helpers.files writes a file by itself, or renames one, besides those that are named with their reason."""
    direct = r"\.write_text\(|\.write_bytes\(|open\([^)]*[\"'][wa]b?[\"']|os\.re(place|name)\(|torch\.save\("
    allowed = {
        "probe.write_text(",  # tries whether the folder can be written
        "constraints.write_text(",  # pip's, in a temporary folder
        'path.open("a"',  # study.csv grows by whole lines; a line that was cut off is repaired
    }
    for path in (ROOT / "helpers").rglob("*.py"):
        for line in path.read_text().splitlines():
            if path.name != "files.py" and re.search(direct, line) and not any(text in line for text in allowed):
                # through helpers.files, or into what one of its functions hands out
                assert re.search(r"\bfiles\.write_text\(|\(part / |\bpart\.open\(|, part\)", line), f"{path.name}: {line.strip()}"


def test_the_page_quotes_what_the_soak_measured():
    page, soak = " ".join((ROOT / "tests" / "README.md").read_text().split()), json.loads(SOAK.read_text())
    for sentence in quotes(soak):
        assert sentence in page, sentence
    for name, least in (("sigkill", 30), ("sigint", 10)):
        found = soak["kills"][name]
        assert found["ended_as_undisturbed"] == found["runs"] >= least and not found["faults"]
        assert set(found["by_phase"]) == set(kills.PHASES) and found["resumed"] and found["started_again"]
    assert soak["kills"]["sigkill"]["found_half_written"] > 0
    repeats = soak["repeats"]
    assert repeats["passed"] == repeats["repeats"] >= 50 and not repeats["failures"]
