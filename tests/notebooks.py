"""Reading notebooks in tests: their cells, and the definitions they teach, so that the tested code is the shown code."""

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def load_definitions(number: str, *names: str) -> dict:
    """Execute, in order, the imports and the top-level definitions `names` of notebook `number` ("01"); return its namespace.

    A name is a function, a class, or a variable that is assigned at top level; what a definition needs must be named before it.
    LookupError if a name is nowhere defined.
    """
    path = next(p for p in NOTEBOOKS if p.name.startswith(number))
    wanted, found, namespace = set(names), set(), {}
    for cell in code_cells(path):
        body = []
        for node in ast.parse(source(cell)).body:
            defines = _defined_names(node)
            if isinstance(node, ast.Import | ast.ImportFrom) or defines & wanted:
                body.append(node)
                found |= defines & wanted
        exec(compile(ast.Module(body, []), str(path), "exec"), namespace)  # noqa: S102 - our own notebook
    if wanted - found:
        raise LookupError(f"{path.name} does not define {sorted(wanted - found)}")
    return namespace


def _defined_names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
