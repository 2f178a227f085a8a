"""Run All on Colab, as far as it can be had without Colab: notebook 05 alone in an empty folder, without bitsandbytes and loralib.

An interpreter of its own sees everything that this one has, less what Colab lacks; `google.colab` is importable; pip is the recording one.
The setup cell fetches this repository's HEAD from a file:// address, so what is tested is what is committed.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

from helpers import environment
from tests.notebooks import NOTEBOOKS, ROOT

FAKE_COLAB, GUARD = ROOT / "tests" / "fake_colab", ROOT / "tests" / "guard"
LACKING = ("bitsandbytes", "loralib", "nbval")  # not preinstalled on Colab
RUN_ALL = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[1])
"""


def git(*arguments) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """(interpreter, its site-packages, the site-packages it was made from): a venv of links, without the packages that Colab lacks."""
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    here = Path(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = Path(subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip())
    for entry in here.iterdir():
        if not entry.name.startswith(LACKING) and not entry.name.startswith(("pip", "__pycache__")):
            (there / entry.name).symlink_to(entry)
    return python, there, here


@pytest.mark.slow
def test_notebook_05_runs_alone_in_an_empty_folder(colab, tmp_path):
    python, site, source = colab
    try:
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this copy is no git checkout, and what a reader fetches is a commit")
    content, log = tmp_path / "content", tmp_path / "pip.log"
    content.mkdir()
    text = git("show", f"HEAD:notebooks/{next(p.name for p in NOTEBOOKS if p.name.startswith('05'))}")
    notebook = nbformat.reads(text, as_version=4)
    cell = next(cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    address = f'REPOSITORY, REVISION = "file://{ROOT}", "{commit}"'
    cell.source, count = re.subn(r'^REPOSITORY, REVISION = "[^"]*", "[^"]*"', address, cell.source, flags=re.M)
    assert count == 1
    path = content / "05.ipynb"
    nbformat.write(notebook, path)
    before = sorted(entry.name for entry in site.iterdir())
    variables = {
        "COLAB_RELEASE_TAG": "release-colab_20260819-060052_RC00", "COLAB_GPU": "", "PYTHONPATH": f"{FAKE_COLAB}:{GUARD}",
        "PIP_SHIM_LOG": str(log), "PIP_SHIM_FROM": str(source), "PIP_SHIM_TO": str(site), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if k not in ("QLORA_PROFILE", "VIRTUAL_ENV", "PYTHONHOME", "MPLBACKEND")}
    done = subprocess.run([python, "-c", RUN_ALL, path.name], cwd=content, env=kept | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    # pip was called once, for the two that Colab lacks, with everything that is installed as a constraint
    (call,) = map(json.loads, log.read_text().splitlines())
    assert call["wanted"] == [environment.pins()[name] for name in ("bitsandbytes", "loralib")]
    constrained = dict(line.split("==") for line in call["constraints"])
    assert {"torch", "transformers", "numpy"} <= set(constrained)
    assert not {"--upgrade", "-U", "--force-reinstall", "--ignore-installed"} & set(call["arguments"])
    # nothing was replaced: all that was there is there, as it was
    added = {entry.name for entry in site.iterdir()} - set(before)
    assert {name.split("-")[0] for name in added} == {"bitsandbytes", "loralib"}

    # the series ran from the fetched revision, and left its record there
    clone = content / "qlora-by-hand"
    head = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert head == commit
    record = json.loads((clone / "runs" / "tiny-notebook" / "results.json").read_text())
    assert record["after"]["exact_match"] >= 0.97
    outputs = json.dumps([c.outputs for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"])
    assert "place         Colab" in outputs
    assert str(tmp_path) not in outputs
