"""Write the address of your copy on GitHub into badges, setup cells, citation and links.
`make publish OWNER=account [REPO=name]`, before the copy is pushed; OWNER=OWNER puts the
placeholder back. Files are changed as text, so that nothing else of a notebook moves."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "OWNER/qlora-by-hand"
KINDS = ("*.md", "*.cff", ".github/**/*", "data/**/*.md", "notebooks/*.*", "tests/setup_cell.py")


def linked(text: str) -> list[str]:
    """The repositories ("owner/name") that links in a text lead to."""
    return re.findall(r"github(?:\.com)?/([\w-]+/[\w.-]*\w)", text)


def publish(owner: str = "", repo: str = "qlora-by-hand") -> None:
    """Replace the placeholder and the address in the setup cell; SystemExit for a wrong name."""
    new = f"{owner}/{repo}"
    if not re.fullmatch(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,38}/[\w.-]*\w(?<!\.git)", new, re.ASCII):
        sys.exit(f"{new} cannot be on GitHub: make publish OWNER=account [REPO=name]")
    files = [path for kind in KINDS for path in ROOT.glob(kind) if path.is_file()]
    texts = {path: path.read_bytes().decode("utf-8") for path in files}
    cell = texts[ROOT / "tests" / "setup_cell.py"]
    old = {linked(cell)[0], PLACEHOLDER}
    if new not in old and new in linked("".join(texts.values())):
        sys.exit(f"links lead to {new} already, which could not be told from yours")
    before = rf"(github(?:\.com)?/)(?:{'|'.join(map(re.escape, old))})(?![\w-])"
    for path, text in texts.items():
        done = re.sub(before, rf"\g<1>{new}", text)
        left = (old - {new}) & set(linked(done))
        assert not left, f"{path} still leads to {left}"
        if done != text:
            path.write_bytes(done.encode("utf-8"))
    tag = re.search(r'^REVISION = "(.*)"', cell, re.MULTILINE)[1]
    print(f"Every link leads to {new}.", end=" ")
    if new != PLACEHOLDER:
        print(f"Next: git commit -am 'Published', git tag {tag}, git push origin main {tag}")


if __name__ == "__main__":
    publish(*filter(None, sys.argv[1:]))
