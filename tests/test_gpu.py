"""`pytest -m gpu` on an NVIDIA GPU measures, asserts, writes data/measured/gpu.json as it goes.
Elsewhere these are skipped, and the same functions run with the tiny Falcon. The 7B runs load
tiiuae/falcon-7b (14 GB) from the hub, or Falcon-7b's shapes from the folder in QLORA_FALCON_7B."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from data.measured import measure
from helpers import loading, memory, profiles, training
from helpers.errors import ModelError
from tests import random_falcon
from tests.notebooks import ROOT, notebook

CUDA = torch.cuda.is_available()
FALCON = os.environ.get("QLORA_FALCON_7B")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CARDS = {"colab-t4": "T4", "colab-l4": "L4", "colab-a100": "A100-40GB"}  # as large as the profile
# Width, MLP, heads, key heads, a head's width and vocabulary, from their config.json on the hub
SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim", "vocab_size")
FAMILIES = {
    "llama-3.1-8b": (4096, 14336, 32, 8, 128, 128256),
    "mistral-7b-v0.3": (4096, 14336, 32, 8, 128, 32768),
    "qwen2-7b": (3584, 18944, 28, 4, 128, 152064),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936),
    "tiiuae/falcon-rw-7b": None,
    "tiiuae/falcon-11B": None,
}


def on_gpu(function):
    skip = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU and torch finds none here")
    return pytest.mark.gpu(skip(function))


def at_full_size(profile):
    """The profile, on Falcon-7b's shapes from a folder if one is given; only on a card as large."""
    if profile.gpu_bytes > 1.07 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"is for a card of {profile.gpu_bytes / 1e9:.0f} GB")
    return dataclasses.replace(profile, model=FALCON, revision=None) if FALCON else profile


def assert_as_planned(measured, model=profiles.FALCON_7B, most=1.15):
    """Loaded bytes within 1% of what was counted; a step never over its plan, nor far under."""
    loaded, runs = measured["loaded"], [run for run in measured.values() if "method" in run]
    assert loaded["loaded"] == pytest.approx(loaded["planned"], rel=0.01)
    assert measured.get("largest") != "out of memory"
    for run in runs:
        assert 1 <= measure.ratio(run, model) <= most


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cards_nf4_bytes_are_those_by_hand(dtype):
    differ = measure.differing_bytes("cuda", dtype)
    measure.note(f"nf4 bytes that differ, of {2**20:,}, {dtype}", differ)
    assert differ == 0


@on_gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_tiny_falcon_learns_on_the_card(dtype, tiny, tmp_path):
    """In 16 bits under autocast, in float16 with loss scaling, as on a T4; scored as always."""
    profile = dataclasses.replace(tiny, name=dtype, gpu_bytes=10**9, compute_dtype=dtype)
    record = training.run(profile, output=tmp_path)
    names = ("before", "after", "after_reworded", "train_seconds", "final_loss")
    measure.note(f"tiny falcon, 300 steps, {dtype}", {name: record[name] for name in names})
    assert record["after"]["exact_match"] > 0.9


@on_gpu
def test_a_nan_in_a_weight_is_found_though_the_kernel_hides_it(tiny, tmp_path):
    model = loading.AutoModelForCausalLM.from_pretrained(tiny.model_path)
    model.transformer.h[1].mlp.dense_4h_to_h.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="dense_4h_to_h.* not finite"):
        loading.load_base(dataclasses.replace(tiny, model=str(tmp_path)), "cuda")


@on_gpu
def test_16_bit_lora_beside_qlora():
    profile = at_full_size(profiles.PROFILES["colab-a100"])
    assert_as_planned(measure.lora_runs("16-bit LoRA, colab-a100", profile, "cuda"))
    assert len(measure.answers_in_turns(profile, "cuda")) == 3


@on_gpu
@pytest.mark.parametrize(("name", "card"), CARDS.items())
def test_a_profile_takes_no_more_than_planned(name, card):
    profile = at_full_size(profiles.PROFILES[name])
    largest = memory.largest_batch(memory.known_config(profiles.FALCON_7B), profile, card)
    assert_as_planned(measure.profile_runs(name, profile, "cuda", 2048, largest))


@on_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_take_no_more_than_planned(name, tmp_path):
    at_full_size(profiles.PROFILES["colab-l4"])
    folder = tmp_path / name
    random_falcon.write(folder, config_of(name))
    assert_as_planned(measure_family(name, str(folder), "cuda"), str(folder), 1.25)
    shutil.rmtree(folder)  # pytest would keep 4 GB


def config_of(name, **changes):
    fields = {"model_type": name.split("-")[0]}
    shape = FAMILIES[name] and dict(zip(SHAPE, FAMILIES[name], strict=True))
    fields |= shape or memory.known_config(name).to_dict()
    return AutoConfig.for_model(**fields | {"num_hidden_layers": 4} | changes)


def measure_family(name, folder, device, long=2048, **changes):
    config = memory.known_config(folder)
    changes |= {"model": folder, "revision": None}
    changes |= {"target_modules": tuple(memory.linear_shapes(config))}
    profile = dataclasses.replace(profiles.PROFILES["colab-l4"], **changes)
    largest = memory.largest_batch(config, profile, "L4")
    return measure.profile_runs(f"4 layers of {name}", profile, device, long, largest)


NOTEBOOK = """
import json, time, torch
total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
if total:
    torch.cuda.set_per_process_memory_fraction(min(1.0, {room} / total))
began, cells = time.monotonic(), json.load(open({path!r}))["cells"]
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        source = "".join(cell["source"])
        if {changes!r} and "# @param" in source:
            source += {changes!r}
        exec(source, globals())
        print(f"cell {{number}}: {{time.monotonic() - began:.0f}} s", flush=True)
peak = torch.cuda.max_memory_allocated() if total else 0
print(json.dumps([profile.name, round(time.monotonic() - began), peak]))
"""


def run_notebook_05(profile: str, room: int, changes: str) -> list:
    """[profile, seconds, peak bytes] of the whole notebook in `room` bytes, its form changed."""
    program = NOTEBOOK.format(room=room, path=str(notebook("05")), changes=changes)
    environment = os.environ | {"QLORA_PROFILE": profile, "MPLBACKEND": "agg"}
    command, folder = [sys.executable, "-c", program], ROOT / "notebooks"
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        lines = [line for line in process.stdout if not print(line, end="", flush=True)]
    assert process.returncode == 0
    return json.loads(lines[-1])


@on_gpu
def test_notebook_05_with_the_t4_profile_in_15_gb():
    """Every cell; of random weights only few steps, they have nothing to learn from."""
    room = at_full_size(profiles.PROFILES["colab-t4"]).gpu_bytes - memory.CUDA_CONTEXT
    changes = f"\nMODEL, REVISION, STEPS = {FALCON!r}, '', 8" if FALCON else ""
    name, seconds, peak = run_notebook_05("colab-t4", room, changes)
    found = {"seconds": seconds, "max_memory_allocated": peak, "steps": 8 if FALCON else 32}
    measure.note("notebook 05, colab-t4 in 15 GB", found)
    assert name == "colab-t4" and peak <= room


def test_what_was_measured_is_at_most_what_is_planned():
    cards = json.loads(measure.MEASURED.read_text())
    ours = [values for card in cards.values() for name, values in card.items() if "colab-" in name]
    runs = [r for v in ours for r in v.values() if isinstance(r, dict) and "method" in r]
    assert len(runs) == 52 and all(1 <= measure.ratio(run) <= 1.11 for run in runs)
    clean = cards["NVIDIA H100 80GB HBM3, third machine"]
    assert all(clean[name]["largest"] != "out of memory" for name in CARDS)
    assert [name for name in CARDS if clean[name]["too large"] != "out of memory"] == ["colab-t4"]


def test_what_was_measured_of_other_families_is_at_most_what_is_planned(tmp_path):
    """As their README says: loaded as counted, a step 1 to 21% under its plan, all batches ran."""
    h200, ratios = json.loads(measure.MEASURED.read_text())["NVIDIA H200"], []
    for name in FAMILIES:
        config_of(name).save_pretrained(tmp_path / name)
        loaded, *runs = (r for r in h200[f"4 layers of {name}"].values() if "prompts" not in r)
        assert loaded["loaded"] == pytest.approx(loaded["planned"], rel=0.003) and len(runs) == 5
        ratios += [measure.ratio(run, str(tmp_path / name)) for run in runs]
    assert min(ratios) >= 1.01 and max(ratios) < 1.215


def test_on_a_cpu_the_same_measurements_run(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "MEASURED", tmp_path / "gpu.json")
    profile = dataclasses.replace(tiny, max_length=48, micro_batch=2)
    found = measure.profile_runs("4-bit", profile, "cpu", 64, 4)
    found = [*found.values(), *measure.lora_runs("16-bit", profile, "cpu").values()]
    runs = [run for run in found if "method" in run]
    batches = [(2, 48), (2, 48), (1, 64), (4, 48), (5, 48), (2, 48)]
    assert [(size, length) for size, _, length in (run["batch"] for run in runs)] == batches
    assert all(run["tokens_per_second"] > 0 for run in runs)
    written = json.loads(measure.MEASURED.read_text())["cpu"]
    assert written["16-bit"]["full"] == found[-1]
    for found in measure.answers_in_turns(profile, "cpu", turns=2).values():
        low, middle, high = found["times_as_long"]
        assert 0 < low <= middle <= high and found["four_bit"] > 0
    monkeypatch.setattr(memory, "largest_batch", lambda *_: 2)
    small = dict(zip(SHAPE, (64, 96, 4, 2, 16, 1024), strict=True)) | {"num_hidden_layers": 1}
    random_falcon.write(tmp_path / "small", config_of("qwen3-8b", **small))
    fields = {"gpu_bytes": 0, "compute_dtype": "float32", "micro_batch": 2, "max_length": 48}
    found = measure_family("qwen3-8b", str(tmp_path / "small"), "cpu", 64, **fields)
    assert found.pop("answers")["tokens"] == 32 and found.pop("loaded")
    assert all(run["tokens_per_second"] > 0 for run in found.values())
