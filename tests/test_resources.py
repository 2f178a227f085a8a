"""Disk, memory and permissions that run out, for real: small file systems are mounted, the address space is limited; else a test says why it skips."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import checkpoints, hub, loading, profiles, quantized_cache, training, weights
from helpers.errors import ModelError, OutputError
from helpers.study import rows as study_rows
from tests.notebooks import ROOT

SHORT = dataclasses.replace(profiles.PROFILES["tiny"], max_steps=2, save_steps=1, micro_batch=2)


@pytest.fixture
def disk(tmp_path):
    """disk(bytes) mounts a file system of that size and returns its folder."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Another program's file that leaves about `leave` bytes of the disk."""
    other = folder / "another program's file"
    free = os.statvfs(folder)
    other.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return other


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "answer": "yes"}) + "\n" for i in range(20)))
    return str(path)


@pytest.fixture
def room(monkeypatch):
    """The disk seems to have room when the run begins: another program fills it afterwards."""
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**15))


def is_whole(folder: Path) -> None:
    """What a reader may rely on in a run's folder: nothing half-written, every checkpoint sound, results only beside their adapter."""
    assert not [path for path in folder.rglob("*") if ".part" in path.name or ".old" in path.name]
    assert all(checkpoints.is_sound(path) for path in (folder / "checkpoints").glob("checkpoint-*"))
    if (folder / "adapter").exists():
        loading.check_adapter(folder / "adapter", SHORT, loading.load_config(SHORT))
    if (folder / "results.json").exists():
        assert json.loads((folder / "results.json").read_text())["steps"] == SHORT.max_steps


def outcome(arguments: dict) -> str:
    """ "finished", or which write the disk refused; the error names the place and the way out."""
    try:
        training.run(SHORT, **arguments)
    except OutputError as error:
        text = str(error)
    else:
        return "finished"
    assert "disk0" in text and ("make room" in text or "choose another" in text), text
    return text.split()[0]


def test_a_disk_that_fills_up_at_any_write_of_a_run_is_told_and_leaves_nothing_half(disk, data, room, capsys):
    """The whole run on a disk with less and less room: each size stops it at another write, from the last to the first."""
    told, place = set(), disk(16_000_000)
    for leave in (8_000_000, 4_000_000, 3_000_000, 2_200_000, 1_600_000, 1_000_000, 500_000, 100_000, 0):
        shutil.rmtree(place / "run", ignore_errors=True)
        other = fill(place, leave)
        arguments = {"output": place / "run", "data": data, "scoring": False}
        told.add(outcome(arguments))
        is_whole(place / "run")
        other.unlink()
        training.run(SHORT, **arguments, resume=True)  # with room again the same command goes through
        assert (place / "run" / "results.json").exists()
    assert "finished" in told and {word for word in told if word.startswith("checkpoint-")} and len(told) >= 3, told


def small_model(folder: Path) -> Path:
    """The tiny Falcon with pickled weights."""
    shutil.copytree(ROOT / "data" / "tiny-falcon", folder / "model", dirs_exist_ok=True)
    torch.save(load_file(folder / "model" / "model.safetensors"), folder / "model" / "pytorch_model.bin")
    (folder / "model" / "model.safetensors").unlink()
    return folder / "model"


WRITERS = {
    "conversion": lambda folder: weights.convert_pickled(folder / "model"),
    "4-bit copy": lambda folder: quantized_cache.load_base(profiles.PROFILES["tiny"], folder / "cache"),
    "study row": lambda folder: study_rows.append(folder / "study.csv", {"experiment": "grid " * 2000}),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITERS)
def test_every_other_write_on_a_full_disk_is_told_and_leaves_nothing(disk, room, what):
    place = disk(8_000_000)
    if what == "conversion":
        small_model(place)
    before = {path.name for path in place.rglob("*") if path.is_file()}
    other = fill(place, 0)
    with pytest.raises(OutputError, match="disk0.*(make room|choose another|free some)"):
        WRITERS[what](place)
    assert {path.name for path in place.rglob("*") if path.is_file()} - {other.name} <= before | {"study.csv"}
    assert what != "study row" or study_rows.read_rows(place / "study.csv", repair=True) == []
    other.unlink()
    WRITERS[what](place)


def test_a_read_only_disk_is_told_before_anything_is_loaded(disk, data, monkeypatch, capsys):
    place = disk(1_000_000)
    (place / "run").mkdir()
    read_only(place)
    monkeypatch.setattr(loading, "load_base", lambda *a, **k: pytest.fail("a model was loaded first"))
    for folder in ("run", "new"):
        assert training.main(["--data", data, "--output", str(place / folder)]) == 1
        assert f"OutputError: the output folder '{place / folder}' cannot be written (Read-only file system): choose another" in capsys.readouterr().err  # fmt: skip
    assert training.main(["--data", data, "--output", str(place.parent / "run"), "--no-scoring", "--cache-4bit", str(place)]) == 1
    assert "is no folder or is read-only: choose another folder for the 4-bit copy" in capsys.readouterr().err


def test_the_disk_of_the_hubs_cache_fills_up():
    """Whatever huggingface_hub makes of it, its cause is found, and with it the way out."""
    wrapped = ModelError("x")
    wrapped.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert hub.way_out(wrapped) == "the disk is full, make room or set HF_HOME to a folder on another one"


# Loads the tiny Falcon with `sys.argv[1]` bytes of address space more than the process has once everything is imported.
LIMITED = """
import resource, sys
from helpers import command, loading, profiles
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]),) * 2)
sys.exit(command.status(lambda: print(loading.prove_4bit(loading.load_base(profiles.PROFILES["tiny"]))), "interrupted"))
"""


@pytest.mark.parametrize(("spare", "status"), [(200_000, 1), (2_000_000_000, 0)])
def test_too_little_memory_is_told_while_the_model_is_loaded(spare, status):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(spare)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-1500:]
    if status:
        assert "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ResourceError: ") and "close other programs" in last
    else:
        assert "linear4bit_modules=16" in done.stdout
