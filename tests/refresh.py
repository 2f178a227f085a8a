"""Execute notebooks and store their outputs: the only way that outputs change.
`python tests/refresh.py [01 05 ...]` runs each from its own folder with the tiny profile. Progress
bars, log lines (stderr) and run-time metadata are not kept. Two more commands execute nothing:
`--setup-cell [01 ...]` writes tests/setup_cell.py into the notebooks; `--scrub FILE ...`, a
pre-commit hook, drops what Jupyter adds when it saves, and fails if there was any."""

import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.environment import write_text
from tests.notebooks import NOTEBOOKS, ROOT, SETUP_CELL


def is_log_or_bar(output: nbformat.NotebookNode) -> bool:
    """Whether an output is what libraries log, or a progress bar, which means nothing once full."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or (output.output_type == "stream" and output.name == "stderr")


def scrubbed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what depends on the machine or the moment."""
    notebook = copy.deepcopy(notebook)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        if "solution" in cell.metadata.get("tags", []):  # folded; in Colab by its @title
            cell.metadata["jupyter"] = {"source_hidden": True, "outputs_hidden": True}
        kept = []
        for output in cell.get("outputs", []):
            if is_log_or_bar(output):
                continue
            if kept and kept[-1].output_type == output.output_type == "stream":
                kept[-1].text += output.text  # what a cell prints is one output, however it came
                continue
            if "metadata" in output:
                output["metadata"] = {}
            kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notebook


def refresh(path: Path) -> float:
    """Execute a notebook and store it; seconds it took. Left alone if a cell fails."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", path], cwd=ROOT, check=True)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # agg has no figures
    notebook, here = nbformat.read(path, as_version=4), {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=here).execute()
    changed(path, scrubbed(notebook))
    return time.monotonic() - began


def changed(path: Path, notebook: nbformat.NotebookNode) -> bool:
    """Write `notebook` if it is not what `path` holds; whether it was not."""
    differs = notebook != nbformat.read(path, as_version=4)
    if differs:
        write_text(path, nbformat.writes(notebook) + "\n")
    return differs


def with_setup_cell(path: Path) -> nbformat.NotebookNode:
    """A notebook with the source of tests/setup_cell.py in its setup cell."""
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    cell.source = SETUP_CELL.read_text(encoding="utf-8").rstrip("\n")
    return notebook


if __name__ == "__main__":
    if sys.argv[1:2] == ["--scrub"]:
        paths = map(Path, sys.argv[2:])
        dropped = [p.name for p in paths if changed(p, scrubbed(nbformat.read(p, as_version=4)))]
        sys.exit(f"scrubbed {', '.join(dropped)}: look at the difference" if dropped else 0)
    numbers = [argument for argument in sys.argv[1:] if argument != "--setup-cell"]
    chosen = [path for path in NOTEBOOKS if not numbers or path.name[:2] in numbers]
    if wrong := set(numbers) - {path.name[:2] for path in NOTEBOOKS}:
        sys.exit(f"no notebook {sorted(wrong)}: choose of {[p.name[:2] for p in NOTEBOOKS]}")
    if "--setup-cell" in sys.argv:
        replaced = [path.name for path in chosen if changed(path, with_setup_cell(path))]
        sys.exit(print("setup cell replaced in", ", ".join(replaced) or "no notebook"))
    with tempfile.TemporaryDirectory() as runs:  # what notebooks train is trained, not found
        os.environ.setdefault("QLORA_RUNS", runs)
        for path in chosen:
            print(f"{path.name}: {refresh(path):.0f} s", flush=True)
