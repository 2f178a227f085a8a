"""Reading notebooks in tests. The definitions they teach are loaded with helpers.lessons, so that the tested code is the shown code."""

import json
from pathlib import Path

from helpers.profiles import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SETUP_CELL = ROOT / "tests" / "setup_cell.py"  # the source of every notebook's first code cell


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])
