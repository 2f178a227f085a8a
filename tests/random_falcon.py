"""Falcon-7b with random weights, to try what reads it: `python -m tests.random_falcon FOLDER`."""

import argparse
import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from helpers import environment, memory, profiles


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """N(0, 0.02^2), seeded by the name; norms are 1, biases 0, and the head is the embedding."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = name.replace("lm_head", "transformer.word_embeddings")
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    weights = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weights.normal_(0, 0.02, generator=generator).cpu()


def write(folder: Path, config: PreTrainedConfig, shard: str = "10GB") -> None:
    """Write it, with the tiny Falcon's tokenizer, in the hub's files: of `shard`, which has to fit
    in memory, at most. TutorialError if the disk refuses."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    split = split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=shard)
    part = folder.with_name(f"{folder.name}.part")  # without fsync, which may take minutes
    with environment.writing(folder), ThreadPoolExecutor(os.cpu_count()) as pool:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for file, names in split.filename_to_tensors.items():
            shapes = [model.get_parameter(name).shape for name in names]
            tensors = zip(names, pool.map(random_tensor, names, shapes), strict=True)
            save_file(dict(tensors), part / file, metadata={"format": "pt"})
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (part / "model.safetensors.index.json").write_text(json.dumps(index))
        model.config.save_pretrained(part)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # all its ids are Falcon's too
            shutil.copy(environment.ROOT / "data" / "tiny-falcon" / name, part / name)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.random_falcon", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=profiles.FALCON_7B, help=", ".join(memory.KNOWN_CONFIGS))
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    args = parser.parse_args()
    config = memory.known_config(args.model)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    write(args.folder, config)
