# @title Setup: finds the repository, or fetches it { display-mode: "form" }
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/qlora-by-hand"
REVISION = "v1.0.0"  # a tag: what was tested is what runs
here, name = Path.cwd(), "qlora-by-hand"
drive = Path("/content/drive/MyDrive")
folders = [here, *here.parents, here / name, drive / name]
marker = Path("helpers", "environment.py")
root = next((folder for folder in folders if (folder / marker).is_file()), None)
if root is None:
    if "/OWNER/" in REPOSITORY:
        raise RuntimeError(
            f"upload the repository as folder {name}, here or to your Drive "
            "(mounted), or put the address of your copy into REPOSITORY above"
        )
    root = here / name
    clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", REVISION]
    subprocess.run([*clone, REPOSITORY, str(root)], check=True)
sys.path.insert(0, str(root))

from helpers.environment import prepare

prepare()  # adds what is missing, replaces nothing

from helpers import environment, plotting, profiles

plotting.set_style()
environment.show_setup(profiles.resolve())
