"""Execute notebooks and store their outputs: the only way that stored outputs change. `python tests/refresh.py [01 05 ...]`

Each runs from its own folder with the tiny profile. Progress bars and log lines (stderr) and run-time metadata are not kept.
`--setup-cell` instead writes tests/setup_cell.py, the one source of the first cell, into the notebooks, and executes nothing.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.notebooks import NOTEBOOKS, ROOT, SETUP_CELL


def is_log_or_bar(output: nbformat.NotebookNode) -> bool:
    """Whether an output is stderr or a widget: what libraries log, and progress bars, which mean nothing once they are full."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or (output.output_type == "stream" and output.name == "stderr")


def scrub(notebook: nbformat.NotebookNode) -> None:
    """Drop what depends on the machine or the moment: stderr, timing, the kernel's details."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "jupyter") if key in cell.metadata}
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if not is_log_or_bar(output)]
            for i in range(len(kept) - 1, 0, -1):  # what one cell prints is one output, however slowly it came
                if kept[i - 1].output_type == kept[i].output_type == "stream":
                    kept[i - 1].text += kept.pop(i).text
            for output in kept:
                output.pop("transient", None)
                if "metadata" in output:
                    output["metadata"] = {}
            cell.outputs = kept


def refresh(path: Path) -> float:
    """Execute one notebook and write it back; seconds it took. Leaves the file alone if a cell fails."""
    began = time.monotonic()
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # the tests' agg would store no figure
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    scrub(notebook)
    write(notebook, path)
    return time.monotonic() - began


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        nbformat.write(notebook, part)
    Path(part.name).chmod(0o644)
    Path(part.name).replace(path)


def replace_setup_cell(path: Path) -> bool:
    """Give a notebook's setup cell the source of tests/setup_cell.py; its outputs stay until the next refresh. Whether it differed."""
    notebook, wanted = nbformat.read(path, as_version=4), SETUP_CELL.read_text(encoding="utf-8").rstrip("\n")
    cell = next(cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    if cell.source == wanted:
        return False
    cell.source = wanted
    write(notebook, path)
    return True


if __name__ == "__main__":
    numbers = [argument for argument in sys.argv[1:] if argument != "--setup-cell"]
    chosen = [p for p in NOTEBOOKS if not numbers or p.name[:2] in numbers]
    if not chosen:
        sys.exit(f"no notebook matches {numbers}: numbers are {[p.name[:2] for p in NOTEBOOKS]}")
    if "--setup-cell" in sys.argv:
        print("setup cell replaced in", ", ".join(path.name for path in chosen if replace_setup_cell(path)) or "no notebook")
        sys.exit()
    for path in chosen:
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(path)], cwd=ROOT, check=True)
        print(f"{path.name}: {refresh(path):.0f} s", flush=True)
