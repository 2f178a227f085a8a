"""Run All on Colab, as far as it can be had without Colab: notebook 05 alone in an empty folder.
Its interpreter sees what this one has, less what Colab lacks, `google.colab` and a recording pip.
The setup cell clones this repository's HEAD: what is tested is what is committed."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

from tests.notebooks import ROOT, notebook

FAKE_COLAB, GUARD = ROOT / "tests" / "fake_colab", ROOT / "tests" / "guard"
LACKING = ("bitsandbytes", "loralib", "nbval")  # not preinstalled on Colab
RUN_ALL = """
import nbformat, nbclient
notebook = nbformat.read("05.ipynb", as_version=4)
nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, "05.ipynb")
"""


def output_of(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """(interpreter, its site-packages): a venv of links, without the packages that Colab lacks."""
    folder = tmp_path_factory.mktemp("colab")
    output_of(sys.executable, "-m", "venv", "--without-pip", folder)
    python, show = folder / "bin/python", "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = Path(output_of(python, "-c", show))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((*LACKING, "pip", "__pycache__")):
            (there / entry.name).symlink_to(entry)
    return python, there


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A bare repository whose tag v1.0.0 is this one's HEAD."""
    bare = tmp_path_factory.mktemp("published") / "qlora-by-hand.git"
    try:
        output_of("git", "clone", "--quiet", "--bare", f"file://{ROOT}", bare)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this copy is no git checkout, and what a reader fetches is a commit")
    output_of("git", "-C", bare, "tag", "--force", "v1.0.0", "HEAD")
    return bare


@pytest.mark.slow
def test_notebook_05_runs_alone_in_an_empty_folder(colab, published, tmp_path):
    (python, site), name = colab, notebook("05").name
    content, log = tmp_path / "content", tmp_path / "pip.log"
    content.mkdir()
    path, address = content / "05.ipynb", f'REPOSITORY = "file://{published}"'
    text = output_of("git", "-C", published, "show", f"v1.0.0:notebooks/{name}")
    stored = nbformat.reads(text, as_version=4)
    setup = next(cell for cell in stored.cells if "setup" in cell.metadata.get("tags", []))
    setup.source, count = re.subn(r'^REPOSITORY = ".*"', address, setup.source, flags=re.M)
    assert count == 1
    nbformat.write(stored, path)
    before = {entry.name for entry in site.iterdir()}
    hidden = ("QLORA_PROFILE", "QLORA_RUNS", "VIRTUAL_ENV", "PYTHONHOME", "MPLBACKEND")
    variables = {key: value for key, value in os.environ.items() if key not in hidden}
    variables |= {"COLAB_RELEASE_TAG": "release-colab_20260819-060052_RC00", "COLAB_GPU": ""}
    variables |= {"PYTHONPATH": f"{FAKE_COLAB}:{GUARD}", "TOKENIZERS_PARALLELISM": "false"}
    variables["PYTHONDONTWRITEBYTECODE"] = "1"  # packages alone are added
    shim = {"LOG": str(log), "FROM": sysconfig.get_path("purelib"), "TO": str(site)}
    variables |= {f"PIP_SHIM_{key}": value for key, value in shim.items()}
    options = {"cwd": content, "env": variables, "capture_output": True, "text": True}
    done = subprocess.run([python, "-c", RUN_ALL], **options)
    assert done.returncode == 0, done.stderr[-3000:]

    # pip was called once, for the two that Colab lacks, with what is installed as a constraint
    (call,) = map(json.loads, log.read_text().splitlines())
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert call["wanted"] == [f"{name}=={pins[name]}" for name in ("bitsandbytes", "loralib")]
    constrained = dict(line.split("==") for line in call["constraints"])
    assert {"torch", "transformers", "numpy"} <= set(constrained)
    replacing = {"--upgrade", "-U", "--force-reinstall", "--ignore-installed"}
    assert not replacing & set(call["arguments"])
    # nothing was replaced: all that was there is there, as it was
    added = {entry.name for entry in site.iterdir()} - before
    assert {name.split("-")[0] for name in added} == {"bitsandbytes", "loralib"}

    # the series ran from the fetched revision, and left its adapter there
    clone = content / "qlora-by-hand"
    heads = {output_of("git", "-C", at, "rev-parse", "HEAD") for at in (clone, published)}
    assert len(heads) == 1
    assert (clone / "runs" / "falcon-qlora" / "adapter" / "adapter_model.safetensors").exists()
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    outputs = json.dumps([cell.outputs for cell in cells])
    assert "place         Colab" in outputs and str(tmp_path) not in outputs
    assert float(re.search(r"exact_match +[01]\.\d+ +([01]\.\d+)", outputs)[1]) >= 0.97
