"""--cache-4bit: the same bits from disk, and nothing from a copy that is damaged or of another identity."""

import contextlib
import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
from bitsandbytes import functional

from helpers import files, loading, profiles, prompting, quantized_cache, training, weights
from helpers.errors import ModelError, NotQuantizedError, OutputError


@pytest.fixture
def copied(tmp_path, tiny):
    """The profile of a copy of the tiny Falcon that a test may change."""
    shutil.copytree(tiny.model_path, tmp_path / "model")
    return dataclasses.replace(tiny, model=str(tmp_path / "model"))


@pytest.fixture
def quantizations(monkeypatch):
    """How many weights have been quantized."""
    calls, original = [], functional.quantize_4bit
    monkeypatch.setattr(functional, "quantize_4bit", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    return calls


def bits(model) -> dict[str, torch.Tensor]:
    """Every tensor of the model, quantization constants included."""
    return {name: tensor.detach().reshape(-1).contiguous().view(torch.uint8) for name, tensor in model.state_dict().items()}


def same_bits(a, b) -> bool:
    a, b = bits(a), bits(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def the_copy(cache):
    (folder,) = cache.iterdir()
    return folder


def test_second_load_quantizes_nothing_and_has_the_same_bits(tmp_path, copied, quantizations, capsys):
    first = quantized_cache.load_base(copied, tmp_path / "cache")
    assert len(quantizations) == 16
    assert "none yet; quantizing and saving it" in capsys.readouterr().out
    second = quantized_cache.load_base(copied, tmp_path / "cache")
    assert len(quantizations) == 16
    assert capsys.readouterr().out == ""
    plain = loading.load_base(copied)
    assert same_bits(first, plain) and same_bits(second, plain)
    assert second.config.to_dict() == plain.config.to_dict() == first.config.to_dict()
    assert second.name_or_path == plain.name_or_path
    assert all(not layer.support_avx512bf16_for_cpu for layer in loading.four_bit_layers(second).values())


def test_it_trains_and_answers_like_the_quantized_one(tmp_path, copied, tokenizer):
    models = [loading.load_base(copied), *(quantized_cache.load_base(copied, tmp_path / "cache") for _ in range(2))]
    ids = torch.tensor([tokenizer("User: my kettle leaks")["input_ids"]])
    losses = []
    for model in models:
        tuned = loading.attach_lora(model, copied).train()
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.abs().sum().item() for n, p in tuned.named_parameters() if "lora_B" in n]
        assert all(gradient > 0 for gradient in gradients)
        losses.append((loss.item(), gradients))
    assert losses[0] == losses[1] == losses[2]
    assert isinstance(prompting.generate(models[2], tokenizer, ["a"], 2, 1)[0], str)


def test_the_name_tells_model_revision_quantization_dtype_and_device(tiny, monkeypatch):
    assert quantized_cache.cache_folder(tiny, "c").name == "data--tiny-falcon@local-nf4-double-float32-cpu"
    t4 = profiles.PROFILES["colab-t4"]
    monkeypatch.setattr(loading, "load_config", lambda profile: object())
    assert quantized_cache.cache_folder(t4, "c").name == "tiiuae--falcon-7b@ec89142b67d7-nf4-double-float16-cuda"
    assert quantized_cache.cache_folder(t4, "c", "cuda:0") == quantized_cache.cache_folder(t4, "c")


def edited(folder, *path, value):
    manifest = json.loads((folder / quantized_cache.MANIFEST).read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != value
    place[path[-1]] = value
    (folder / quantized_cache.MANIFEST).write_text(json.dumps(manifest))


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "another bitsandbytes": (lambda f: edited(f, "identity", "versions", "bitsandbytes", value="0.1"), "its versions is .*0.1"),
    "another transformers": (lambda f: edited(f, "identity", "versions", "transformers", value="4.0"), "its versions is .*4.0"),
    "another quantization": (
        lambda f: edited(f, "identity", "quantization", "bnb_4bit_quant_type", value="fp4"),
        "quantization is",
    ),
    "another model": (lambda f: edited(f, "identity", "model", value="other"), "its model is other"),
    "truncated weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged"),
    "one flipped bit": (lambda f: flip(f / "model.safetensors"), "model.safetensors is damaged"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "missing or damaged"),
    "changed config": (lambda f: flip(f / "config.json"), "config.json is damaged"),
    "no manifest": (lambda f: (f / quantized_cache.MANIFEST).unlink(), "manifest.json is missing or damaged"),
    "half a manifest": (lambda f: cut(f / quantized_cache.MANIFEST) or cut(f / quantized_cache.MANIFEST), "missing or damaged"),
    "a list for a manifest": (lambda f: (f / quantized_cache.MANIFEST).write_text("[]"), "missing or damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_copy_that_is_not_sound_or_not_ours_is_replaced(tmp_path, copied, quantizations, capsys, damage, message):
    quantized_cache.load_base(copied, tmp_path / "cache")
    damage(the_copy(tmp_path / "cache"))
    capsys.readouterr()
    model = quantized_cache.load_base(copied, tmp_path / "cache")
    assert len(quantizations) == 32
    assert re.search(message + ".*; quantizing and saving it", capsys.readouterr().out)
    assert same_bits(model, loading.load_base(copied))
    quantizations.clear()
    quantized_cache.load_base(copied, tmp_path / "cache")
    assert not quantizations
    assert the_copy(tmp_path / "cache")  # and nothing else is left


def test_changed_weights_under_the_same_name_are_noticed(tmp_path, copied, quantizations, capsys):
    quantized_cache.load_base(copied, tmp_path / "cache")
    flip(tmp_path / "model" / "model.safetensors", -5000)
    model = quantized_cache.load_base(copied, tmp_path / "cache")
    assert "the weights have changed since" in capsys.readouterr().out
    assert same_bits(model, loading.load_base(copied))


def test_another_dtype_or_quantization_has_a_copy_of_its_own(tmp_path, copied, quantizations):
    quantized_cache.load_base(copied, tmp_path / "cache")
    quantized_cache.load_base(dataclasses.replace(copied, compute_dtype="bfloat16"), tmp_path / "cache")
    assert len(quantizations) == 32
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.skipif(loading.quantizes_falcon(), reason="this version of transformers needs no repair")
def test_the_copy_is_proven_too(tmp_path, copied, monkeypatch):
    quantized_cache.load_base(copied, tmp_path / "cache")
    monkeypatch.setattr(loading, "falcon_made_of_plain_linear", contextlib.nullcontext)
    with pytest.raises(NotQuantizedError):
        quantized_cache.load_base(copied, tmp_path / "cache")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, copied, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OutputError, match="cannot be written to .*No space left on device.*go without --cache-4bit"):
        quantized_cache.load_base(copied, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_disk_too_small_is_told_before_quantizing(tmp_path, copied, monkeypatch, quantizations):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="GB free and the 4-bit copy of the model takes"):
        quantized_cache.load_base(copied, tmp_path / "cache")
    assert not quantizations


def test_a_cache_that_is_a_file(tmp_path, copied):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        quantized_cache.load_base(copied, tmp_path / "cache")


def test_command_line_hands_the_folder_on(monkeypatch):
    seen = []
    monkeypatch.setattr(training, "run", lambda *args: seen.append(args))
    assert training.main(["--cache-4bit", "somewhere"]) == 0
    assert seen[0][-1] == "somewhere"


# --- pickled weights --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(tmp_path, copied):
    weights.pickle_shard(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "pytorch_model.bin")
    return copied


def test_pickled_weights_are_refused_with_the_way_out_that_works(pickled, capsys):
    with pytest.raises(
        weights.PickledWeightsError, match=r"are pickled \(pytorch_model.bin\).*python -m helpers.weights .*model`"
    ):
        loading.load_base(pickled)
    weights.convert_pickled(weights.Path(pickled.model))
    assert same_bits(loading.load_base(pickled), loading.load_base(profiles.PROFILES["tiny"]))


def test_pickled_code_is_not_run(tmp_path, pickled):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save({"weight": Bomb()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no sound file of tensors"):
        weights.convert_pickled(tmp_path / "model")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02K\x01."])
def test_a_pickled_file_that_is_none(tmp_path, pickled, content):
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="no sound file of tensors: fetch it again"):
        weights.convert_pickled(tmp_path / "model")


def test_nothing_to_convert(tmp_path):
    with pytest.raises(ModelError, match=r"no pytorch_model\*.bin in"):
        weights.convert_pickled(tmp_path)


def test_a_conversion_without_room(pickled, monkeypatch):
    usage = shutil.disk_usage(pickled.model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="their copy in safetensors takes up to"):
        weights.convert_pickled(weights.Path(pickled.model))
