"""What only a GPU can tell: NF4 bytes of its kernel, peak memory against the planner, tokens a second. `pytest -m gpu` writes
data/measured_gpu.json with it; the same functions run on a CPU, where a test keeps them working.
"""

import dataclasses
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as F
import torch

from helpers import loading, memory, prompting, records, training
from helpers.lessons import load_definitions
from helpers.profiles import ROOT, Profile

MEASURED = ROOT / "data" / "measured_gpu.json"
BY_HAND = (
    "FLOATS", "check_floats", "check_block_size", "check_finite", "check_length",
    "normal_float_codebook", "NF4_CODEBOOK", "dynamic_map", "DYNAMIC_MAP", "quantize_nf4", "dequantize_nf4",
)  # fmt: skip


def differing_bytes(device: str, dtype: torch.dtype, elements: int = 2**21) -> int:
    """Packed NF4 bytes of `elements` random weights in which bitsandbytes on `device` differs from notebook 02's quantization by hand."""
    weights = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, _ = F.quantize_4bit(weights.to(device), blocksize=64, quant_type="nf4", compress_statistics=False)
    by_hand = load_definitions("02", *BY_HAND)["quantize_nf4"](weights)[0]
    return int((packed.cpu().flatten() != by_hand.flatten()).sum())


def measure(profile: Profile, steps: int, device: str) -> dict:
    """Train `steps` steps of `profile` at its full batch and length, as helpers.training does: peak bytes, planned bytes, tokens a second.

    Every example is as long as the profile allows, as the planner assumes. The planner's CUDA context is no tensor: left out on both sides.
    """
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    profile = dataclasses.replace(profile, max_steps=steps, save_steps=10**6, warmup_steps=1)
    tokenizer = loading.load_tokenizer(profile)
    encoded, _ = prompting.encode(records.read_tickets("validation"), tokenizer, max_length=10**6)
    full = encoded.map(
        lambda row: {key: (row[key] * profile.max_length)[-profile.max_length :] for key in ("input_ids", "labels")}
    )
    full = full.select(range(max(len(full) // 2, profile.micro_batch * profile.accumulation)))
    model = loading.load_base(profile, device)
    loaded = torch.cuda.memory_allocated() if on_gpu else None
    model = loading.attach_lora(model, profile)
    with tempfile.TemporaryDirectory() as folder:
        trained = training.train(training.build_trainer(model, tokenizer, full, profile, Path(folder)))
    plan = memory.plan(model.config, profile)
    return {
        "profile": profile.name,
        "model": profile.model,
        "batch": [profile.micro_batch, profile.accumulation, profile.max_length],
        "steps": steps,
        "final_loss": trained["final_loss"],
        "tokens_per_second": trained["useful_tokens_per_second"],
        "loaded_bytes": loaded,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "planned_bytes": plan.total - plan.context,
    }


def note(name: str, values: dict) -> None:
    """Put `values` under this card's name into data/measured_gpu.json, with the versions they hold for."""
    file = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    card = file.setdefault(torch.cuda.get_device_name(0), {})
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    card["versions"] = {"python": platform.python_version(), "cuda": torch.version.cuda} | {p: version(p) for p in packages}
    card[name] = values
    MEASURED.write_text(json.dumps(file, indent=2) + "\n")
