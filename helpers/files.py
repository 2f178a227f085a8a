"""Files and folders that are whole or not there: written under a temporary name, forced to the disk, renamed. Imports processes, errors.

A process that is killed leaves at most `NAME.PID.part`, which nothing reads, and `NAME.PID.old`, what stood at NAME before. `clean`,
called when the next run starts, puts back an `.old` whose NAME is missing, and removes the rest.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from helpers import processes
from helpers.errors import OutputError

LEFTOVER = r"(\.(?P<pid>\d{1,9}))?\.(?P<kind>part|old)"  # what follows the name; several processes that write one thing leave out the number
RESUME = "make room on that disk, then run the same command with --resume"


def beside(path: Path, kind: str) -> Path:
    """The temporary name of this process for `path`, in the same folder: kind is "part" or "old"."""
    return path.with_name(f"{path.name}.{os.getpid()}.{kind}")


@contextlib.contextmanager
def writing(path: Path, way_out: str = RESUME) -> Iterator[None]:
    """OutputError, with the reason and `way_out`, if `path` cannot be written while this is active, for instance on a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if processes.is_broken_connection(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutputError(f"{path.name} could not be written to {str(path.parent)!r} ({reason}): {way_out}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Hands out a temporary name to write to; at the end the file is at `path`, on the disk. After an error `path` is as it was."""
    part = beside(path, "part")
    try:
        yield part
        flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """`Path.write_text` in UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(folder: Path, outdated: Iterable[Path] = ()) -> Iterator[Path]:
    """Hands out an empty folder to fill; at the end it stands at `folder`, on the disk. After an error `folder` is as it was.

    `outdated` are files that tell of what stands there now: they go when the new folder is complete, just before it takes the place.
    """
    part = beside(folder, "part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in (*part.rglob("*"), part):
            flush(path)
        for path in outdated:
            path.unlink(missing_ok=True)
        put_in_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def put_in_place(part: Path, folder: Path) -> None:
    """Rename the complete `part` to `folder`; what stood there is moved aside for that moment and deleted only when the new one stands."""
    old = beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a killed process that had this process's number
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, old)
            try:
                os.rename(part, folder)
                break
            except OSError as error:  # another process of the same run was quicker: move its folder aside too
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(old, ignore_errors=True)
        flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)


def clean(path: Path) -> None:
    """Remove what killed processes left beside `path`, after putting back what they had moved aside.

    The `.part` of a process that still runs stays: several processes of one run may write the same thing.
    """
    for left in sorted(path.parent.glob(glob.escape(path.name) + ".*")):
        found = re.fullmatch(re.escape(path.name) + LEFTOVER, left.name)
        with contextlib.suppress(OSError):  # another process cleans up at the same moment
            if found and found["kind"] == "old" and not path.exists():
                os.rename(left, path)
            elif found and not (found["pid"] and runs(int(found["pid"]))):
                remove(left)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder that others read: it loses its name first, so that a kill on the way leaves no half of it under that name."""
    part = beside(folder, "part")
    remove(part)
    remove(folder.rename(part))


def runs(pid: int) -> bool:
    """Whether another process of this number is running on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network drives know no fsync of a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """sha256 of a file that need not fit in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
