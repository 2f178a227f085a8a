"""The 4-bit base: repaired, proven, kept on disk, refused when it is not what it should be."""

import dataclasses
import gc
import json
import os
import shutil
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconForCausalLM, MixtralConfig
from transformers.models.falcon import modeling_falcon

from helpers import adapters, loading, memory, profiles, prompting, training
from helpers.errors import ModelError, NotQuantizedError
from tests.test_memory import CONFIGS

T4 = profiles.PROFILES["colab-t4"]


@pytest.fixture
def copied(tmp_path, tiny):
    """The profile of a copy of the tiny Falcon that a test may change, and its folder."""
    shutil.copytree(tiny.model_path, tmp_path / "model")
    return dataclasses.replace(tiny, model=str(tmp_path / "model")), tmp_path / "model"


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["as Falcon-RW", "Llama", "Mistral", "Qwen2"])
def test_other_families_are_quantized_tuned_saved_and_asked(name, tiny, tokenizer, tmp_path):
    """Random models: every linear layer but the head gets 4 bits and an adapter, which learns."""
    config = CONFIGS[name].__class__(**CONFIGS[name].to_diff_dict() | {"vocab_size": 1024})
    config.bos_token_id, config.eos_token_id = tokenizer.eos_token_id, 5  # learned: the tokenizer's
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    profile = dataclasses.replace(tiny, model=str(tmp_path / name), max_steps=4, warmup_steps=1)
    record = training.run(profile, output=tmp_path, scoring=False)
    layers = memory.skeleton(config).layers
    assert record["linear4bit_modules"] == len(layers)
    model = adapters.load_adapter(loading.load_base(profile), tmp_path / "adapter", profile)
    learned = [p for n, p in model.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert len(learned) == len(layers)
    assert len(prompting.generate(model, tokenizer, ["hello"], 4, 1, False)) == 1
    adapters.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), profile, torch.float32)
    ends = json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"]
    assert ends == tokenizer.eos_token_id


def test_experts_in_one_tensor_are_not_taken_for_4bit(tiny, tmp_path):
    config = MixtralConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(NotQuantizedError, match="take a dense model"):
        loading.load_base(dataclasses.replace(tiny, model=str(tmp_path)))


@pytest.mark.parametrize(("name", "value"), [("quant_type", "fp4"), ("use_double_quant", False)])
def test_another_4bit_format_is_not_taken_for_nf4(tiny, monkeypatch, name, value):
    """FP4 has as many layers and bytes, and larger errors."""
    config = loading.quantization_config(tiny)
    setattr(config, f"bnb_4bit_{name}", value)
    monkeypatch.setattr(loading, "quantization_config", lambda profile: config)
    with pytest.raises(NotQuantizedError, match="bytes of (fp4|nf4) where NF4 with double"):
        loading.load_base(tiny)


def test_the_fingerprint_sees_every_packed_byte_and_every_scale(base):
    before, layer = loading.base_fingerprint(base), base.transformer.h[-1].mlp.dense_4h_to_h
    for stored in (layer.weight.data.view(-1), layer.weight.quant_state.absmax.view(-1)):
        stored[-1] ^= 1
        assert loading.base_fingerprint(base) != before
        stored[-1] ^= 1
    assert loading.base_fingerprint(base) == before


def test_falcon_7b_shapes_take_the_same_path(tmp_path):
    """Random weights of Falcon-7b's shapes, one layer and a small vocabulary, and one step."""
    config = memory.known_config(profiles.FALCON_7B)
    config.num_hidden_layers, config.vocab_size = 1, 512
    FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    changes = {"model": str(tmp_path), "revision": None, "compute_dtype": "bfloat16"}
    profile = dataclasses.replace(T4, gpu_bytes=0, **changes)
    model = loading.load_base(profile)
    assert loading.prove_4bit(model).linear4bit_modules == 4
    assert modeling_falcon.FalconLinear is not torch.nn.Linear  # as it was
    assert model.lm_head.weight.dtype == torch.bfloat16
    model = loading.attach_lora(model, profile).train()
    wanted = memory.adapter_parameters(config, profile.lora_r, profile.target_modules)
    assert model.num_parameters(only_trainable=True) == wanted
    ids = torch.randint(512, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def same_bits(a, b) -> bool:
    """Whether every tensor is equal, quantization constants included."""
    a, b = a.state_dict(), b.state_dict()
    raw = {n: (a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8)) for n in a}
    return a.keys() == b.keys() and all(torch.equal(x, y) for x, y in raw.values())


def test_the_kept_copy_quantizes_nothing_and_has_the_same_bits(tmp_path, copied, monkeypatch):
    spy = Mock(wraps=loading.quantize_4bit)
    monkeypatch.setattr(loading, "quantize_4bit", spy)
    profile, folder = copied
    first, second = (loading.load_base(profile, cache=tmp_path / "cache") for _ in range(2))
    assert spy.call_count == 16
    plain = loading.load_base(profile)
    assert same_bits(first, plain) and same_bits(second, plain)
    assert second.name_or_path == plain.name_or_path
    kept = dataclasses.replace(profile, model=str(next((tmp_path / "cache").glob("*[!k]"))))
    assert same_bits(loading.load_base(kept, cache=tmp_path / "cache"), plain)  # 4-bit: no copy
    change_tensors(folder, lambda tensors: tensors["transformer.ln_f.bias"].add_(1))
    changed = loading.load_base(profile, cache=tmp_path / "cache")  # has a copy of its own
    assert same_bits(changed, loading.load_base(profile)) and not same_bits(changed, plain)


def test_a_block_that_is_dequantized_frees_its_4_bits_at_once(base):
    block = base.transformer.h[0]
    weights = weakref.WeakSet(module.weight for module in loading.four_bit_layers(block).values())
    gc.disable()
    base.hf_quantizer._dequantize(block, dtype=torch.float32)
    gc.enable()
    assert len(weights) == 0 and len(loading.four_bit_layers(base)) == 12


def drop(name):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def change(name, function):
    return lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})
    )


DOWN = "transformer.h.1.mlp.dense_4h_to_h.weight"


def pickle_weights(folder):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {folder}/exploded",)

    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lfs_pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop("transformer.word_embeddings.weight"), "lack .*word_embeddings.* would be random"),
        (drop("transformer.ln_f.weight"), "lack .*ln_f.weight.* would be random"),
        (lambda folder: os.truncate(folder / "model.safetensors", 10**5), "damaged or not fetched"),
        (lfs_pointer, "model.safetensors is a Git LFS pointer.*git lfs pull"),
        (change("transformer.ln_f.weight", lambda t: t * torch.nan), "ln_f.weight .* not finite"),
        (change(DOWN, lambda t: t / 0), "4h_to_h.* not finite"),
        (change(DOWN, lambda t: t.where(t > t.min(), torch.nan)), "4h_to_h.* not finite"),
        (change(DOWN, lambda t: t.T), "another shape"),
        (change("transformer.word_embeddings.weight", lambda t: t.T), "another shape|mismatch"),
        (change("transformer.ln_f.weight", lambda t: t[:-1]), "another shape|ln_f|mismatch"),
        (pickle_weights, "only safetensors are loaded, since pickled weights can run code"),
        (lambda folder: (folder / "config.json").unlink(), "the config of .* cannot be used"),
    ],
    ids="embedding norm half lfs nan inf nan-in-4-bits transposed turned cut pickled none".split(),
)
def test_bad_weights_are_refused_and_no_pickled_code_is_run(copied, spoil, words, monkeypatch):
    def kernel(weight, quantize=loading.quantize_4bit, **options):  # as a GPU's, which hides a NaN
        return quantize(weight.nan_to_num(-1.0, torch.inf, -torch.inf), **options)

    profile, folder = copied
    spoil(folder)
    monkeypatch.setattr(loading, "quantize_4bit", kernel)
    with pytest.raises(ModelError, match=words):
        loading.load_base(profile)
    assert not (folder / "exploded").exists()


def test_a_tokenizer_of_a_larger_model_is_refused(copied):
    profile, folder = copied
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="more tokens than the 512 of the model"):
        loading.load_tokenizer(profile)


def test_a_hub_model_without_room_or_safetensors_is_told_before_the_download(monkeypatch):
    def hub(name, size, to_fetch, free):
        """A hub with one file, and a disk with some room; returns what is fetched from it."""
        fetched, file = [], SimpleNamespace(filename=name, file_size=size, will_download=to_fetch)
        fake = lambda *a, dry_run=False, **k: [file] if dry_run else fetched.append(k)  # noqa: E731
        monkeypatch.setattr(loading, "snapshot_download", fake)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return fetched

    fetched = hub("a.safetensors", 14 * 10**9, True, free=9 * 10**9)
    with pytest.raises(ModelError, match=r"they take 14.0 GB, 9.0 GB are free\): .*HF_HOME"):
        loading.fetch(T4)
    assert not fetched
    fetched = hub("a.safetensors", 14 * 10**9, False, free=10)
    loading.fetch(T4)
    assert fetched[0]["revision"] == T4.revision and "*.bin" not in fetched[0]["allow_patterns"]
    hub("config.json", 100, True, free=10**12)
    with pytest.raises(ModelError, match="no files .safetensors.*only safetensors are loaded"):
        loading.fetch(T4)


def test_offline_with_nothing_cached_names_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="'tiiuae/falcon-7b' cannot be used"):
        loading.load_base(dataclasses.replace(T4, gpu_bytes=0))


def test_a_gated_model_asks_for_its_terms_and_a_token():
    words, gated = "accept the model's terms .* HF_TOKEN", type("GatedRepoError", (Exception,), {})
    with pytest.raises(ModelError, match=words), loading.fetching("the config", T4):
        raise OSError("gated") from gated("401")


def test_profiles_pin_commits_and_configs_name_no_code():
    for profile in profiles.PROFILES.values():
        pinned = profile.revision and len(profile.revision) == 40
        assert (profiles.ROOT / profile.model).is_dir() or pinned, profile.name
    for path in (profiles.ROOT / "data").rglob("*.json"):
        assert "auto_map" not in json.dumps(path.read_text(encoding="utf-8")), path.name
