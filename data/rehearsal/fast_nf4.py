"""NF4 on a CPU in a fifth of bitsandbytes' time, the same bits: for the load of a 7B model.

bitsandbytes looks each weight up by binary search, whose branches no processor can predict. Fifteen
comparisons with the midpoints between NF4's values do the same without a branch. Chunks stay in the
cache, so no float32 copy of a matrix is made, 1.3 GB for Falcon-7b's largest.
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


def bounds() -> np.ndarray:
    """The 15 midpoints between NF4's 16 values, in float32, as bitsandbytes computes them."""
    values = functional.get_4bit_type("nf4", device="cpu")
    return ((values[:-1] + values[1:]) / 2).numpy()


def as_float32(chunk: torch.Tensor) -> np.ndarray:
    """A new float32 array; bfloat16 is its upper half. NumPy, since torch's threads get in the way
    of those here.
    """
    if chunk.dtype == torch.bfloat16:
        wide = chunk.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(np.float32)
    return chunk.numpy().astype(np.float32)


def encode(chunk: torch.Tensor, packed: np.ndarray, absmax: np.ndarray, blocksize: int) -> None:
    """Quantize whole blocks: two codes a byte into `packed`, each block's maximum into `absmax`."""
    x = as_float32(chunk)
    blocks = x.reshape(-1, blocksize)
    np.abs(blocks).max(axis=1, out=absmax)
    with np.errstate(invalid="ignore"):  # infinity times 0: `quantize` sees it by the absmax
        blocks *= (np.float32(1) / np.maximum(absmax, TINY))[:, None]
    codes, above = np.zeros(x.shape, np.uint8), np.empty(x.shape, bool)
    for bound in bounds():
        np.greater(x, bound, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    pairs = codes.view("<u2")  # the first code of a pair is the low byte, and goes to the high half
    np.bitwise_or((pairs & 15) << 4, pairs >> 8, out=packed, casting="unsafe")


def quantize(
    weight: torch.Tensor, blocksize: int, pool: ThreadPoolExecutor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """bitsandbytes' packed bytes (n/2, 1) and float32 absmax (n/blocksize) of a weight on the CPU;
    None if a value is not finite.
    """
    flat = weight.detach().reshape(-1)
    packed = np.empty(flat.numel() // 2, np.uint8)
    absmax = np.empty(flat.numel() // blocksize, np.float32)

    def work(start: int) -> None:
        stop = min(start + CHUNK, flat.numel())
        scales = absmax[start // blocksize : stop // blocksize]
        encode(flat[start:stop], packed[start // 2 : stop // 2], scales, blocksize)

    list(pool.map(work, range(0, flat.numel(), CHUNK)))
    if not np.isfinite(absmax).all():
        return None
    return torch.from_numpy(packed).unsqueeze(1), torch.from_numpy(absmax)


@contextlib.contextmanager
def fast_cpu_quantization() -> Iterator[None]:
    """While active, bitsandbytes quantizes NF4 weights on a CPU with `quantize`.

    What that does not do is left to the library, double quantization (1% of the time) too.
    """
    operators = torch.ops.bitsandbytes
    original = operators.quantize_4bit
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def replacement(A, blocksize, quant_type, quant_storage):
            ours = (A.device.type, quant_type, quant_storage) == ("cpu", "nf4", torch.uint8)
            ours = ours and A.is_contiguous() and A.numel() % blocksize == 0
            result = quantize(A, blocksize, pool) if ours else None
            return result or original.default(A, blocksize, quant_type, quant_storage)

        operators.quantize_4bit = SimpleNamespace(default=replacement)
        try:
            yield
        finally:
            operators.quantize_4bit = original
