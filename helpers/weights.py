"""Weight files on disk: written tensor by tensor, pickled ones recognized and converted, free space. Imports command, files, errors.

`python -m helpers.weights FOLDER` converts a folder of pickled weights to safetensors.
"""

import argparse
import contextlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

import torch
from huggingface_hub import list_repo_files
from safetensors import safe_open

from helpers import command, files
from helpers.errors import ModelError, OutputError, PickledWeightsError

INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
AGAIN = "make room on that disk and run again"
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check_disk(folder: Path, need: int, what: str) -> None:
    """OutputError unless `folder` (or its first parent that exists) can be written, on a disk with `need` bytes free for `what`."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(
            f"{str(folder)!r} cannot be written, since {str(existing)!r} is no folder or is read-only: choose another folder for {what}"
        )
    free = shutil.disk_usage(existing).free
    if free < need:
        raise OutputError(
            f"the disk of {str(folder)!r} has {free / 1e9:,.1f} GB free and {what} takes up to {need / 1e9:,.1f} GB: free some, or choose another disk"
        )


def split_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes (a name larger than that is a group of its own)."""
    groups, filled = [[]], 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, pieces: Callable[[str], Iterable[torch.Tensor]]
) -> None:
    """One safetensors file, holding only one piece of one tensor in memory; never half a file. OutputError if the disk refuses.

    `pieces(name)` yields the tensor's elements in order. Format: 8 bytes of header length, header in JSON, data
    (https://huggingface.co/docs/safetensors). `safetensors.torch.save_file` would need all tensors at once.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.writing(path, AGAIN), files.whole_file(path) as part, part.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            written = 0
            for piece in pieces(name):
                written += out.write(piece.detach().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            if written != prod(shape) * dtype.itemsize:
                raise ModelError(f"tensor {name} came with {written} bytes where its shape {shape} says {prod(shape)} elements")


def write_index(folder: Path, contents: dict[str, list[str]], total_bytes: int, name: str = INDEX) -> None:
    """The index of a sharded checkpoint: which tensor lies in which file."""
    weight_map = {tensor: file for file, tensors in contents.items() for tensor in tensors}
    with files.writing(folder / name, AGAIN):
        text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1)
        files.write_text(folder / name, text + "\n")


def pickle_shard(source: Path, target: Path) -> None:
    """The tensors of a safetensors file as a pickled file of torch's; the source is deleted. Tensors stay mapped, not copied."""
    with safe_open(source, framework="pt") as tensors, files.writing(target, AGAIN), files.whole_file(target) as part:
        torch.save({name: tensors.get_tensor(name) for name in tensors.keys()}, part)  # noqa: SIM118 - not a dict
    source.unlink()


def pickled_files(folder: Path) -> list[Path]:
    """The pickled weight files in a folder, in order."""
    return sorted(folder.glob("pytorch_model*.bin"))


def refuse_pickled(model: str, revision: str | None) -> None:
    """PickledWeightsError if `model`, a folder or a hub id, has pickled weights and none in safetensors; asks for names only."""
    names = []
    if os.path.isdir(model):
        names = os.listdir(model)
    else:
        with contextlib.suppress(Exception):  # no network, no such repository: the error that led here tells
            names = list_repo_files(model, revision=revision)
    pickled = [name for name in names if name.endswith(".bin")]
    if not pickled or any(name.endswith(".safetensors") for name in names):
        return
    if os.path.isdir(model):
        way_out = f"convert them once with `python -m helpers.weights {model}`"
    else:
        way_out = "choose a copy in safetensors (for Falcon-7b: tiiuae/falcon-7b at the pinned revision, or vilsonrodrigues/falcon-7b-sharded), or download and convert them with `python -m helpers.weights FOLDER`"
    raise PickledWeightsError(
        f"the weights of {model!r} are pickled ({pickled[0]}) and are not loaded, since a pickle can run code and may need a whole file in memory: {way_out}"
    )


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, mapped rather than read where it is in torch's zip format; ModelError if it is unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(
            f"{path.name} in {str(path.parent)!r} is no sound file of tensors: fetch it again ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def convert_pickled(folder: Path) -> list[Path]:
    """Write the pickled weights of `folder` as safetensors beside them, one tensor in memory at a time; returns the new files.

    Raises ModelError if there are none or one is unreadable, OutputError if the disk is too small.
    """
    sources = pickled_files(folder)
    if not sources:
        raise ModelError(f"no pytorch_model*.bin in {str(folder)!r}: name the folder of a model that has them")
    check_disk(folder, sum(path.stat().st_size for path in sources), "their copy in safetensors")
    written, total = {}, 0
    for source in sources:
        tensors = load_pickled(source)
        name = source.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) != 1:
            raise ModelError(f"{source.name} mixes {sorted(map(str, dtypes))}: convert it with safetensors' own tools")
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        files.clean(folder / name)
        write_safetensors(folder / name, shapes, dtypes.pop(), lambda key, tensors=tensors: [tensors[key]])
        written[name] = list(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(written) > 1:
        write_index(folder, written, total)
    return [folder / name for name in written]


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`."""
    parser = argparse.ArgumentParser(prog="python -m helpers.weights", description="Convert pickled weights to safetensors.")
    parser.add_argument(
        "folder", metavar="FOLDER", type=command.named, help="of a model with pytorch_model*.bin; the copy is written beside them"
    )
    folder = Path(parser.parse_args(arguments).folder)
    return command.status(lambda: print("\n".join(map(str, convert_pickled(folder)))), "interrupted: run the same command again")


if __name__ == "__main__":
    sys.exit(main())
