"""Use code where it is taught: load named definitions out of a notebook's cells, so that it exists once. Imports profiles."""

import ast
import json
from pathlib import Path

from helpers.profiles import ROOT


def notebook_path(number: str) -> Path:
    """The notebook whose file name begins with `number` ("01"); LookupError if there is none."""
    found = sorted((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    if not found:
        raise LookupError(
            f"there is no notebook {number!r} in {(ROOT / 'notebooks').name}/: give its two digits, for instance '02'"
        )
    return found[0]


def load_definitions(number: str, *names: str) -> dict:
    """Execute, in order, the imports and the top-level definitions `names` of notebook `number` ("01"); return its namespace.

    A name is a function, a class, or a variable assigned at top level; what a definition needs must be among the names too.
    LookupError if a name is nowhere defined.
    """
    path = notebook_path(number)
    wanted, found, namespace = set(names), set(), {"__name__": path.stem}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code" or "setup" in cell["metadata"].get("tags", []):
            continue
        body = []
        for node in ast.parse("".join(cell["source"])).body:
            defines = _defined_names(node)
            if isinstance(node, ast.Import | ast.ImportFrom) or defines & wanted:
                body.append(node)
                found |= defines & wanted
        exec(compile(ast.Module(body, []), path.name, "exec"), namespace)  # noqa: S102 - a notebook of this repository
    if wanted - found:
        raise LookupError(f"{path.name} does not define {sorted(wanted - found)}: its top-level cells name what can be loaded")
    return namespace


def _defined_names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
