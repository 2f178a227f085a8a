"""The fast CPU quantizer gives bitsandbytes' bits, is used while a model loads, and is gone afterwards."""

import contextlib
import dataclasses

import pytest
import torch
from bitsandbytes import functional

from helpers import fast_nf4, loading

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unpleasant(dtype: torch.dtype, blocks: int = 600) -> dict[str, torch.Tensor]:
    """Weights by name: ordinary ones and the corners of the number format; more than one chunk of them would be slow."""
    generator, info = torch.Generator().manual_seed(0), torch.finfo(dtype)
    normal = torch.randn(blocks, 64, generator=generator)
    uniform = torch.rand(blocks, 64, generator=generator) * 2 - 1
    bounds = torch.tensor([float(bound) for bound in fast_nf4.nf4_bounds()])
    on_bounds = bounds[torch.randint(15, (blocks, 64), generator=generator)]
    on_bounds[:, 0] = 1.0  # absmax 1: every other weight sits exactly between two codes
    mixed = normal * torch.logspace(-30, 4, blocks)[:, None]
    cases = {"normal": normal, "uniform": uniform, "on bounds": on_bounds, "scaled bounds": on_bounds * 0.37, "zero": normal * 0}
    cases |= {
        "constant": torch.full((blocks, 64), -0.3),
        "denormal": uniform * info.tiny,
        "huge": uniform * info.max,
        "mixed": mixed,
    }
    return {name: values.clamp(info.min, info.max).to(dtype) for name, values in cases.items()}


def quantized(weight: torch.Tensor, **options) -> list[torch.Tensor]:
    packed, state = functional.quantize_4bit(
        weight, quant_type=options.pop("quant_type", "nf4"), compress_statistics=True, **options
    )
    return [packed, state.absmax, state.offset, state.state2.absmax, state.code]


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(octets(x), octets(y)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def used(monkeypatch):
    """How often the fast quantizer gave the result."""
    calls, original = [], fast_nf4.quantize_nf4

    def counted(*args):
        result = original(*args)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(fast_nf4, "quantize_nf4", counted)
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
def test_the_bits_are_bitsandbytes(used, dtype, blocksize):
    cases = unpleasant(dtype)
    wanted = {name: quantized(weight, blocksize=blocksize) for name, weight in cases.items()}
    with fast_nf4.fast_cpu_quantization():
        for name, weight in cases.items():
            assert same(quantized(weight, blocksize=blocksize), wanted[name]), name
    assert used == [True] * len(cases)


def test_the_bits_are_bitsandbytes_across_chunks(used):
    weight = torch.randn(3, fast_nf4.CHUNK // 2 + 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    wanted = quantized(weight)
    with fast_nf4.fast_cpu_quantization():
        assert same(quantized(weight), wanted)
    assert used == [True]


def test_what_it_does_not_do_is_left_to_the_library(used):
    spoiled = torch.randn(4, 64)
    spoiled[1, 3], spoiled[2, 5] = float("nan"), float("inf")
    cases = [(spoiled, {}), (torch.randn(100), {}), (torch.randn(4, 64), {"quant_type": "fp4"}), (torch.randn(64, 4).T, {})]
    wanted = [quantized(weight, **options) for weight, options in cases]
    with fast_nf4.fast_cpu_quantization():
        found = [quantized(weight, **options) for weight, options in cases]
    assert all(map(same, found, wanted))
    assert not any(used)


def test_afterwards_the_library_is_as_it_was(used):
    before = torch.ops.bitsandbytes.quantize_4bit
    with contextlib.suppress(ZeroDivisionError), fast_nf4.fast_cpu_quantization():
        assert torch.ops.bitsandbytes.quantize_4bit is not before
        _ = 1 / 0
    assert torch.ops.bitsandbytes.quantize_4bit is before
    quantized(torch.randn(4, 64))
    assert used == []


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_model_loads_with_it_to_the_same_bits(used, tiny, compute_dtype):
    profile = dataclasses.replace(tiny, compute_dtype=compute_dtype)
    plain = loading.read_4bit(profile, profile.model_path, quantization_config=loading.quantization_config(profile))
    assert used == []
    fast = loading.load_base(profile)
    assert used == [True] * 16
    states = plain.state_dict(), fast.state_dict()
    assert states[0].keys() == states[1].keys()
    assert same(list(states[0].values()), list(states[1].values()))
