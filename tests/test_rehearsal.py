"""`make rehearse-7b` on the tiny Falcon, its random checkpoint, and its fast quantizer."""

import json
import sys

import pytest
import torch
from bitsandbytes import functional

from helpers.environment import ROOT

FOLDER = ROOT / "data" / "rehearsal"
sys.path.insert(0, str(FOLDER))
fast_nf4, rehearse = (__import__(name) for name in ("fast_nf4", "rehearse"))


def test_load_train_die_resume_and_answer(tmp_path, monkeypatch):
    watched = rehearse.watched

    def quick(phase, profile, work):
        if phase in ("train", "answer"):
            return watched(phase, profile, work)
        peaks = dict.fromkeys(("seconds", "peak_anonymous_bytes", "peak_rss_bytes"), 0)
        return peaks | rehearse.PHASES[phase](profile, work)

    monkeypatch.setattr(rehearse, "watched", quick)
    assert rehearse.main(["--model=data/tiny-falcon", "--layers=2", f"--folder={tmp_path}"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["rehearsal.json"], "nothing else is left"
    record = json.loads((tmp_path / "rehearsal.json").read_text())
    assert record["summary"]["within_targets"] and record["phases"]["resume"]["resumed_steps"] == 2
    kept = json.loads((FOLDER / "rehearsal_7b.json").read_text())
    assert rehearse.table(kept) in (FOLDER / "README.md").read_text()


def bits(weight: torch.Tensor, blocksize: int) -> list[list[int]]:
    options = {"quant_type": "nf4", "compress_statistics": True, "blocksize": blocksize}
    packed, s = functional.quantize_4bit(weight, **options)
    tensors = (packed, s.absmax, s.offset.view(1), s.state2.absmax)
    return [tensor.view(torch.uint8).tolist() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fast_quantizer_gives_the_bits_of_bitsandbytes(dtype, monkeypatch):
    monkeypatch.setattr(fast_nf4, "CHUNK", 2**11)
    info, size = torch.finfo(dtype), (fast_nf4.CHUNK // 128 + 2, 128)  # more than one chunk
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    on_bounds = torch.tensor(fast_nf4.bounds())[torch.arange(uniform.numel()).view(size) % 15]
    on_bounds[:, ::64] = 1.0  # the absmax: all others lie exactly between two codes
    cases = [uniform * scale for scale in (0, info.tiny, 1, info.max)]
    cases += [on_bounds, on_bounds * 0.37, uniform * torch.logspace(-30, 4, size[0])[:, None]]
    cases += [uniform.index_fill(1, torch.tensor(3), torch.nan)]  # left to the library
    for blocksize in (64, 128):
        for weight in (values.clamp(info.min, info.max).to(dtype) for values in cases):
            wanted = bits(weight, blocksize)
            with fast_nf4.fast_cpu_quantization():
                assert bits(weight, blocksize) == wanted
