"""NF4 by hand (notebook 02) against bitsandbytes and torchao: ratios of median times, taking turns in one process with two threads,
on a 4096 x 4096 matrix in float32 and bfloat16; then the peak of extra memory while quantizing. `make bench-nf4`
"""

import contextlib
import importlib
import itertools
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from helpers.lessons import load_definitions

logging.disable(logging.WARNING)  # on import, bitsandbytes and torchao list the GPU extensions that they do not load
CHECKS = ("FLOATS", "check_floats", "check_block_size", "check_finite", "check_length")
nf4 = load_definitions("02", *CHECKS, "normal_float_codebook", "NF4_CODEBOOK", "quantize_nf4", "dequantize_nf4")
F = nf4["F"]  # bitsandbytes.functional, as the notebook imports it
SIZE, TURNS, BLOCK, SCALER_BLOCK = 4096, 9, 64, 256


def torchao_to_nf4() -> Callable | None:
    """torchao's quantizer, from where its releases keep it, or None if torchao is not installed."""
    for module in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(module).to_nf4
    return None


def medians(contenders: dict[str, Callable]) -> dict[str, float]:
    """Median seconds of each contender over TURNS turns, after one turn that does not count."""
    seconds = {name: [] for name in contenders}
    for turn in range(TURNS + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes_a_weight(name: str, dtype: torch.dtype) -> float:
    """Growth of this process's peak memory while `name` quantizes a matrix of `dtype`, outputs included, by weight. Linux only."""
    quantize = {"by hand": nf4["quantize_nf4"], "bitsandbytes": lambda w: F.quantize_4bit(w, quant_type="nf4")}[name]
    quantize(torch.randn(BLOCK))  # what the first call loads does not count
    w = torch.empty(SIZE, SIZE, dtype=dtype).normal_()

    def peak() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

    before = peak()
    kept = quantize(w)  # noqa: F841 - outputs stay until the peak is read
    return (peak() - before) / w.numel()


def main() -> None:
    torch.set_num_threads(2)
    to_nf4 = torchao_to_nf4()
    print(f"{SIZE} x {SIZE}, {torch.get_num_threads()} threads, medians of {TURNS} turns; time as a multiple of each library's")
    print(f"{'':<11} {'dtype':<9} {'contender':<13} {'ms':>6} {'/ bitsandbytes':>15} {'/ torchao':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
        packed, absmax = nf4["quantize_nf4"](w)
        stored, state = F.quantize_4bit(w, quant_type="nf4")
        ways = {
            "quantize": {
                "by hand": lambda w=w: nf4["quantize_nf4"](w),
                "bitsandbytes": lambda w=w: F.quantize_4bit(w, quant_type="nf4"),
            },
            "dequantize": {
                "by hand": lambda w=w, p=packed, a=absmax: nf4["dequantize_nf4"](p, a, w.shape, w.dtype),
                "bitsandbytes": lambda stored=stored, state=state: F.dequantize_4bit(stored, state),
            },
        }
        if to_nf4:
            ways["quantize"]["torchao"] = lambda w=w: to_nf4(w, BLOCK, SCALER_BLOCK)
            ways["dequantize"]["torchao"] = to_nf4(w, BLOCK, SCALER_BLOCK).get_original_weight
        for way, contenders in ways.items():
            taken = medians(contenders)
            for name, seconds in taken.items():
                others = [f"{seconds / taken[other]:.2f}" if other in taken else "-" for other in ("bitsandbytes", "torchao")]
                print(f"{way:<11} {str(dtype)[6:]:<9} {name:<13} {seconds * 1e3:>6.0f} {others[0]:>15} {others[1]:>10}")
    if not to_nf4:
        print("torchao is not installed, its rows are left out")
    if sys.platform == "linux":
        for dtype, name in itertools.product(("float32", "bfloat16"), ("by hand", "bitsandbytes")):
            command = [sys.executable, "-m", "tests.bench_nf4", name, dtype]  # a process each, since a peak only grows
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"peak extra memory while quantizing {dtype:<8} {name:<13} {run.stdout.split()[-1]} bytes a weight")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(f"{peak_bytes_a_weight(sys.argv[1], getattr(torch, sys.argv[2])):.2f}")
    else:
        main()
