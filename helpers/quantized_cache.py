"""The 4-bit base kept on disk, so that it is quantized once: `--cache-4bit DIR`. Imports loading, files, weights, memory, profiles, errors.

A copy is used only if everything that decided its bits is as it was, and every file has the hash it was written with. Otherwise it is
not loaded: the reason is told, the model is quantized anew, and the copy is replaced.
"""

import hashlib
import json
import os
import re
from importlib.metadata import version
from pathlib import Path

from transformers import FalconForCausalLM

from helpers import files, loading, memory, weights
from helpers.errors import ModelError, OutputError
from helpers.profiles import Profile

MANIFEST = "manifest.json"
DECIDING = ("torch", "transformers", "bitsandbytes", "safetensors")  # a new version of these may find or read other bits


def cache_folder(profile: Profile, cache: str | Path, device: str | None = None) -> Path:
    """Where in `cache` the copy of this model lies: model, revision, quantization, dtype and kind of device are in the name."""
    quantization = loading.quantization_config(profile)
    kind = quantization.bnb_4bit_quant_type + ("-double" if quantization.bnb_4bit_use_double_quant else "")
    name = profile.model
    if os.path.isabs(name):  # a folder elsewhere: its last part, told apart by a hash of the whole
        name = f"{Path(name).name}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    name = re.sub(r"[^\w.-]+", "--", name)
    revision = (source(profile)["revision"] or "local")[:12]
    return Path(cache) / f"{name}@{revision}-{kind}-{profile.compute_dtype}-{(device or profile.device).split(':')[0]}"


def source(profile: Profile) -> dict:
    """What tells one set of weights from another: the commit on the hub, or size and time of each weight file of a folder."""
    folder = Path(profile.model_path)
    if not folder.is_dir():
        return {"revision": getattr(loading.load_config(profile), "_commit_hash", None) or profile.revision, "files": {}}
    stats = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors"))}
    return {"revision": profile.revision, "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def identity(profile: Profile, device: str | None = None) -> dict:
    """Everything that decides the bits of a copy."""
    return {
        "model": profile.model,
        "source": source(profile),
        "quantization": {key: str(value) for key, value in sorted(loading.quantization_config(profile).to_dict().items())},
        "dtype": profile.compute_dtype,
        "device": (device or profile.device).split(":")[0],
        "versions": {name: version(name) for name in DECIDING},
    }


def load_base(profile: Profile, cache: str | Path, device: str | None = None) -> FalconForCausalLM:
    """As `loading.load_base`, the same bits: from the copy in `cache` if it is sound and of this identity, else quantized and saved there.

    Errors as `loading.load_base`, and OutputError if the copy cannot be written; repaired and proven to be 4-bit either way.
    """
    wanted, folder = identity(profile, device), cache_folder(profile, cache, device)
    files.clean(folder)
    reason = why_not(folder, wanted)
    if reason is None:
        try:
            model = loading.read_4bit(profile, str(folder), device)
            model.name_or_path = model.config._name_or_path = profile.model_path
            return model
        except ModelError as error:
            reason = f"it cannot be loaded ({error})"
    print(f"4-bit copy {folder.name}: {reason}; quantizing and saving it")
    weights.check_disk(folder, int(1.05 * expected_bytes(profile)) + 10**6, "the 4-bit copy of the model")
    model = loading.load_base(profile, device)
    save(model, folder, wanted)
    return model


def expected_bytes(profile: Profile) -> int:
    """Bytes of the copy's tensors, predicted from the config."""
    return memory.expected_footprint(loading.load_config(profile), rest_bytes=profile.dtype.itemsize)


def why_not(folder: Path, wanted: dict) -> str | None:
    """Why the copy in `folder` is not to be used, in a few words; None if it is sound and of the identity `wanted`."""
    if not folder.exists():
        return "none yet"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found, hashes = manifest["identity"], manifest["files"]
        for key in wanted:
            if found[key] != wanted[key]:
                return f"its {key} is {found[key]}, now {wanted[key]}" if key != "source" else "the weights have changed since"
        for name, (size, digest) in hashes.items():
            if (folder / name).stat().st_size != size or files.sha256(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    return None


def save(model: FalconForCausalLM, folder: Path, wanted: dict) -> None:
    """Write the copy: no reader ever sees half of one. OutputError if that fails."""
    try:
        with files.whole_folder(folder) as part:
            dtype = model.config.dtype
            model.save_pretrained(part, max_shard_size="100GB")
            model.config.dtype = dtype  # saving left its name there
            hashes = {path.name: [path.stat().st_size, files.sha256(path)] for path in sorted(part.iterdir())}
            (part / MANIFEST).write_text(json.dumps({"identity": wanted, "files": hashes}, indent=1) + "\n")
    except OSError as error:
        raise OutputError(
            f"the 4-bit copy cannot be written to {str(folder.parent)!r} ({error.strerror or error}): choose another folder, or go without --cache-4bit"
        ) from error
