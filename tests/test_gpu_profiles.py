"""The GPU profiles without a GPU: what each card gets, and that a T4 never meets bfloat16."""

from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import loading, memory, profiles, prompting, training
from helpers.errors import TutorialError
from tests.notebooks import code_cells, notebook, source, tags

# What torch.cuda.get_device_properties tells
Card = namedtuple("Card", "name total_memory major minor", defaults=[0])
RECIPE_NUMBERS = [source(c) for c in code_cells(notebook("05")) if "recipe" in tags(c)][1]
# Card, its profile, compute dtype, micro-batch
CARDS = [
    (Card("Tesla T4", memory.capacity("T4"), 7, 5), "colab-t4", "float16", 4),
    (Card("NVIDIA L4", memory.capacity("L4"), 8, 9), "colab-l4", "bfloat16", 8),
    (Card("A100-SXM4-40GB", memory.capacity("A100-40GB"), 8), "colab-a100", "bfloat16", 16),
    (Card("H100 80GB HBM3", memory.capacity("H100-80GB"), 9), "colab-a100", "bfloat16", 16),
    (Card("Tesla V100", memory.capacity("V100-32GB"), 7), "colab-l4", "float16", 8),
    (Card("RTX A4000", memory.capacity("RTX A4000"), 8, 6), "colab-t4", "bfloat16", 4),
    (Card("RTX 3060", memory.capacity("RTX 3060"), 8, 6), "colab-t4", "bfloat16", 4),
    (Card("RTX 4060", memory.capacity("RTX 4060"), 8, 9), "colab-t4", "bfloat16", 2),
    (Card("no card", 0, 0), "tiny", "float32", 16),
    (Card("RTX 2060", 6 * 10**9, 7, 5), "tiny", "float32", 16),  # no 7B on it
]


@pytest.mark.parametrize(("card", "name", "dtype", "batch"), CARDS, ids=[r[0].name for r in CARDS])
def test_each_card_gets_its_profile_and_it_fits(monkeypatch, tmp_path, card, name, dtype, batch):
    monkeypatch.delenv("QLORA_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card.major > 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    profile = profiles.resolve()
    assert (profile.name, profile.compute_dtype) == (name, dtype)
    accumulation = 16 // batch  # so that every profile takes the same steps
    assert profile.activation_checkpointing == (profile.device == "cuda")
    assert loading.quantization_config(profile).bnb_4bit_compute_dtype == getattr(torch, dtype)
    assert f"{accumulation} x {batch} examples of at most {profile.max_length}" in profile.step
    assert ("; a card of" in profile.step) == (batch < 16)

    fake = lambda **given: SimpleNamespace(n_gpu=1, given=given)  # noqa: E731 - real ones need a card
    monkeypatch.setattr(training, "TrainingArguments", fake)
    given = training.training_arguments(profile, tmp_path, seed=0).given
    assert given["fp16"] == (dtype == "float16")  # brings autocast and torch's GradScaler
    assert given["bf16"] == (dtype == "bfloat16")
    assert given["optim"] == profile.optimizer == "paged_adamw_8bit"
    assert given["per_device_train_batch_size"] == batch
    assert given["gradient_accumulation_steps"] == accumulation

    if name != "tiny":
        plan = memory.plan(memory.known_config(profile.model), profile)
        assert plan.total <= 0.92 * card.total_memory
        assert profile.gpu_bytes <= 1.07 * card.total_memory or name == "colab-t4"  # the smallest
    if card.name != "RTX 2060":  # the recipe of notebook 05 chooses the same
        found = {"STEPS": 0, "LEARNING_RATE": 0.0}
        exec(RECIPE_NUMBERS, found)  # noqa: S102 - our own
        assert found["run"] == {field: getattr(profile, field) for field in found["run"]}
        assert (found["dtype"], found["gpu"]) == (profile.dtype, profile.device == "cuda")


def test_a_named_profile_shrinks_to_the_card_or_is_refused(monkeypatch):
    with pytest.raises(TutorialError, match="none was found: use profile 'tiny'"):
        profiles.resolve("colab-t4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: CARDS[0][0])
    profile = profiles.resolve("colab-a100")
    assert (profile.micro_batch, profile.accumulation, profile.max_length) == (8, 2, 512)
    assert (profile.eval_batch, profile.compute_dtype) == (9, "float16")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: CARDS[-1][0])
    small = profiles.resolve("colab-t4", "Qwen/Qwen2.5-0.5B")  # planned where its config is read
    assert (small.model, small.eval_batch, small.micro_batch) == ("Qwen/Qwen2.5-0.5B", 10, 4)
    words = "needs 6.8 GB and RTX 2060 has 6.0: use profile 'tiny'"
    with pytest.raises(TutorialError, match=words):
        profiles.resolve("colab-t4")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "compute_120"])
    with pytest.raises(TutorialError, match="no code for RTX 2060, an older card"):
        profiles.resolve("colab-t4")
    monkeypatch.setenv("QLORA_PROFILE", "tiny")
    assert profiles.resolve("auto") == profiles.PROFILES["tiny"]


class Dtypes(TorchDispatchMode):
    """Notes the dtype of every tensor that any operation reads or makes while active."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        leaves = tree_leaves((arguments, options, result))
        self.seen |= {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


def stored_dtypes(model) -> set[torch.dtype]:
    """The dtypes of all parameters, buffers and quantization constants."""
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    for layer in loading.four_bit_layers(model).values():
        state = layer.weight.quant_state
        constants = (state.absmax, state.state2.absmax, state.offset)
        found |= {layer.compute_dtype, state.dtype, *(tensor.dtype for tensor in constants)}
    return found


@pytest.fixture(scope="module")
def on_a_t4(tiny):
    """The tiny Falcon under everything that the T4 profile says of dtypes and adapters."""
    changes = {"model": tiny.model, "revision": None, "gpu_bytes": 0, "max_length": tiny.max_length}
    return replace(profiles.PROFILES["colab-t4"], name="t4-on-cpu", **changes)


def test_a_t4_stores_computes_trains_and_generates_without_bfloat16(on_a_t4, tokenizer):
    # the file holds bfloat16, as Falcon-7b's does: it is cast, and no more seen
    model = loading.load_base(on_a_t4, device="cpu")
    allowed = {torch.float16, torch.float32, torch.uint8}  # 4-bit weights dequantize to float16
    assert stored_dtypes(model) == allowed
    assert model.config._attn_implementation == "sdpa"  # T4s lack flash attention 2
    with Dtypes() as generating:
        prompting.generate(model, tokenizer, ["Where is my order?", "hello"], 4, 2, progress=False)
    assert torch.float16 in generating.seen
    with Dtypes() as preparing:
        model = loading.attach_lora(model, on_a_t4).train()
    assert stored_dtypes(model) == allowed
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    norms = [p for n, p in model.named_parameters() if "layernorm" in n or "ln_" in n]
    assert {p.dtype for p in norms} == {torch.float32}
    ids, scaler = torch.randint(5, 500, (2, 16)), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    with Dtypes() as stepping:
        with torch.autocast("cpu", dtype=on_a_t4.dtype):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.isfinite(loss)
    with Dtypes() as answering:
        prompting.generate(model, tokenizer, ["Where is my order?"], 4, 1, progress=False)
    for phase in (preparing, generating, stepping, answering):
        assert phase.seen and torch.bfloat16 not in phase.seen
