"""Execute notebooks and store their outputs: the only way that stored outputs change. `python tests/refresh.py [01 05 ...]`

Each runs from its own folder with the tiny profile. Progress bars and log lines (stderr) and run-time metadata are not kept.
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
from tests.notebooks import NOTEBOOKS, ROOT

os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # the tests' agg would store no figure


def scrub(notebook: nbformat.NotebookNode) -> None:
    """Drop what depends on the machine or the moment: stderr, timing, the kernel's details."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "jupyter") if key in cell.metadata}
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if not (output.output_type == "stream" and output.name == "stderr")]
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
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    scrub(notebook)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        nbformat.write(notebook, part)
    Path(part.name).chmod(0o644)
    Path(part.name).replace(path)
    return time.monotonic() - began


if __name__ == "__main__":
    chosen = [p for p in NOTEBOOKS if not sys.argv[1:] or p.name[:2] in sys.argv[1:]]
    if not chosen:
        sys.exit(f"no notebook matches {sys.argv[1:]}: numbers are {[p.name[:2] for p in NOTEBOOKS]}")
    for path in chosen:
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(path)], cwd=ROOT, check=True)
        print(f"{path.name}: {refresh(path):.0f} s", flush=True)
