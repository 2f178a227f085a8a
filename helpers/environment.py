"""Where a notebook runs and what it lacks there. Imports errors; else the standard library alone, since it runs before anything is installed.

The setup cell calls `prepare`; notebook 05 asks `runs_folder` where checkpoints go.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from helpers.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent
# What the cells import. Colab has all of these but bitsandbytes and loralib.
NEEDED = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "loralib",
    "einops", "matplotlib", "numpy", "safetensors", "psutil", "tqdm",
)  # fmt: skip
# The first of these variables that is set tells the place; each is set by the place itself.
PLACES = {
    "Colab": ("COLAB_RELEASE_TAG", "COLAB_GPU", "COLAB_JUPYTER_IP"),
    "Kaggle": ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE"),
    "VS Code": ("VSCODE_PID", "VSCODE_CWD", "VSCODE_IPC_HOOK_CLI"),
    "Jupyter": ("JPY_SESSION_NAME", "JPY_PARENT_PID"),
}
HOSTED = ("Colab", "Kaggle")  # rented for the session: packages may be added to their Python without asking
VERSION = re.compile(r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[A-Za-z0-9.]+)?")  # what pip can read
DRIVE = Path("/content/drive")  # where Colab mounts Google Drive


def place() -> str:
    """ "Colab", "Kaggle", "VS Code", "Jupyter" or "Python", by environment variables."""
    for name, variables in PLACES.items():
        if any(os.environ.get(variable) for variable in variables):
            return name
    return "Python"


def pins() -> dict[str, str]:
    """The tested version of each package in requirements.txt, as pip takes it: {"einops": "einops==0.8.2", ...}."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {line.split("==")[0]: line.strip() for line in lines if "==" in line and not line.startswith("#")}


def missing() -> list[str]:
    """Pins of the needed packages that cannot be found; nothing is imported, nothing is looked up on the network."""
    tested = pins()
    return [tested[name] for name in NEEDED if importlib.util.find_spec(name) is None]


def installed() -> list[str]:
    """Everything that is installed, as pip's constraints: with them pip can add packages and replace none."""
    found = {dist.metadata["Name"]: dist.version for dist in distributions() if dist.metadata["Name"]}
    return sorted(f"{name}=={version}" for name, version in found.items() if version and VERSION.fullmatch(version))


def prepare() -> None:
    """Add what is missing on Colab or Kaggle; elsewhere SetupError that names it. Where nothing is missing, it does nothing.

    Every installed version goes to pip as a constraint: pip fails sooner than it would replace torch. SetupError if pip fails.
    """
    lacking = missing()
    if not lacking:
        return
    names = ", ".join(lacking)
    if place() not in HOSTED:
        raise SetupError(f"this kernel's Python lacks {names}: start with `make lab`, or run pip install -r requirements.txt")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("\n".join(installed()) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *lacking]
        done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode or missing():
        said = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
        raise SetupError(
            f"pip could not add {names} beside what is installed ({said[-1]}): check the network, then run this cell again"
        )


def mount_drive() -> None:
    """Ask Colab to mount Google Drive, which asks its owner; SetupError anywhere else."""
    if place() != "Colab":
        raise SetupError(f"Google Drive can be mounted on Colab only and this is {place()}: set DRIVE = False")
    from google.colab import drive

    drive.mount(str(DRIVE))


def runs_folder() -> Path:
    """Where runs belong: Google Drive if it is mounted, since it outlives Colab's disk; else runs/ of this repository."""
    if place() == "Colab" and (DRIVE / "MyDrive").is_dir():
        return DRIVE / "MyDrive" / "qlora-by-hand" / "runs"
    return ROOT / "runs"
