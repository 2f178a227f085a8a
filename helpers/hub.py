"""Models of the hub: room for them before the download, files held against their hashes, a token only if one is asked for.

Imports environment, files, memory, profiles, errors. A model that is a folder of this repository concerns nothing here.
"""

import errno
import functools
import getpass
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.file_download import repo_folder_name
from transformers import FalconConfig

from helpers import environment, files, memory
from helpers.errors import ModelError, ResourceError
from helpers.profiles import Profile

FILES = ("*.json", "*.safetensors")  # no pickles, no code
SPARE_DISK = 10**9  # for tokenizer, adapter and checkpoints: an allowance
HOST_RAM = 3 * 10**9  # libraries, CUDA context, a matrix on its way to the GPU (files are memory-mapped): an allowance
STALE = 3600  # seconds after which nobody writes to a partial file any more
GB = 10**9


def download_bytes(config: FalconConfig) -> int:
    """Bytes of a Falcon's 16-bit safetensors on the hub, where the head is stored beside the embedding also if the two are tied."""
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    return 2 * (sum(memory.count_parameters(config).values()) + tied)


def snapshot(profile: Profile) -> Path:
    """The folder of the hub's local cache in which the profile's revision lies or will lie."""
    repository = repo_folder_name(repo_id=profile.model, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / repository / "snapshots" / (profile.revision or "main")


def is_complete(folder: Path) -> bool:
    """Whether every weight file that a snapshot's index names is there."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return all((folder / name).is_file() for name in names)


def check_room(profile: Profile, config: FalconConfig) -> None:
    """ResourceError unless the disk has room for what is still to be downloaded, and the RAM for loading (and on a CPU for training)."""
    folder = snapshot(profile)
    here = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    need = max(0, download_bytes(config) - here) + SPARE_DISK
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < need:
        raise ResourceError(
            f"{profile.model!r} needs {need / GB:.1f} GB of disk and {free / GB:.1f} GB are free: free some, or set HF_HOME to a folder on a larger disk"
        )
    need = HOST_RAM if profile.gpu_bytes else memory.plan(config, profile).total
    free = psutil.virtual_memory().available
    if free < need:
        raise ResourceError(
            f"{profile.model!r} needs {need / GB:.1f} GB of RAM with profile {profile.name!r} and {free / GB:.1f} GB are free: close other programs or kernels, or use profile 'tiny'"
        )


def fetch(profile: Profile, config: FalconConfig) -> None:
    """Download the profile's model if it is a hub model and not here: room is checked first, hashes after.

    huggingface_hub shows progress, asks again for what a broken connection left out, and checks sizes; files that are whole are not fetched
    again. Raises ResourceError, or ModelError.
    """
    if os.path.isdir(profile.model_path):
        return
    remove_partial_files(snapshot(profile))
    check_room(profile, config)
    if is_complete(snapshot(profile)):
        return
    try:
        folder = snapshot_download(profile.model, revision=profile.revision, allow_patterns=list(FILES))
    except Exception as error:  # errors of hub, network and disk share no base class, and huggingface_hub 2 has others than 1
        raise ModelError(
            f"{profile.model!r} could not be downloaded: {way_out(error)}; files that are whole are kept ({first_line(error)})"
        ) from error
    check_hashes(Path(folder))


def remove_partial_files(folder: Path) -> None:
    """Delete what a killed download left of a snapshot's files: huggingface_hub gives each try a file of its own and never reads an old one."""
    for file in (folder.parent.parent / "blobs").glob("*.incomplete"):
        if time.time() - file.stat().st_mtime > STALE:
            file.unlink()


def check_hashes(folder: Path) -> None:
    """ModelError, with the file deleted, if a weight file of a snapshot is not what the hub's hash says. Reads every byte, once.

    The cache names a large file by its sha256; where links cannot be made there is no such name, and nothing to compare with.
    """
    for file in sorted(folder.glob("*.safetensors")):
        blob = file.resolve()
        if not re.fullmatch("[0-9a-f]{64}", blob.name):
            continue
        found = files.sha256(blob)
        if found != blob.name:
            file.unlink()
            blob.unlink()
            raise ModelError(
                f"{file.name} has sha256 {found[:12]}... where the hub says {blob.name[:12]}...: it is deleted, run again"
            )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one that it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def wants_token(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that the model is gated: its owner lets in only those with a token."""
    return any(isinstance(cause, GatedRepoError) for cause in causes(error))


def way_out(error: BaseException) -> str:
    """What a reader can do about a model that could not be had, by what the error came from: an HTTP status, a timeout, a full disk."""
    if wants_token(error):
        return "the model is gated, accept its terms on its page with the account whose token is in HF_TOKEN"
    for cause in causes(error):
        code = getattr(getattr(cause, "response", None), "status_code", None)
        if code == 429:
            return "the hub takes no more requests for now (429), wait some minutes and run again"
        if code and code >= 500:
            return f"the hub has a fault of its own ({code}), run again later"
        if "Timeout" in type(cause).__name__:
            return "the hub does not answer in time, check the network and run again"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "the disk is full, make room or set HF_HOME to a folder on another one"
    return "check the name, the folder and the network, and run again"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or what kind of error it is."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def ask_for_token() -> str:
    """A token from Colab's secrets (HF_TOKEN), else typed unseen; it is neither shown nor stored. ModelError if there is none."""
    if environment.place() == "Colab":
        from google.colab import userdata

        try:
            return userdata.get("HF_TOKEN")
        except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
            pass
    try:
        token = getpass.getpass("This model is gated. A token of huggingface.co/settings/tokens that may read it: ").strip()
    except (EOFError, NotImplementedError):
        token = ""
    if not token:
        raise ModelError(
            "this model is gated and no token was given: store one as HF_TOKEN in Colab's secrets, or choose another model"
        )
    return token


def with_token(download: Callable) -> Callable:
    """`download`, tried without a token first; only if it says that the model is gated, one is asked for and it is tried again."""

    @functools.wraps(download)
    def tried_again(*arguments, **options):
        try:
            return download(*arguments, **options)
        except ModelError as error:
            if not wants_token(error) or os.environ.get("HF_TOKEN"):
                raise
        os.environ["HF_TOKEN"] = ask_for_token()
        return download(*arguments, **options)

    return tried_again
