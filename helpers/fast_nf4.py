"""NF4 on a CPU in a fifth of bitsandbytes' time, the same bits: used while a model loads. Imports nothing of the helpers.

Most of the time of a 4-bit load on a CPU is spent in one call, `torch.bucketize`: a binary search whose branches no processor can
predict. Fifteen comparisons with the fifteen midpoints between NF4's values do the same without a branch, sixteen weights an
instruction. Chunks stay in the cache, so the float32 temporaries of a whole matrix, 1.3 GB for Falcon-7b's largest, are never made.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from bitsandbytes import functional

CHUNK = 2**17  # weights; a multiple of every block size
TINY = np.float32(1e-38)  # bitsandbytes' smallest absmax


def nf4_bounds() -> list[np.float32]:
    """The 15 midpoints between NF4's 16 values, in float32, as bitsandbytes computes them."""
    values = functional.get_4bit_type("nf4", device="cpu")
    return list(((values[:-1] + values[1:]) / 2).numpy())


def as_float32(chunk: torch.Tensor) -> np.ndarray:
    """A new float32 array of the chunk's values. bfloat16 is the upper half of a float32. NumPy, for torch's threads get in our way."""
    if chunk.dtype == torch.bfloat16:
        wide = chunk.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(np.float32)
    return chunk.numpy().astype(np.float32)


def encode(chunk: torch.Tensor, packed: np.ndarray, absmax: np.ndarray, blocksize: int, bounds: list[np.float32]) -> None:
    """Quantize whole blocks: writes two codes a byte into `packed`, the blocks' absmax into `absmax`."""
    x = as_float32(chunk)
    blocks = x.reshape(-1, blocksize)
    np.abs(blocks).max(axis=1, out=absmax)
    with np.errstate(invalid="ignore"):  # infinity times 0: `quantize_nf4` sees it by the absmax
        blocks *= (np.float32(1) / np.maximum(absmax, TINY))[:, None]
    above = x > bounds[0]
    codes = above.view(np.uint8).copy()
    for bound in bounds[1:]:
        np.greater(x, bound, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    pairs = codes.view("<u2")  # the first code of a pair in the low byte, to be packed into the high half
    np.bitwise_or((pairs & 15) << 4, pairs >> 8, out=packed, casting="unsafe")


def quantize_nf4(weight: torch.Tensor, blocksize: int, pool: ThreadPoolExecutor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """bitsandbytes' packed bytes (n/2, 1) and absmax (n/blocksize, float32) of a CPU weight; None if a value is not finite."""
    flat, bounds = weight.detach().reshape(-1), nf4_bounds()
    packed, absmax = np.empty(flat.numel() // 2, np.uint8), np.empty(flat.numel() // blocksize, np.float32)

    def work(start: int) -> None:
        stop = min(start + CHUNK, flat.numel())
        part = packed[start // 2 : stop // 2], absmax[start // blocksize : stop // blocksize]
        encode(flat[start:stop], *part, blocksize, bounds)

    list(pool.map(work, range(0, flat.numel(), CHUNK)))
    if not np.isfinite(absmax).all():
        return None
    return torch.from_numpy(packed).unsqueeze(1), torch.from_numpy(absmax)


@contextlib.contextmanager
def fast_cpu_quantization() -> Iterator[None]:
    """While active, bitsandbytes quantizes NF4 weights on a CPU with `quantize_nf4`; all else, and all that follows, is its own code.

    Only the operator inside `bitsandbytes.functional.quantize_4bit` is exchanged; double quantization (1% of the time) stays the library's.
    """
    operators = torch.ops.bitsandbytes
    original = operators.quantize_4bit
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:

        def quantize(A, blocksize, quant_type, quant_storage):
            plain = A.device.type == "cpu" and quant_type == "nf4" and quant_storage == torch.uint8 and A.is_contiguous()
            result = quantize_nf4(A, blocksize, pool) if plain and A.numel() % blocksize == 0 else None
            return original.default(A, blocksize, quant_type, quant_storage) if result is None else result

        operators.quantize_4bit = SimpleNamespace(default=quantize)
        try:
            yield
        finally:
            operators.quantize_4bit = original
