"""Reading notebooks in tests, and loading what they teach, so that the tested code is the shown."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SETUP_CELL = ROOT / "tests" / "setup_cell.py"  # the source of every notebook's first code cell


def python(*arguments, **options) -> subprocess.CompletedProcess:
    """This Python in a process of its own, at the root, with its output as text unless told."""
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, *map(str, arguments)], **options)


def copy_checkout(folder: Path) -> None:
    """Copy this checkout, but for what is made in it."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "runs", "__pycache__", "*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)


def notebook(number: str) -> Path:
    """The notebook whose file name begins with `number` ("01")."""
    return next(path for path in NOTEBOOKS if path.name.startswith(f"{number}_"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def prose(path: Path) -> str:
    """All markdown of a notebook."""
    return "\n".join(source(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")


def printed(path: Path) -> str:
    """All text that a notebook's cells printed, as stored."""
    return "".join("".join(o.get("text", "")) for c in code_cells(path) for o in c["outputs"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines at top level."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    parts = [part for target in targets if target for part in ast.walk(target)]
    return {part.id for part in parts if isinstance(part, ast.Name)}


def load_definitions(number: str, *names: str) -> dict:
    """Execute the imports and the top-level definitions `names` of a notebook; its namespace. What
    a definition needs must be among the names too. LookupError for a name it does not define."""
    from helpers import environment, plotting, profiles

    path, wanted = notebook(number), set(names)
    given = {"environment": environment, "plotting": plotting, "profiles": profiles}
    namespace = {"__name__": path.stem, "root": ROOT, **given}  # what the setup cell gives
    for cell in code_cells(path):
        if "setup" in tags(cell):
            continue
        statements = ast.parse(source(cell)).body
        kept = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
        kept += [s for s in statements if defined(s) & set(names)]
        kept.sort(key=statements.index)
        exec(compile(ast.Module(kept, []), path.name, "exec"), namespace)  # noqa: S102 - our own
        wanted -= set().union(*map(defined, kept))
    if wanted:
        raise LookupError(f"{path.name} does not define {sorted(wanted)}")
    return namespace
