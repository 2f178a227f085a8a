"""Shared fixtures, and the end-of-session check that nothing tried to reach the network."""

import os
import tempfile

import pytest

from helpers import loading, profiles

_log = os.path.join(tempfile.mkdtemp(prefix="network-guard-"), "attempts.log")
os.environ["NETWORK_GUARD_LOG"] = _log


def pytest_sessionfinish(session, exitstatus):
    """Fail the run if any process of it tried to reach the network: libraries may have swallowed the guard's error."""
    if os.path.exists(_log):
        with open(_log) as attempts:
            print(f"\nnetwork guard: {attempts.read()}")
        session.exitstatus = 1


@pytest.fixture(scope="session")
def tiny():
    return profiles.PROFILES["tiny"]


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return loading.load_tokenizer(tiny)


@pytest.fixture
def base(tiny):
    """A fresh 4-bit tiny Falcon; loading takes a tenth of a second."""
    return loading.load_base(tiny)
