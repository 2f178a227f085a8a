"""A checkpoint with random weights in a Falcon's exact shapes, in the layouts that are found on the hub. Imports files, weights, shapes, profiles.

Same names, dtype, sizes and files as the real one, so that what reads it can be rehearsed without a download.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import FalconConfig, FalconForCausalLM

from helpers import files, weights
from helpers.errors import OutputError
from helpers.profiles import ROOT

LAYOUTS = (
    "shards",
    "hub",
    "bin",
)  # many safetensors shards; two, as tiiuae/falcon-7b has them; two pickled files of the same sizes
SHARDS = 15  # vilsonrodrigues/falcon-7b-sharded has as many
HUB_SHARD = 10**10  # bytes: gives Falcon-7b's 9.95 and 4.48 GB
DONE = "complete.json"  # written last
PIECE = 2**24  # weights drawn at a time
DTYPE = torch.bfloat16


def tensor_shapes(config: FalconConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the checkpoint, in order; the head is there although it is tied, as on the hub."""
    with torch.device("meta"):
        model = FalconForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_pieces(name: str, shape: tuple[int, ...], scale: float) -> Iterator[torch.Tensor]:
    """The elements of one tensor, N(0, scale^2) from a seed that the name gives; norms are one, biases zero; the head is the embedding."""
    name = name.replace("lm_head", "transformer.word_embeddings")
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))
    for start in range(0, prod(shape), PIECE):
        size = min(PIECE, prod(shape) - start)
        if len(shape) == 1:
            yield torch.zeros(size, dtype=DTYPE) if name.endswith("bias") else torch.ones(size, dtype=DTYPE)
        else:
            yield torch.empty(size).normal_(0, scale, generator=generator).to(DTYPE)


def checkpoint_bytes(config: FalconConfig) -> int:
    """Bytes of all tensors of the checkpoint."""
    return DTYPE.itemsize * sum(map(prod, tensor_shapes(config).values()))


def file_names(config: FalconConfig, layout: str) -> dict[str, list[tuple[str, int]]]:
    """The files of a layout, each with its tensors as (name, bytes), in order."""
    sizes = {name: DTYPE.itemsize * prod(shape) for name, shape in tensor_shapes(config).items()}
    total = sum(sizes.values())
    limit = total // SHARDS if layout == "shards" else min(HUB_SHARD, int(0.7 * total))
    groups = weights.split_by_size(sizes, limit)
    stem, ending = ("pytorch_model", "bin") if layout == "bin" else ("model", "safetensors")
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.{ending}" for i in range(1, len(groups) + 1)]
    return {file: [(name, sizes[name]) for name in group] for file, group in zip(names, groups, strict=True)}


def write_checkpoint(folder: Path, config: FalconConfig, layout: str) -> bool:
    """Write the checkpoint, or leave a finished one of the same config and layout alone; returns whether it was written.

    Raises OutputError if the disk is too small (with room for one more file if pickled: its tensors come from a safetensors file).
    """
    shapes, contents = tensor_shapes(config), file_names(config, layout)
    done, wanted = folder / DONE, {"layout": layout, "config": json.loads(config.to_json_string()), "files": list(contents)}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return False
    largest, total = max(sum(n for _, n in file) for file in contents.values()), checkpoint_bytes(config)
    weights.check_disk(folder, total + (largest if layout == "bin" else 0) + 10**7, f"a checkpoint of {total / 1e9:.1f} GB")
    files.clean(folder)
    if folder.is_dir():
        files.discard(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"the folder {str(folder)!r} cannot be written ({error.strerror}): choose another") from error
    for name in ("tokenizer.json", "tokenizer_config.json"):  # its ids all lie below Falcon's 65,024
        shutil.copy(ROOT / "data" / "tiny-falcon" / name, folder / name)
    saved = FalconConfig(**config.to_dict() | {"architectures": ["FalconForCausalLM"], "dtype": "bfloat16"})
    saved.save_pretrained(folder)
    with tqdm(total=total, desc=f"writing {layout}", unit="B", unit_scale=True) as bar:

        def pieces(name: str) -> Iterator[torch.Tensor]:
            for piece in random_pieces(name, shapes[name], config.initializer_range):
                yield piece
                bar.update(piece.nbytes)

        for file, tensors in contents.items():
            path = folder / file
            weights.write_safetensors(
                path.with_suffix(".safetensors"), {name: shapes[name] for name, _ in tensors}, DTYPE, pieces
            )
            if layout == "bin":
                weights.pickle_shard(path.with_suffix(".safetensors"), path)
    index = {file: [name for name, _ in tensors] for file, tensors in contents.items()}
    weights.write_index(folder, index, total, weights.PICKLED_INDEX if layout == "bin" else weights.INDEX)
    files.write_text(done, json.dumps(wanted))
    return True
