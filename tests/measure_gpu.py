"""What only a GPU can tell: NF4 bytes of its kernel, peak memory against the planner, speed.

`pytest -m gpu` writes data/measured/gpu.json with it; a test runs the same functions on a CPU.
"""

import dataclasses
import json
import tempfile

import bitsandbytes.functional as F
import torch
from datasets import Dataset

from helpers import environment, loading, memory, nf4, prompting, records, training
from helpers.environment import ROOT
from helpers.profiles import Profile

MEASURED = ROOT / "data" / "measured" / "gpu.json"


def differing_bytes(device: str, dtype: torch.dtype, elements: int = 2**21) -> int:
    """In how many packed bytes of random weights bitsandbytes on `device` differs from by hand."""
    weights = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": False}
    packed, _ = F.quantize_4bit(weights.to(device), **options)
    return int((packed.cpu().flatten() != nf4.quantize_nf4(weights)[0]).sum())


def measure(profile: Profile, steps: int, device: str) -> dict:
    """Train `steps` steps at the profile's full batch and length: peak and planned bytes, speed.

    Every example is as long as the profile allows, as the planner assumes. The planner's CUDA
    context is no tensor: it is left out on both sides.
    """
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    profile = dataclasses.replace(profile, max_steps=steps, save_steps=10**6, warmup_steps=1)
    tokenizer, length = loading.load_tokenizer(profile), profile.max_length
    encoded, _ = prompting.encode(records.read_tickets("validation"), tokenizer, 10**6)
    keys = ("input_ids", "labels")
    full = Dataset.from_list(
        [{key: (row[key] * length)[-length:] for key in keys} for row in encoded]
    )
    base = loading.load_base(profile, device)
    loaded = torch.cuda.memory_allocated() if on_gpu else None
    model = loading.attach_lora(base, profile)
    with tempfile.TemporaryDirectory() as folder:
        trained = training.fine_tune(model, tokenizer, full, profile, folder)
    plan = memory.plan(model.config, profile)
    return {
        "profile": profile.name,
        "model": profile.model,
        "batch": [profile.micro_batch, profile.accumulation, length],
        "steps": steps,
        "final_loss": trained["final_loss"],
        "tokens_per_second": trained["useful_tokens_per_second"],
        "loaded_bytes": loaded,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "planned_bytes": plan.total - plan.context,
    }


def note(name: str, values) -> None:
    """Put `values` under this card's name into MEASURED, with the versions they hold for."""
    file = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    card = file.setdefault(torch.cuda.get_device_name(0), {})
    card["versions"] = environment.versions() | {"cuda": torch.version.cuda}
    card[name] = values
    MEASURED.write_text(json.dumps(file, indent=2) + "\n")
