"""A pre-commit hook: `python tests/scrubbed.py NOTEBOOK...` drops what `make refresh` would not have stored, and fails if there was any.

Whoever opens a notebook in Jupyter and saves it has added the kernel's version, the cells' timing and its warnings: this takes them out
again, without executing anything. Source and results stay as they are.
"""

import copy
import sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.refresh import scrub, write


def scrub_file(path: Path) -> bool:
    """Scrub a stored notebook in place; whether there was anything to drop."""
    notebook = nbformat.read(path, as_version=4)
    scrubbed = copy.deepcopy(notebook)
    scrub(scrubbed)
    if scrubbed == notebook:
        return False
    write(scrubbed, path)
    return True


if __name__ == "__main__":
    dropped = [name for name in sys.argv[1:] if scrub_file(Path(name))]
    sys.exit(f"scrubbed {', '.join(dropped)}: look at the difference and add it" if dropped else 0)
