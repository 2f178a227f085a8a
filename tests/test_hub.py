"""The download from a hub that answers well, slowly, wrongly or not at all: `tests.fake_hub` on loopback, real huggingface_hub.

One fresh process imports the helpers with HF_ENDPOINT and an empty HF_HOME and forks a reader for each repository of the fake hub; those that can go
through at the second try run again, as a reader would.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import loading, profiles
from tests.fake_hub import COMMIT, STATUS, TOKEN, FakeHub
from tests.notebooks import ROOT

READER = """
import dataclasses, json, os, sys, time, traceback
from pathlib import Path
import torch
from helpers import hub, loading, profiles
torch.set_num_threads(1)
def attempt(owner):
    profile = dataclasses.replace(profiles.PROFILES["tiny"], model=owner + "/tiny-falcon", revision=sys.argv[2])
    began = time.monotonic()
    try:
        loading.load_tokenizer(profile)
        found = {"fingerprint": loading.base_fingerprint(loading.load_base(profile))}
    except BaseException as error:
        found = {"error": type(error).__name__, "message": str(error)}
    folder = hub.snapshot(profile)
    weights = folder / "model.safetensors"
    found["taken"] = weights.resolve().name if weights.exists() else None
    found["partial"] = [path.name for path in folder.parent.parent.rglob("*.incomplete")]
    return found | {"seconds": time.monotonic() - began}
readers = []
for owner in sys.argv[3:]:
    if (reader := os.fork()) == 0:
        if owner.endswith("+token"):
            os.environ["HF_TOKEN"] = os.environ["A_TOKEN"]
        tries = 2 if owner in ("sound", "short", "wrong") else 1
        result = [attempt(owner.removesuffix("+token")) for _ in range(tries)]
        Path(sys.argv[1], owner).write_text(json.dumps(result))
        os._exit(0)
    readers.append(reader)
for reader in readers:
    os.waitpid(reader, 0)
"""
OWNERS = ("sound", "broken", "short", "wrong", "slow", *STATUS, "401+token", "403+token")
FALCON = ROOT / "data" / "tiny-falcon"
DIGEST = hashlib.sha256((FALCON / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """{owner: [first try, second try if any]}, and what the hub was asked."""
    folder = tmp_path_factory.mktemp("tries")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with FakeHub(FALCON) as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "A_TOKEN": TOKEN}
        environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", READER, str(folder), COMMIT, *OWNERS],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    results = {owner: json.loads(Path(folder, owner).read_text()) for owner in OWNERS if Path(folder, owner).exists()}
    assert set(results) == set(OWNERS), done.stderr[-3000:]
    return results, hub.requests


@pytest.fixture(scope="module")
def bits():
    return loading.base_fingerprint(loading.load_base(profiles.PROFILES["tiny"]))


def test_a_sound_hub_gives_the_bits_of_the_folder_and_is_asked_for_them_once(tried, bits):
    results, requests = tried
    for found in (*results["sound"], *results["401+token"]):  # the latter a gated model, with a token that may read it
        assert found["fingerprint"] == bits and found["taken"] == DIGEST and found["partial"] == []
    assert [method for method, path, _ in requests if path == "/cdn/sound/model.safetensors" and method == "GET"] == ["GET"]


def test_a_connection_that_breaks_is_taken_up_within_the_same_try(tried, bits):
    results, requests = tried
    assert results["broken"][0]["fingerprint"] == bits and results["broken"][0]["partial"] == []
    asked = [method for method, path, _ in requests if path == "/cdn/broken/model.safetensors" and method == "GET"]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (
            "short",
            r"'short/tiny-falcon' could not be downloaded: check the name, the folder and the network, and run again; .*size",
        ),
        ("wrong", r"model.safetensors has sha256 \w{12}\.\.\. where the hub says \w{12}\.\.\.: it is deleted, run again"),
    ],
)
def test_a_damaged_file_is_told_never_taken_and_the_second_try_goes_through(tried, bits, owner, words):
    first, second = tried[0][owner]
    assert first["error"] == "ModelError" and first["taken"] is None and first["partial"] == []
    assert re.search(words, first["message"]), first["message"]
    assert second["fingerprint"] == bits and second["taken"] == DIGEST


WORDS = {
    "401": "this model is gated and no token was given: store one as HF_TOKEN",
    "403": "this model is gated and no token was given: store one as HF_TOKEN",
    "403+token": "the model is gated, accept its terms on its page with the account whose token is in HF_TOKEN",
    "404": "no tokenizer found for '404/tiny-falcon': check the name",
    "norevision": "no tokenizer found for 'norevision/tiny-falcon': check the name",
    "429": "'429/tiny-falcon' could not be downloaded: the hub takes no more requests for now .429., wait some minutes and run again",
    "500": "'500/tiny-falcon' could not be downloaded: the hub has a fault of its own .500., run again later",
    "slow": "'slow/tiny-falcon' could not be downloaded: the hub does not answer in time, check the network and run again",
}


@pytest.mark.parametrize("owner", WORDS)
def test_a_hub_that_refuses_is_told_with_the_way_out(tried, owner):
    for found in tried[0][owner]:
        assert found["error"] == "ModelError" and re.search(WORDS[owner], found["message"]), found["message"]
        assert "Traceback" not in found["message"] and "\n" not in found["message"]
        assert found["taken"] is None and found["partial"] == []
        assert found["seconds"] < 60
