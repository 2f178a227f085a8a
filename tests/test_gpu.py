"""On a machine with an NVIDIA GPU: `pytest -m gpu` measures, asserts, writes
data/measured/gpu.json.

Elsewhere these are skipped. The 7B runs load tiiuae/falcon-7b (14 GB) from the hub, or Falcon-7b's
shapes from the folder named in QLORA_FALCON_7B.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from helpers import profiles
from tests import measure_gpu
from tests.notebooks import ROOT, notebook

NO_GPU = "needs an NVIDIA GPU and torch finds none on this machine"
T4_BYTES = 15 * 10**9
FALCON = os.environ.get("QLORA_FALCON_7B")
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def on_gpu(function):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
    return pytest.mark.gpu(skip(function))


@pytest.fixture
def as_small_as_a_t4():
    """This process may take 15 GB of the card, whatever its size."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, T4_BYTES / total))
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@on_gpu
@by_dtype
def test_the_cards_nf4_bytes_are_those_by_hand(dtype):
    differ = measure_gpu.differing_bytes("cuda", dtype)
    measure_gpu.note(f"nf4 bytes that differ, of {2**20:,}, {dtype}", differ)
    assert differ == 0


@on_gpu
def test_the_t4_profile_in_15_gb_takes_what_the_planner_says(as_small_as_a_t4):
    profile = profiles.PROFILES["colab-t4"]
    if FALCON:
        profile = dataclasses.replace(profile, model=FALCON, revision=None)
    measured = measure_gpu.measure(profile, steps=12, device="cuda")
    measure_gpu.note("colab-t4 in 15 GB", measured)
    assert measured["peak_bytes"] == pytest.approx(measured["planned_bytes"], rel=0.08)
    assert measured["tokens_per_second"] > 0


@on_gpu
@pytest.mark.skipif(bool(FALCON), reason="random weights, and the notebook asserts that they learn")
def test_notebook_05_with_the_t4_profile_in_15_gb():
    """The whole notebook, in a process of its own that may take 15 GB."""
    program = f"""
import json, torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(min(1.0, {T4_BYTES} / total))
for cell in json.load(open({str(notebook("05"))!r}))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), globals())
assert profile.name == "colab-t4"
assert torch.cuda.max_memory_allocated() <= {T4_BYTES}
"""
    environment = os.environ | {"QLORA_PROFILE": "colab-t4", "MPLBACKEND": "agg"}
    command, folder = [sys.executable, "-c", program], ROOT / "notebooks"
    subprocess.run(command, cwd=folder, env=environment, check=True)


# --- what of it a CPU can run -------------------------------------------------------------------


@by_dtype
def test_on_a_cpu_the_same_comparison_finds_no_byte(dtype):
    assert measure_gpu.differing_bytes("cpu", dtype, 2**14) == 0


def test_on_a_cpu_the_same_measurement_runs(tiny):
    profile = dataclasses.replace(tiny, max_length=32, micro_batch=2)
    measured = measure_gpu.measure(profile, steps=2, device="cpu")
    assert measured["tokens_per_second"] > 0
    assert measured["batch"] == [2, 1, 32]
    assert measured["planned_bytes"] > 10**6
    assert measured["peak_bytes"] is None
