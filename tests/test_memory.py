"""The planner against real models: stored, gradient and optimizer bytes exactly, saved activations within 10%, the peak from above.

What is measured: `saved_bytes` of notebook 03 (saved_tensors_hooks) and, for the peak, every storage that torch allocates in one step.
"""

import contextlib
import dataclasses
import json

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, Trainer, TrainingArguments

from helpers import gpus, lessons, loading, memory, profiles
from helpers.errors import ModelError, PlanError
from helpers.peak import Allocations

TINY = profiles.PROFILES["tiny"]
SMALL = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 512, "alibi": False}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 4}
CONFIGS = {  # name: what differs from SMALL
    "multi-query": {},
    "one key head each": {"multi_query": False},
    "new decoder": NEW,
    "new decoder, one norm": NEW | {"num_ln_in_parallel_attn": 1},
    "not parallel": {"parallel_attn": False},
    "biases": {"bias": True, "parallel_attn": False, "multi_query": False},
    "untied": {"tie_word_embeddings": False},
    "narrow feed-forward": {"ffn_hidden_size": 200, "num_hidden_layers": 3},
    "broken blocks": {"hidden_size": 36, "num_attention_heads": 3, "vocab_size": 77},  # 36 * 36 is no multiple of 64
    "alibi": {"alibi": True},
    "many blocks": {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1},  # more than one absmax2
}
by_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
by_method = pytest.mark.parametrize("method", memory.METHODS)


def case(changes: dict, method: str, folder, **fields):
    """(config, profile, model ready to train): 4-bit and prepared, 16-bit with adapters, or plain."""
    config = FalconConfig(**SMALL | changes)
    profile = dataclasses.replace(TINY, model=str(folder), lora_r=4, micro_batch=2, max_length=48, **fields)
    torch.manual_seed(0)
    model = FalconForCausalLM(config).to(torch.bfloat16 if method == "qlora" else profile.dtype)
    if method == "qlora":
        model.save_pretrained(folder)
        on_cpu = dataclasses.replace(profile, gpu_bytes=0)
        return config, profile, loading.attach_lora(loading.load_base(on_cpu), on_cpu).train()
    if profile.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=list(profile.target_modules)))
    return config, profile, model.train()


def step_loss(model, config, profile):
    ids = torch.randint(config.vocab_size, (profile.micro_batch, profile.max_length))
    with torch.autocast("cpu", profile.dtype) if profile.gpu_bytes else contextlib.nullcontext():
        return model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss


def every_byte(model) -> int:
    """Bytes of all parameters, buffers and quantization states, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in (getattr(p, "quant_state", None) for p in model.parameters()):
        if state is not None:
            tensors += [state.absmax, state.code] + (
                [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            )
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


# --- exact ------------------------------------------------------------------------------------------------------------------


@by_config
@by_method
def test_stored_and_gradient_bytes_are_exact(changes, method, tmp_path):
    config, profile, model = case(changes, method, tmp_path, activation_checkpointing=False)
    planned = memory.plan(config, profile, method)
    assert planned.weights + planned.constants + planned.rest + planned.adapter == every_byte(model)
    step_loss(model, config, profile).backward()
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@by_config
def test_footprint_as_loaded_is_exact(changes, tmp_path):
    config = FalconConfig(**SMALL | changes)
    FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = loading.load_base(dataclasses.replace(TINY, model=str(tmp_path), compute_dtype="bfloat16"))
    assert memory.expected_footprint(config, 2) == loading.stored_bytes(model)
    without_constants = memory.expected_footprint(config, 2) - memory.constant_bytes(config) + memory.buffer_bytes(config)
    assert without_constants == model.get_memory_footprint()


@pytest.mark.parametrize("optimizer", memory.OPTIMIZERS)
@by_method
def test_optimizer_bytes_are_exact(method, optimizer, tmp_path):
    """As Trainer builds it; the hidden size makes some tensors smaller than 4096 elements, which stay in 32 bits."""
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()  # forget the 32-bit marks of earlier cases
    config, profile, model = case(
        {"hidden_size": 256, "bias": True}, method, tmp_path, optimizer=optimizer, compute_dtype="bfloat16"
    )
    arguments = TrainingArguments(str(tmp_path / "out"), optim=optimizer, use_cpu=True, report_to="none")
    adam = Trainer(model, arguments).create_optimizer()
    step_loss(model, config, profile).backward()
    adam.step()
    states = [t for state in adam.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    measured = sum({t.untyped_storage().data_ptr(): t.nbytes for t in states}.values())
    assert memory.plan(config, profile, method).optimizer == measured


def test_falcon_7b_as_the_library_counts_it():
    config = memory.known_config(profiles.FALCON_7B)
    constants = memory.constant_bytes(config)
    assert memory.expected_footprint(config, 2) - constants + memory.buffer_bytes(config) == 3_904_514_048
    assert constants == 105_148_800


@pytest.mark.parametrize("name", memory.KNOWN_CONFIGS)
def test_parameters_equal_a_model_on_the_meta_device(name):
    config = memory.known_config(name)
    with torch.device("meta"):
        model = FalconForCausalLM(config)
    assert sum(memory.count_parameters(config).values()) == model.num_parameters()
    found = {kind: tuple(getattr(part, kind).weight.shape) for part, kind in _linears(model)}
    assert found == memory.linear_shapes(config)


def _linears(model):
    block = model.transformer.h[0]
    return [
        (part, kind)
        for part in (block.self_attention, block.mlp)
        for kind in memory.linear_shapes(model.config)
        if hasattr(part, kind)
    ]


# --- activations ------------------------------------------------------------------------------------------------------------

WIDTHS = [("float32", 0), ("bfloat16", 0), ("bfloat16", 1)]  # compute dtype, and whether Trainer would use autocast
by_width = pytest.mark.parametrize(("dtype", "autocast"), WIDTHS, ids=["float32", "bfloat16", "autocast"])


@pytest.fixture(scope="module")
def saved_bytes():
    return lessons.load_definitions("03", "saved_bytes")["saved_bytes"]


def assert_saved_within_a_tenth(saved_bytes, config, profile, model, method, attention="sdpa"):
    planned = memory.plan(config, profile, method, attention)
    casts = planned.casts
    if profile.activation_checkpointing:  # the adapters' casts are made again in backward; the head's is kept
        casts = 2 * config.vocab_size * config.hidden_size if profile.gpu_bytes and method == "qlora" else 0
    predicted = memory.kept_activations(config, profile, method, attention) + casts + planned.logits // 3
    measured = saved_bytes(model, lambda: step_loss(model, config, profile))
    assert abs(predicted / measured - 1) < 0.10, (predicted, measured)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@by_width
@by_method
@pytest.mark.parametrize("changes", [CONFIGS[k] for k in ("multi-query", "new decoder", "biases")], ids=["mq", "new", "biases"])
def test_saved_activations(changes, method, dtype, autocast, checkpointing, tmp_path, saved_bytes):
    fields = {"compute_dtype": dtype, "gpu_bytes": autocast, "activation_checkpointing": checkpointing}
    assert_saved_within_a_tenth(saved_bytes, *case(changes, method, tmp_path, **fields), method)


@by_config
def test_saved_activations_of_every_architecture(changes, tmp_path, saved_bytes):
    assert_saved_within_a_tenth(saved_bytes, *case(changes, "qlora", tmp_path), "qlora")


@by_width
def test_saved_activations_of_eager_attention(dtype, autocast, tmp_path, saved_bytes):
    config, profile, model = case({}, "qlora", tmp_path, compute_dtype=dtype, gpu_bytes=autocast)
    model.get_base_model().config._attn_implementation = "eager"
    assert_saved_within_a_tenth(saved_bytes, config, profile, model, "qlora", "eager")


@pytest.mark.parametrize("targets", [("query_key_value",), ("dense_h_to_4h", "dense_4h_to_h"), ("dense",)], ids="+".join)
def test_saved_activations_with_fewer_adapters(targets, tmp_path, saved_bytes):
    """The first layer keeps less where nothing before it is trained: with sixteen layers that is within the tenth."""
    fields = {"target_modules": targets}
    assert_saved_within_a_tenth(saved_bytes, *case({"num_hidden_layers": 16}, "qlora", tmp_path, **fields), "qlora")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@by_width
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("changes", [{}, NEW], ids=["mq", "new"])
def test_the_peak_of_a_step_stays_below_the_plan_and_near_it(changes, method, dtype, autocast, checkpointing, tmp_path):
    fields = {"compute_dtype": dtype, "gpu_bytes": autocast, "activation_checkpointing": checkpointing}
    config, profile, model = case(changes | {"num_hidden_layers": 6}, method, tmp_path, **fields)
    with Allocations([*model.parameters(), *model.buffers()]) as allocations:
        step_loss(model, config, profile).backward()
    planned = memory.plan(config, profile, method)
    moving = planned.gradients + planned.activations + planned.logits + planned.casts
    assert 0.7 * moving < allocations.peak <= moving, (allocations.peak, moving)


# --- cards ------------------------------------------------------------------------------------------------------------------


def test_largest_batch_is_the_last_that_fits():
    config = memory.known_config(profiles.FALCON_7B)
    for gpu in gpus.GPUS:
        profile = memory.gpu_profile(profiles.FALCON_7B, gpu, 1, 512)
        largest = memory.largest_batch(config, profile, gpu)
        assert largest > 0
        for batch, wanted in ((largest, True), (largest + 1, False)):
            assert memory.fits(memory.plan(config, dataclasses.replace(profile, micro_batch=batch)), gpu) is wanted
    profile = memory.gpu_profile(profiles.FALCON_7B, "T4", 1, 512)
    assert memory.largest_batch(config, profile, "T4", "full") == 0


def test_more_tokens_never_take_less():
    config = memory.known_config(memory.FALCON_40B)
    totals = [memory.plan(config, memory.gpu_profile("", "L4", b, n)).total for b, n in ((1, 128), (1, 256), (2, 256), (2, 512))]
    assert totals == sorted(set(totals))


# --- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({"micro_batch": 0}, {}, ["batch of 0", "at least 1"]),
        ({"micro_batch": -2}, {}, ["batch of -2"]),
        ({"max_length": 1.5}, {}, ["length of 1.5"]),
        ({"lora_r": 0}, {}, ["rank of 0"]),
        ({"optimizer": "adam"}, {}, ["'adam'", "paged_adamw_8bit"]),
        ({"target_modules": ("q_proj",)}, {}, ["'q_proj'", "query_key_value"]),
        ({}, {"method": "dora"}, ["'dora'", "full, lora, qlora"]),
        ({}, {"attention": "flash"}, ["'flash'", "sdpa, eager"]),
    ],
)
def test_impossible_plans_are_refused_with_the_choices(fields, arguments, words):
    with pytest.raises(PlanError) as caught:
        memory.plan(memory.known_config("data/tiny-falcon"), dataclasses.replace(TINY, **fields), **arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_config_that_is_not_falcon_is_refused():
    with pytest.raises(ModelError, match="gpt2"):
        memory.plan(GPT2Config(), TINY)


def test_unknown_gpu_is_refused_with_the_choices():
    with pytest.raises(PlanError, match=r"'T5'.*T4.*H100"):
        memory.fits(memory.plan(memory.known_config("data/tiny-falcon"), TINY), "T5")


# --- the command ------------------------------------------------------------------------------------------------------------


def test_command_prints_the_plan(capsys):
    assert memory.main(["--model", "tiiuae/falcon-7b", "--gpu", "T4", "--batch", "1", "--length", "512"]) == 0
    text = capsys.readouterr().out
    planned = memory.plan(memory.known_config(profiles.FALCON_7B), memory.gpu_profile("", "T4", 1, 512))
    assert f"{planned.total / 1e9:.3f}" in text and "fits T4" in text and "6,921,720,704" in text


def test_command_reads_a_local_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon", **SMALL}))
    for model in (tmp_path, tmp_path / "config.json"):
        assert memory.main(["--model", str(model), "--gpu", "L4"]) == 0
    assert capsys.readouterr().out.count("fits L4") == 2


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model_type": "llama"}'])
def test_command_tells_what_is_wrong_with_a_model(text, tmp_path, capsys):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert memory.main(["--model", str(path)]) == 1
    assert capsys.readouterr().err.startswith("ModelError: ")


@pytest.mark.parametrize("wrong", [["--gpu", "GTX 970"], ["--optimizer", "adam"], ["--attention", "flash"]])
def test_command_tells_wrong_values(wrong, capsys):
    assert memory.main(wrong) == 1
    error = capsys.readouterr().err
    assert error.startswith("PlanError: ") and error.count("\n") == 1
