# Setup, the same in every notebook. In a checkout it only finds the repository; on Colab it fetches it and adds what is missing there.
import subprocess
import sys
from pathlib import Path

REPOSITORY, REVISION = "https://github.com/OWNER/qlora-by-hand", "v1.0.0"  # a tag or a commit: what was tested is what runs
folders = (Path.cwd(), *Path.cwd().parents, Path.cwd() / "qlora-by-hand")
root = next((folder for folder in folders if (folder / "helpers" / "environment.py").is_file()), None)
if root is None:
    if "/OWNER/" in REPOSITORY:
        raise RuntimeError(f"{REPOSITORY} is a placeholder: put the address of your copy of the repository into REPOSITORY")
    root = Path.cwd() / "qlora-by-hand"
    root.mkdir(exist_ok=True)
    for step in ("init --quiet", f"fetch --quiet --depth 1 {REPOSITORY} {REVISION}", "checkout --quiet FETCH_HEAD"):
        if subprocess.run(["git", "-C", str(root), *step.split()]).returncode:
            raise RuntimeError(f"{REPOSITORY} at {REVISION} could not be fetched: check both names and the network")
sys.path.insert(0, str(root))

from helpers.environment import prepare

prepare()  # nothing that is installed is replaced

from helpers.setup import show_setup

show_setup()
