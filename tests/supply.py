"""Where the packages come from: their lock, their licences, and what is known against them. `python -m tests.supply lock|licences|audit`

`make lock` and `make audit` use uv and pip-audit of tests/requirements-tools.txt, in an environment of their own.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
LOCK, TORCH, TOOLS = (TESTS / f"requirements-{name}.txt" for name in ("lock", "torch", "tools"))
LICENCES, AUDIT = TESTS / "LICENCES.md", TESTS / "AUDIT.md"
TOOLS_BIN = ROOT / ".venv-tools" / "bin"
# torch, and what only some builds of it need, is installed by version; the last is for Python in a browser, which torch is not for.
NOT_LOCKED = re.compile(r"(?:torch|triton|nvidia-.*|cuda-.*|httpx2-jsfetch)")
SYSTEMS = {  # what a marker is evaluated with, and pip's names for the platform
    "linux": (
        {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"},
        ("manylinux_2_28_x86_64", "manylinux2014_x86_64"),
    ),
    "macos": ({"sys_platform": "darwin", "os_name": "posix", "platform_machine": "arm64"}, ("macosx_14_0_arm64",)),
    "windows": ({"sys_platform": "win32", "os_name": "nt", "platform_machine": "AMD64"}, ("win_amd64",)),
}
# Read in the wheels' LICENSE files, since their metadata states none
READ = {"torchao": "BSD-3-Clause", "axe-playwright-python": "MIT; the axe-core in it: MPL-2.0"}
PYTHONS = ("3.11.0", "3.11.9", "3.12.9", "3.13.5")


@dataclass(frozen=True)
class Entry:
    """One package of a lock: its name as PyPI normalizes it, its version, for whom, and the hashes of its files."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]

    def serves(self, python: str, system: str) -> bool:
        """Whether it is installed on a Python version ("3.11.9") of a system (a key of SYSTEMS)."""
        known = {"python_version": python.rpartition(".")[0], "python_full_version": python, "implementation_name": "cpython"}
        return not self.marker or Marker(self.marker).evaluate(known | SYSTEMS[system][0])


def blocks(text: str) -> list[str]:
    """The entries of a requirements file, each with the indented lines that belong to it."""
    return re.findall(r"^[A-Za-z0-9].*\n(?:[ \t]+.*\n)*", text, re.MULTILINE)


def entries(path: Path) -> list[Entry]:
    """What a requirements file pins; ValueError for a line that is no pin of one version."""
    found = []
    for block in blocks(path.read_text(encoding="utf-8")):
        pin = re.match(r"([\w.-]+)==([\w.+!-]+)(?: ; (.*?))?(?: \\| +#.*)?\n", block)
        if not pin:
            raise ValueError(f"{path.name}: {block.splitlines()[0]!r} pins no version: write name==version")
        name, version, marker = pin.groups()
        found.append(Entry(canonicalize_name(name), version, marker or "", tuple(re.findall(r"--hash=(\S+)", block))))
    return found


def write_lock(*options: str) -> None:
    """Resolve requirements.txt for every system and Python, keeping the versions that the lock has, and write the lock."""
    command = [
        TOOLS_BIN / "uv",
        "pip",
        "compile",
        "requirements.txt",
        "--universal",
        "--python-version",
        "3.11",
        "--generate-hashes",
    ]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--custom-compile-command", "make lock", "--quiet"]
    subprocess.run([*command, "--output-file", LOCK, *options], cwd=ROOT, check=True)
    text = LOCK.read_text(encoding="utf-8")
    for block in blocks(text):
        if NOT_LOCKED.fullmatch(re.split("==", block)[0]):
            text = text.replace(block, "")
    LOCK.write_text(text, encoding="utf-8")


def licence(about) -> str:
    """A package's licence as its metadata states it: an SPDX expression, else its classifiers, else the first line of the field."""
    classifiers = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    stated = about.get("License-Expression") or ", ".join(c for c in classifiers if c != "OSI Approved")
    return stated or (about.get("License") or "").strip().split("\n")[0]


def metadata_from_registry(entry: Entry):
    """The metadata of a package that this machine does not need, out of the wheel for a machine that does."""
    python, system = next((p, s) for s in SYSTEMS for p in PYTHONS if entry.serves(p, s))
    with tempfile.TemporaryDirectory() as folder:
        target = [f"--platform={name}" for name in SYSTEMS[system][1]] + ["--python-version", python]
        target += ["--only-binary=:all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, f"{entry.name}=={entry.version}"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).iterdir())) as wheel:
            (name,) = (name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            return HeaderParser().parsestr(wheel.read(name).decode())


def licence_row(entry: Entry, about) -> str:
    """A package's line of the list; LookupError if its licence is stated nowhere that can be read by a program."""
    stated = licence(about) or READ.get(entry.name)
    if not stated:
        raise LookupError(
            f"the metadata of {entry.name!r} states no licence: read the LICENSE file of its wheel and add it to READ"
        )
    return f"| {entry.name} | {entry.version} | {stated} |"


def installed_metadata(entry: Entry):
    """The metadata of an entry's package if just this version is installed, else None."""
    try:
        found = metadata.distribution(entry.name)
    except metadata.PackageNotFoundError:
        return None
    return found.metadata if found.version.partition("+")[0] == entry.version else None


def listed() -> list[Entry]:
    """Everything whose licence is listed: the lock, torch, and what the environments beside .venv install by name."""
    beside = [TESTS / f"requirements-{name}.txt" for name in ("bench", "book")]
    found = {(entry.name, entry.version): entry for path in (LOCK, TORCH, TOOLS, *beside) for entry in entries(path)}
    return [found[key] for key in sorted(found)]


def write_licences() -> None:
    """Write tests/LICENCES.md from the metadata of what is installed and of what other machines install."""
    rows = [licence_row(entry, installed_metadata(entry) or metadata_from_registry(entry)) for entry in listed()]
    text = """# Licences

Code, notebooks and data of this repository: [Apache-2.0](../LICENSE). What is in data/, the licence of each entry and the proofs for what is in the public
domain: [data/README.md](../data/README.md). Written by `make licences`; do not edit.

## Packages that are used, not shipped

As the metadata of each package states it. On Linux, PyPI's build of torch brings NVIDIA's CUDA libraries (`nvidia-*`, `cuda-*`, proprietary, free to use
under NVIDIA's terms) and triton (MIT); its CPU build brings none of them.

| package | version | licence |
|---|---|---|
"""
    LICENCES.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")


def fingerprint() -> str:
    """Which lock a report is about."""
    return hashlib.sha256(LOCK.read_bytes() + TORCH.read_bytes()).hexdigest()[:16]


def ask(service: str, pins: list[str]) -> tuple[int, list[str]]:
    """How many of the pins a vulnerability service ("pypi", "osv") answered for, and what it knows against them."""
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        file.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [
            TOOLS_BIN / "pip-audit",
            "--vulnerability-service",
            service,
            "--requirement",
            file,
            "--no-deps",
            "--disable-pip",
        ]
        subprocess.run([*command, "--format", "json", "--output", report], capture_output=True)
        if not report.exists():  # it stops at the first failure of the network
            return 0, []
        found = [d for d in json.loads(report.read_text(encoding="utf-8"))["dependencies"] if "skip_reason" not in d]
    known = [f"{d['name']} {d['version']}: {v['id']}, fixed in {v['fix_versions']}" for d in found for v in d["vulns"]]
    return len(found), known


def write_audit() -> bool:
    """Ask PyPI and OSV about every locked version and write tests/AUDIT.md; whether nothing is known against any."""
    pins = sorted({f"{entry.name}=={entry.version}" for path in (LOCK, TORCH) for entry in entries(path)})
    lines, known = [], []
    for service, name in (("pypi", "PyPI's advisories"), ("osv", "OSV")):
        answered, against = ask(service, pins)
        known += [f"- {line} ({name})" for line in against]
        what = f"answered for {answered} of {len(pins)}" if answered else "could not be reached, so nothing was checked"
        lines.append(f"| {name} | {what} | {len(against) if answered else 'not known'} |")
    text = f"""# What is known against the locked packages

Written by `make audit` ({TOOLS.read_text().split()[-1].replace("==", " ")}) on {datetime.now(UTC):%Y-%m-%d}, for the {len(pins)} versions of the lock `{fingerprint()}`.

| service | answer | known vulnerabilities |
|---|---|---|
"""
    closing = "\n".join(known) or "A service that could not be reached says nothing, neither good nor bad."
    AUDIT.write_text(text + "\n".join(lines) + "\n\n" + closing + "\n", encoding="utf-8")
    return not known


if __name__ == "__main__":
    what, *options = sys.argv[1:]
    if what == "audit":
        sys.exit(not write_audit())
    {"lock": write_lock, "licences": write_licences}[what](*options)
