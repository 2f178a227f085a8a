"""Where a notebook runs, what is missing there, and files that are written whole or not at all.

The setup cell imports this before anything is installed: only the standard library at the top."""

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import distributions, version
from pathlib import Path

from helpers.errors import TutorialError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
# What the cells import. Colab has all of these but bitsandbytes and loralib.
NEEDED = (*PACKAGES, *"loralib einops matplotlib numpy pandas safetensors psutil tqdm".split())
PLACES = {"Colab": "COLAB_RELEASE", "Kaggle": "KAGGLE_KERNEL_"}  # how its own variables begin
PLACES |= {"VS Code": "VSCODE_", "Jupyter": "JPY_"}  # the first that has one set is the place
# A version that pip can read
VERSION = r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[A-Za-z0-9.]+)?"
DISK_FULL = r"\(os error \d+\)\W*$|^\[enforce fail at inline_container"  # as Rust and torch say
DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
MEMORY_RAN_OUT = "the memory ran out: close other programs or kernels, or use profile 'tiny'"


def place() -> str:
    """Colab, Kaggle, VS Code, Jupyter or Python, by environment variables."""
    found = (name for name, start in PLACES.items() if any(k.startswith(start) for k in os.environ))
    return next(found, "Python")


def missing() -> list[str]:
    """Pins ("einops==0.8.2") of the needed packages that cannot be found; nothing is imported."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"(?m)^([\w-]+)(==\S+)", text))
    return [name + pins[name] for name in NEEDED if importlib.util.find_spec(name) is None]


def prepare() -> None:
    """Add what is missing on Colab or Kaggle, replace nothing; elsewhere TutorialError names it."""
    lacking = missing()
    if not lacking:
        return
    names = ", ".join(lacking)
    if place() not in ("Colab", "Kaggle"):  # rented: there packages may be added without asking
        advice = "start with `make lab`, or run pip install -r requirements.txt"
        raise TutorialError(f"this kernel's Python lacks {names}: {advice}")
    found = {dist.metadata["Name"]: dist.version for dist in distributions()}
    pins = [f"{name}=={v}" for name, v in found.items() if name and re.fullmatch(VERSION, v or "")]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints]
        done = subprocess.run([*command, *lacking], capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode or missing():
        reason = ((done.stderr or done.stdout).strip() or "pip printed nothing").splitlines()[-1]
        wrong = f"pip could not add {names} beside what is installed ({reason})"
        raise TutorialError(f"{wrong}: check the network, then run this cell again")


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def show_setup(profile) -> None:
    """Print place, versions, hardware (GB are 10^9 bytes) and `profile`; no path, no host name."""
    import psutil
    import torch

    card = "none"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        size, capability = f"{gpu.total_memory / 1e9:.1f} GB", f"{gpu.major}.{gpu.minor}"
        card = f"{gpu.name}, {size}, compute capability {capability}"
    ram, disk = psutil.virtual_memory(), shutil.disk_usage(ROOT)
    rows = {"place": place()} | versions() | {"GPU": card, "dtype": profile.compute_dtype}
    rows["RAM"] = f"{ram.total / 1e9:.0f} GB, {ram.available / 1e9:.0f} GB of it free"
    rows |= {"disk": f"{disk.free / 1e9:.0f} GB free", "profile": profile.name}
    if profile.gpu_bytes:
        rows["a step"] = profile.step
    print("\n".join(f"{name:<13} {value}" for name, value in rows.items()))


def runs_folder() -> Path:
    """Where runs belong: QLORA_RUNS; else Google Drive if Colab has mounted it, since it outlives
    Colab's disk; else runs/ of this repository."""
    if os.environ.get("QLORA_RUNS"):
        return Path(os.path.expanduser(os.environ["QLORA_RUNS"]))
    on_drive = place() == "Colab" and (DRIVE / "MyDrive").is_dir()
    return (DRIVE / "MyDrive" / "qlora-by-hand" if on_drive else ROOT) / "runs"


@contextlib.contextmanager
def writing(path: Path, advice="make room there, or choose another folder") -> Iterator[None]:
    """TutorialError with reason and advice if the disk refuses what is written to `path`."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch raise none of OSError's kind
        if not (isinstance(error, OSError | UnicodeError) or re.search(DISK_FULL, str(error))):
            raise
        wrong = f"{str(path)!r} could not be written ({getattr(error, 'strerror', 0) or error})"
        raise TutorialError(f"{wrong}: {advice}") from error


def check_writable(folder: Path, room: int = 10**8) -> None:
    """Make `folder`; TutorialError unless it can be written and its disk has `room` bytes free."""
    with writing(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    if free < room:
        wrong = f"has {free / 1e6:,.0f} MB free and {room / 1e6:,.0f} MB may be needed"
        advice = "free some, or choose a folder on another disk"
        raise TutorialError(f"the disk of {str(folder)!r} {wrong}: {advice}")


def write_text(path: Path, text: str) -> None:
    """`Path.write_text` in UTF-8, whole or not at all: under a temporary name, then renamed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Hands out an empty folder to fill, which at the end stands at `folder`. After an error, an
    interrupt or a kill `folder` is as it was, or, killed in the exchange, named NAME.old.part. Its
    files get the rights that the umask leaves: safetensors writes for their owner alone."""
    folder = folder.resolve()
    part, old = (folder.with_name(f"{folder.name}{ending}") for ending in (".part", ".old.part"))
    try:
        with writing(folder):
            shutil.rmtree(part, ignore_errors=True)  # what a kill has left
            part.mkdir(parents=True)
            yield part
            for path in filter(Path.is_file, part.rglob("*")):
                with contextlib.suppress(OSError):  # some disks know no rights
                    path.chmod(part.stat().st_mode & 0o666)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(folder, old)
            os.rename(part, folder)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def whole_number(least: int = 1, most: int = 10**6) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`, in ASCII digits."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            wrong = f"{text!r} is not a whole number from {least} to {most:,}"
            raise argparse.ArgumentTypeError(wrong)
        return int(text)

    return read


def exit_status(work: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Do a command line's work: 0 done, 1 an error told in one sentence on stderr, 130 Ctrl-C, 141
    output closed. Of several processes the first alone reports, and each tells its errors."""
    rank = os.environ.get("RANK", "0")
    for name in ("stdin", "stdout"):  # None if it is closed
        setattr(sys, name, getattr(sys, name) or io.TextIOWrapper(io.BytesIO()))
    (sys.__stdout__ or sys.stdout).reconfigure(errors="backslashreplace")  # pages lack letters
    try:
        with contextlib.redirect_stdout(sys.stdout if rank == "0" else io.StringIO()):
            work()
        return 0
    except BrokenPipeError:  # as by `| head`; no more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("the output was closed: the work ends here", file=sys.stderr)
        return 141
    except KeyboardInterrupt as error:
        text, status = f"\n{str(error) or interrupted}", 130
    except (TutorialError, OSError) as error:
        text, status = f"{type(error).__name__}: {error}", 1
    except Exception as error:  # torch's are known by their names, since torch is not imported here
        if not re.search("MemoryError|allocate memory|not enough memory", repr(error)):
            raise
        text, status = MEMORY_RAN_OUT, 1
    print(text if rank == "0" else f"process {rank}: {text}", file=sys.stderr)
    return status
