"""What a session on Colab survives: no room for a download, a damaged file, a gated model, a disconnect; and what it says of time left."""

import getpass
import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import httpx
import psutil
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from helpers import checkpoints, forecast, hub, loading, memory, profiles
from helpers.errors import ModelError, ResourceError
from tests.notebooks import ROOT

T4 = profiles.PROFILES["colab-t4"]
FALCON = memory.known_config(profiles.FALCON_7B)


# --- room, before the download ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty hub cache, and as much disk and RAM as a test says (in GB)."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def room(disk: float, ram: float) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(disk * 1e9)))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(ram * 1e9)))

    room(100, 100)
    return room


def test_the_download_is_as_large_as_the_hub_says():
    assert hub.download_bytes(FALCON) == pytest.approx(9.95e9 + 4.48e9, rel=0.01)  # the two shards on the model's page


def test_colabs_t4_machine_has_room(cache):
    cache(disk=60, ram=11)  # free of 12.7 GB of RAM
    hub.check_room(T4, FALCON)


def test_too_little_disk_is_told_with_both_figures(cache):
    cache(disk=9, ram=100)
    with pytest.raises(
        ResourceError, match=r"'tiiuae/falcon-7b' needs 15.4 GB of disk and 9.0 GB are free: free some, or set HF_HOME"
    ):
        hub.check_room(T4, FALCON)


def test_what_is_already_here_is_not_needed_again(cache):
    snapshot = hub.snapshot(T4)
    snapshot.mkdir(parents=True)
    with open(snapshot / "model-00001-of-00002.safetensors", "wb") as shard:
        shard.truncate(10 * 10**9)  # sparse: takes no disk
    cache(disk=9, ram=100)
    hub.check_room(T4, FALCON)


def test_too_little_ram_is_told_with_both_figures(cache):
    cache(disk=100, ram=2)
    with pytest.raises(
        ResourceError, match=r"needs 3.0 GB of RAM with profile 'colab-t4' and 2.0 GB are free: close other programs"
    ):
        hub.check_room(T4, FALCON)
    cache(disk=100, ram=5)
    with pytest.raises(ResourceError, match=r"GB of RAM with profile 'cpu-7b' and 5.0 GB are free: .* use profile 'tiny'"):
        hub.check_room(profiles.PROFILES["cpu-7b"], FALCON)


def test_nothing_is_asked_for_a_model_of_this_repository(cache, tiny):
    cache(disk=0, ram=0)
    hub.fetch(tiny, loading.load_config(tiny))


def test_room_is_checked_before_the_download(cache, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)  # would be a TypeError
    cache(disk=1, ram=100)
    with pytest.raises(ResourceError):
        hub.fetch(T4, FALCON)


# --- files, after it ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def downloaded(cache):
    """A snapshot of two small shards and their index, as the hub's cache lays it out: links to files named by their sha256."""
    folder = hub.snapshot(T4)
    blobs = folder.parent.parent / "blobs"
    for path in (folder, blobs):
        path.mkdir(parents=True)
    for name, content in {"a.safetensors": b"one", "b.safetensors": b"two"}.items():
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (folder / name).symlink_to(blob)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}))
    return folder


def test_a_complete_download_is_not_repeated(downloaded, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)
    hub.fetch(T4, FALCON)
    (downloaded / "b.safetensors").unlink()
    assert not hub.is_complete(downloaded)


def test_a_damaged_file_is_found_named_and_removed(downloaded):
    hub.check_hashes(downloaded)
    (downloaded / "b.safetensors").resolve().write_bytes(b"twO")
    with pytest.raises(
        ModelError, match=r"b.safetensors has sha256 \w{12}\.\.\. where the hub says \w{12}\.\.\.: it is deleted, run again"
    ):
        hub.check_hashes(downloaded)
    assert not hub.is_complete(downloaded)
    hub.check_hashes(downloaded)


# --- a token, only if one is asked for ------------------------------------------------------------------------------------------


def gated() -> ModelError:
    """The error of a gated model as load_config raises it."""
    request = httpx.Request("GET", "http://127.0.0.1/x")
    error = ModelError("no model found")
    error.__cause__ = OSError("gated")
    error.__cause__.__cause__ = GatedRepoError("401", response=httpx.Response(401, request=request))
    return error


@pytest.fixture
def model(monkeypatch):
    """A download that works only with the token "good", wrapped as the loaders are; and the tokens that it saw."""
    monkeypatch.setenv("HF_TOKEN", "")
    seen = []

    @hub.with_token
    def download():
        seen.append(hub.os.environ.get("HF_TOKEN"))
        if seen[-1] != "good":
            raise gated()
        return "model"

    return download, seen


def test_a_token_of_colabs_secrets_is_used(monkeypatch, model):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "fake_colab"))
    monkeypatch.setenv("FAKE_COLAB_SECRETS", '{"HF_TOKEN": "good"}')
    monkeypatch.setattr(getpass, "getpass", None)
    download, seen = model
    assert download() == "model"
    assert seen == ["", "good"]


@pytest.mark.parametrize("secrets", ["{}", '{"HF_TOKEN": null}'], ids=["no secret", "no access"])
def test_else_it_is_typed_unseen(monkeypatch, model, secrets, capsys):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "fake_colab"))
    monkeypatch.setenv("FAKE_COLAB_SECRETS", secrets)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: "good")
    download, seen = model
    assert download() == "model"
    assert "good" not in capsys.readouterr().out


def test_no_token_is_told(monkeypatch, model):
    def nobody(prompt):
        raise EOFError

    monkeypatch.setattr(getpass, "getpass", nobody)
    with pytest.raises(ModelError, match="this model is gated and no token was given: store one as HF_TOKEN in Colab's secrets"):
        model[0]()


def test_another_error_asks_for_no_token(monkeypatch):
    monkeypatch.setattr(getpass, "getpass", None)

    @hub.with_token
    def download():
        raise ModelError("no network")

    with pytest.raises(ModelError, match="no network"):
        download()


# --- a disconnect, and the time left ----------------------------------------------------------------------------------------------


def test_the_forecast_is_printed_before_and_after_ten_steps(capsys, monkeypatch):
    clock = iter([100.0, 105.0])
    monkeypatch.setattr(forecast.time, "monotonic", lambda: next(clock))
    callback, state = forecast.Forecast(T4, FALCON), SimpleNamespace(global_step=50, max_steps=300, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    for state.global_step in range(51, 301):
        callback.on_step_end(None, state, None)
    assert capsys.readouterr().out.splitlines() == [
        f"predicted GPU memory {memory.plan(FALCON, T4).total / 1e9:.1f} GB; 250 steps of 16 examples to go",
        "measured 2.00 steps a second over the first 10: about 2 min left",
    ]


@pytest.mark.parametrize(("seconds", "shown"), [(45.4, "45 s"), (600, "10 min"), (12_600, "3.5 h")])
def test_durations(seconds, shown):
    assert forecast.duration(seconds) == shown


def sound(folder, step: int, identity: str):
    checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / checkpoints.MARKER).write_text(json.dumps({"identity": identity, "files": {}}))


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([], False),
        ([(20, "mine")], True),
        ([(40, "mine")], False),
        ([(20, "other")], False),
        ([(20, "mine"), (40, "mine")], False),
    ],
    ids=["none", "cut off", "finished", "another run", "finished, two kept"],
)
def test_only_a_run_that_was_cut_off_is_gone_on_with(tmp_path, saved, expected):
    for step, identity in saved:
        sound(tmp_path, step, identity)
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path / "checkpoints"), max_steps=40),
        callback_handler=SimpleNamespace(callbacks=[checkpoints.SoundCheckpoints("mine")]),
    )
    assert checkpoints.cut_off(trainer) is expected


RUN_ALL = """
import json, sys
from dataclasses import replace
from helpers import profiles
profiles.PROFILES["tiny"] = replace(profiles.PROFILES["tiny"], max_steps=12, save_steps=4, micro_batch=4)
from helpers import environment, records
from pathlib import Path
environment.runs_folder = lambda: Path(sys.argv[1])
wanted = ("PROFILE =", "tokenizer = loading", "train_set = records", "encoded, left_out", "fingerprint = loading", "build_trainer")
sources = ["".join(c["source"]) for c in json.load(open("notebooks/05_finetune_falcon_7b.ipynb"))["cells"] if c["cell_type"] == "code"]
for source in sources:
    if any(start in source for start in wanted):
        exec(source.replace("del usual", ""), globals())
"""


@pytest.mark.slow
def test_run_all_again_goes_on_where_it_was_cut_off(tmp_path):
    """The notebook's own cells, up to training, with few steps: finished, its last checkpoint then taken away, and run again."""

    def run_all() -> str:
        return subprocess.run(
            [sys.executable, "-c", RUN_ALL, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    first = run_all()
    assert "resuming" not in first
    assert re.search(
        r"predicted memory .* GB; 12 steps of 4 examples to go\nmeasured .* steps a second over the first 10: about .* left",
        first,
    )
    shutil.rmtree(tmp_path / "tiny-notebook" / "checkpoints" / "checkpoint-12")
    again = run_all()
    assert "resuming from checkpoint-8" in again
    assert "; 4 steps of 4 examples to go" in again
