"""What is installed is what was locked, to the byte; its licences are listed; nothing was audited that the report does not say."""

import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from hashlib import sha256
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import supply
from tests.notebooks import ROOT

LOCKED = supply.entries(supply.LOCK)
pinned_only = pytest.mark.skipif(bool(os.environ.get("QLORA_NEWEST")), reason="the weekly run takes the pins off")


def test_every_entry_has_the_hashes_of_its_files_and_comes_from_no_address():
    assert len(LOCKED) > 140
    for entry in LOCKED:
        assert entry.hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in entry.hashes), entry.name
        assert not supply.NOT_LOCKED.fullmatch(entry.name)
    assert not re.search(r"://|^-|\.whl| @ ", supply.LOCK.read_text(), re.MULTILINE)


def test_what_is_no_pin_is_refused(tmp_path):
    (tmp_path / "lock.txt").write_text("einops>=0.8\n")
    with pytest.raises(ValueError, match=r"lock.txt: 'einops>=0.8' pins no version"):
        supply.entries(tmp_path / "lock.txt")


def test_every_pin_of_requirements_is_locked_at_its_version():
    locked = {entry.name: entry.version for path in (supply.LOCK, supply.TORCH) for entry in supply.entries(path)}
    pins = {entry.name: entry.version for entry in supply.entries(ROOT / "requirements.txt")}
    assert pins == {name: locked.get(name) for name in pins}, "run `make lock`"
    assert [entry.name for entry in supply.entries(supply.TORCH)] == ["torch"]


@pytest.mark.parametrize("system", supply.SYSTEMS)
@pytest.mark.parametrize("python", supply.PYTHONS)
def test_every_python_and_system_gets_one_version_of_each_package(python, system):
    names = [entry.name for entry in LOCKED if entry.serves(python, system)]
    assert len(names) == len(set(names)) > 140
    assert set(names) >= {entry.name for entry in supply.entries(ROOT / "requirements.txt")} - {"torch"}


def needs(distribution, python: str, system: str) -> set[str]:
    """The names of what a distribution requires on a Python of a system, without extras; what the lock leaves to torch is left out."""
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python, "extra": ""}
    environment |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"} | supply.SYSTEMS[system][0]
    environment["platform_system"] = {"linux": "Linux", "macos": "Darwin", "windows": "Windows"}[system]
    found = [Requirement(line) for line in distribution.requires or []]
    names = {canonicalize_name(one.name) for one in found if not one.marker or one.marker.evaluate(environment)}
    return {name for name in names if not supply.NOT_LOCKED.fullmatch(name)}


@pinned_only
@pytest.mark.parametrize("system", supply.SYSTEMS)
@pytest.mark.parametrize("python", supply.PYTHONS)
def test_nothing_is_missing_from_the_lock(python, system):
    """pip installs it without looking at what else a package requires, so all of that must be in it; torch's requirements too."""
    names = {entry.name for entry in LOCKED if entry.serves(python, system)}
    for name in [*names, "torch"]:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another system
        assert needs(distribution, python, system) <= names, name


@pinned_only
def test_what_is_installed_is_what_is_locked():
    here = "{}.{}.{}".format(*sys.version_info[:3])
    system = {"linux": "linux", "darwin": "macos", "win32": "windows"}[sys.platform]
    wanted = {entry.name: entry.version for entry in LOCKED if entry.serves(here, system)} | {
        entry.name: entry.version for entry in supply.entries(supply.TORCH)
    }
    found = {name: metadata.version(name).partition("+")[0] for name in wanted}
    assert found == wanted, "run `make .venv/ready`"


def test_the_environment_is_installed_with_hashes_before_torch():
    recipe = re.search(r"^\.venv/ready:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    lock, torch, check = (recipe.index(text) for text in ("requirements-lock.txt", "requirements-torch.txt", "pip check"))
    assert "--no-deps --require-hashes" in recipe.splitlines()[recipe[:lock].count("\n")]
    assert lock < torch < check and recipe.count("--requirement") == 2


def install(folder, digest: str) -> subprocess.CompletedProcess:
    """Have pip install the wheel in `folder` from a lock that says its hash is `digest`; nothing but the folder is looked at."""
    (folder / "lock.txt").write_text(f"tiny_canary==1.0 --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--target", folder / "target"]
    command += ["--no-index", "--find-links", folder, "--no-cache-dir", "--requirement", folder / "lock.txt"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | {
        "PIP_CONFIG_FILE": os.devnull
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_package_that_was_tampered_with_is_refused(tmp_path):
    """One wheel, built here; it installs with its hash, and no longer does after a byte has been added to it."""
    wheel = tmp_path / "tiny_canary-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_canary.py", "sings = True\n")
        archive.writestr("tiny_canary-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny_canary\nVersion: 1.0\n")
        archive.writestr("tiny_canary-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_canary-1.0.dist-info/RECORD", "")
    digest = sha256(wheel.read_bytes()).hexdigest()
    done = install(tmp_path, digest)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target" / "tiny_canary.py").is_file()

    (tmp_path / "target" / "tiny_canary.py").unlink()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.py", "stolen = True\n")
    done = install(tmp_path, digest)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "target" / "more.py").exists()


def test_a_package_without_a_stated_licence_is_not_listed_as_if_it_had_one():
    with pytest.raises(LookupError, match=r"'nobodys' states no licence: read the LICENSE file"):
        supply.licence_row(supply.Entry("nobodys", "1.0", "", ()), Message())


@pinned_only
def test_the_licence_list_names_every_package_and_states_what_its_metadata_states():
    rows = supply.LICENCES.read_text(encoding="utf-8").splitlines()
    for entry in supply.listed():
        (row,) = (row for row in rows if row.startswith(f"| {entry.name} | {entry.version} |"))
        about = supply.installed_metadata(entry)
        assert about is None or row == supply.licence_row(entry, about), "run `make licences`"
        assert re.search(r"MIT|BSD|Apache|PSF|Python|ISC|MPL|Mozilla|Zlib|CC0|Unlicense|HPND|Public Domain|LGPL|AFL", row), row


def test_every_entry_of_data_has_its_line():
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| \[([\w.-]+)/?\]\(", text, re.MULTILINE))
    tracked = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    there = {name.split("/")[1] for name in tracked} or {path.name for path in (ROOT / "data").iterdir()}
    assert there - {"README.md"} == named


def test_the_audit_is_about_this_lock_and_counts_no_silence_as_an_answer():
    text = supply.AUDIT.read_text(encoding="utf-8")
    assert f"the {len({(e.name, e.version) for e in LOCKED}) + 1} versions of the lock `{supply.fingerprint()}`" in text, (
        "run `make audit`"
    )
    for row in re.findall(r"^\| (?!service|-).*", text, re.MULTILINE):
        answered = re.search(r"answered for (\d+) of (\d+) \| (\d+) \|", row)
        assert answered or row.endswith("could not be reached, so nothing was checked | not known |"), row
        assert not answered or 0 < int(answered[1]) <= int(answered[2])
