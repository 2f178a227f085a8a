"""What all tests share: one folder of runs, one watch on the network, and what is trained once."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.notebooks import python

# Started first, since the two workers end together when the longest files come first
LONGEST = "05_ 06_ test_fresh_clone 07_ 02_ 08_ 04_ 01_ 03_ test_memory test_finetune test_adapters"
LONGEST = f"{LONGEST} test_study test_records test_recipe test_rehearsal test_loading".split()
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IN_WORKER:  # workers, kernels and command lines inherit it
    SHARED = tempfile.mkdtemp(prefix="qlora-tests-")
    os.environ["NETWORK_GUARD_LOG"] = os.path.join(SHARED, "attempts.log")
    os.environ["QLORA_RUNS"] = os.path.join(SHARED, "runs")
RUNS = Path(os.environ["QLORA_RUNS"])


class TrainedOnce:
    """Puts the adapter that `make finetune` trains where notebook 06 looks for its own."""

    def pytest_runtest_setup(self, item):
        target = RUNS / "tiny-ticket-adapter"
        if item.path.name.startswith("06_") and not target.exists():
            shutil.copytree(train_once(), target, ignore=shutil.ignore_patterns("checkpoints"))


def pytest_configure(config):
    config.pluginmanager.register(TrainedOnce(), "trained-once")


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = item.path.name
        return next((i for i, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fail if any process tried to reach the network: libraries may have swallowed the error."""
    if IN_WORKER:
        return
    log = Path(os.environ["NETWORK_GUARD_LOG"])
    if log.exists():
        print(f"\nnetwork guard: {log.read_text()}")
        session.exitstatus = 1
    shutil.rmtree(SHARED, ignore_errors=True)


def train_once() -> Path:
    """The folder of `make finetune`, which is run once for all workers, whatever comes of it."""
    folder = RUNS / "tiny"
    with FileLock(RUNS.parent / "tiny.lock"):
        if not folder.exists():
            folder.mkdir(parents=True)
            python("-m", "helpers.training", "--profile", "tiny", capture_output=False, check=True)
    assert (folder / "results.json").exists(), "`make finetune` failed before in this test run"
    return folder


@pytest.fixture(scope="session")
def main_job() -> tuple[dict, Path]:
    """results.json and folder of the command behind `make finetune`, run once a test run."""
    folder = train_once()
    return json.loads((folder / "results.json").read_text()), folder


@pytest.fixture(scope="session")
def tiny():
    from helpers import profiles

    return profiles.PROFILES["tiny"]


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from helpers import loading

    return loading.load_tokenizer(tiny)


@pytest.fixture
def base(tiny):
    """A fresh 4-bit tiny Falcon; loading takes a tenth of a second."""
    from helpers import loading

    return loading.load_base(tiny)
