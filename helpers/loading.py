"""Tokenizer, 4-bit base model, LoRA, adapters. Imports hub, proof, fast_nf4, weights, memory, profiles, errors.

Falcon is the reason for most of this module: `from_pretrained(falcon, quantization_config=4-bit)` quantizes nothing on transformers
5.5 and later and says nothing either, see `quantizes_falcon`.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, FalconConfig, FalconForCausalLM
from transformers.integrations import bitsandbytes as bnb_integration
from transformers.models.falcon import modeling_falcon

from helpers import files, hub, memory, weights
from helpers.errors import AdapterError, ModelError, ResourceError
from helpers.fast_nf4 import fast_cpu_quantization
from helpers.hub import first_line
from helpers.profiles import Profile, check_settings
from helpers.proof import (  # noqa: F401 - notebooks and helpers know these names as loading's
    FourBitProof,
    base_fingerprint,
    four_bit_layers,
    prove_4bit,
    stored_bytes,
)

BASE_SHA256 = "base.sha256"  # the file beside an adapter that names the bits of its base
RECORDS = ("results.json", "answers.json", "sharding.json")  # the files beside an adapter's folder that tell of that adapter


@hub.with_token
def load_tokenizer(profile: Profile):
    """The tokenizer of the profile's model. Falcon has an end token and no padding token; `helpers.prompting` pads by itself."""
    try:
        return AutoTokenizer.from_pretrained(profile.model_path, revision=profile.revision, trust_remote_code=False)
    except Exception as error:  # the network's errors share no base class with the others
        raise ModelError(f"no tokenizer found for {profile.model!r}: {hub.way_out(error)} ({first_line(error)})") from error


def quantization_config(profile: Profile) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in the profile's dtype (the library's default would be float32)."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=profile.dtype
    )


def quantizes_falcon() -> bool:
    """Whether the installed transformers swaps Falcon's linear layers for 4-bit ones by itself: tried on one layer, not looked up.

    transformers 5.5 and later swap only modules whose class is exactly `nn.Linear`; Falcon's are `FalconLinear`, a subclass.
    """
    with torch.device("meta"):
        probe = torch.nn.ModuleDict({"query_key_value": modeling_falcon.FalconLinear(64, 64, bias=False)})
    warnings = logging.getLogger(bnb_integration.__name__)
    level = warnings.level
    warnings.setLevel(logging.ERROR)  # the probe may find nothing to swap; that is the answer, not a warning
    try:
        bnb_integration.replace_with_bnb_linear(probe, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    finally:
        warnings.setLevel(level)
    return isinstance(probe["query_key_value"], Linear4bit)


@contextlib.contextmanager
def falcon_made_of_plain_linear() -> Iterator[None]:
    """While active, Falcon models are built with `nn.Linear`, which every version swaps. Nothing is touched where no repair is needed.

    `FalconLinear` adds only its own spelling of x @ W.T, so the model computes the same.
    """
    if quantizes_falcon():
        yield
        return
    original = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = torch.nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = original


def load_base(profile: Profile, device: str | None = None) -> FalconForCausalLM:
    """The profile's base model in 4-bit (NF4, double quantization), proven to be so, on `device` (default: the profile's).

    Raises ProfileError for settings that cannot be, ModelError for a missing, damaged or non-Falcon model, PickledWeightsError (before weights are fetched) if it comes in no
    safetensors, NotQuantizedError if the result is not what the config predicts, ResourceError if a download or the model does not fit. On a CPU,
    `helpers.fast_nf4` finds the bits.
    """
    check_settings(profile)
    hub.fetch(profile, load_config(profile))
    with fast_cpu_quantization():
        return read_4bit(profile, profile.model_path, device, revision=profile.revision, quantization_config=quantization_config(profile))  # fmt: skip


def read_4bit(profile: Profile, path: str, device: str | None = None, **options) -> FalconForCausalLM:
    """`from_pretrained(path, **options)` with Falcon repaired and the proof after it; errors as `load_base`."""
    small = sum(memory.count_parameters(load_config(profile)).values()) < 10**8  # loads in a tenth of a second
    try:
        with falcon_made_of_plain_linear(), progress_bars(not small):
            model = FalconForCausalLM.from_pretrained(
                path, trust_remote_code=False, use_safetensors=True, dtype=profile.dtype,
                device_map={"": device or profile.device}, attn_implementation="sdpa", **options,
            )  # fmt: skip
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise ResourceError(
                f"the memory ran out while {profile.model!r} was loaded: close other programs or kernels, or use profile 'tiny' ({first_line(error)})"
            ) from error
        weights.refuse_pickled(profile.model_path, profile.revision)
        raise ModelError(
            f"the weights of {profile.model!r} cannot be read: delete the local copy and fetch them again ({first_line(error)})"
        ) from error
    for module in four_bit_layers(model).values():
        # On CPUs with AVX512-BF16, bitsandbytes re-packs a layer's bytes at its first inference, rounds the block scales to
        # bfloat16, and from then on passes no gradient back through the layer, even in training. Keep the one format that trains.
        module.support_avx512bf16_for_cpu = False
    prove_4bit(model)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.eos_token_id
    )
    return model.eval()


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """While active, transformers shows its progress bars only if `shown`; then it does as before."""
    before = transformers.logging.is_progress_bar_enabled()
    if not shown:
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            transformers.logging.enable_progress_bar()


@hub.with_token
def load_config(profile: Profile) -> FalconConfig:
    """The config of the profile's model, no weights; ModelError unless it is a Falcon that can be found."""
    try:
        config = AutoConfig.from_pretrained(profile.model_path, revision=profile.revision, trust_remote_code=False)
    except Exception as error:  # the network's errors share no base class with the others
        raise ModelError(f"no model found at {profile.model!r}: {hub.way_out(error)} ({first_line(error)})") from error
    if not isinstance(config, FalconConfig):
        raise ModelError(
            f"{profile.model!r} is a {config.model_type!r} model and this series tunes Falcon models: choose a model of type 'falcon'"
        )
    return config


def attach_lora(model: FalconForCausalLM, profile: Profile, seed: int = 0, **options) -> PeftModel:
    """Freeze the base and put fresh LoRA adapters (B = 0) on the profile's target modules; A is drawn from `seed`. `options` go to peft's
    LoraConfig. ProfileError for settings that cannot be trained with.
    """
    check_settings(profile)
    checkpointing = profile.activation_checkpointing
    reentrant = {"use_reentrant": False} if checkpointing else None
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=reentrant
    )
    model.config.use_cache = not checkpointing
    transformers.set_seed(seed)
    # The name and revision, not this machine's folder, are what an adapter file should say about its base.
    model.name_or_path, model.config._name_or_path = profile.model, profile.model
    config = LoraConfig(
        r=profile.lora_r, lora_alpha=profile.lora_alpha, target_modules=list(profile.target_modules), task_type="CAUSAL_LM", revision=profile.revision, **options,
    )  # fmt: skip
    model = get_peft_model(model, config)
    # Embeddings are never trained here; to decide that by itself, peft would ask the hub for the base's config at every save.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def trainable_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_adapter(model: PeftModel, folder: str | Path, fingerprint: str | None = None, state_dict: dict | None = None) -> Path:
    """Write the adapter (safetensors and config, no base weights) to `folder`, whole or not at all; OutputError if the disk refuses.

    RECORDS beside it, which tell of the adapter before, go when the new one takes its place. `BASE_SHA256` in it says which bits it was
    trained on, for the record: another kind of device may round the same base otherwise. `fingerprint` and `state_dict` are those of
    a model that is spread over processes.
    """
    folder = Path(folder)
    with files.writing(folder), files.whole_folder(folder, [folder.with_name(name) for name in RECORDS]) as part:
        model.save_pretrained(part, safe_serialization=True, state_dict=state_dict, save_embedding_layers=False)
        (part / BASE_SHA256).write_text((fingerprint or base_fingerprint(model)) + "\n")
    return folder


def load_adapter(base: FalconForCausalLM, folder: str | Path, profile: Profile) -> PeftModel:
    """Put a saved adapter on `base`, ready to answer. Raises AdapterError if it is missing, damaged, pickled or of another base."""
    check_adapter(folder, profile, base.config)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdapterError(
            f"the adapter in {str(folder)!r} does not fit {profile.model!r}: train it again on this base ({first_line(error)})"
        ) from error
    return model.eval()


def check_adapter(folder: str | Path, profile: Profile, config: FalconConfig) -> None:
    """AdapterError unless `folder` holds a sound safetensors adapter whose base name, revision and shapes are those of the profile."""
    folder = Path(folder)
    files.clean(folder)  # a run killed between two renames left it aside
    try:
        adapter = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{str(folder)!r} holds no readable adapter_config.json: name the folder that save_adapter wrote"
        ) from error
    if not isinstance(adapter, dict) or not isinstance(adapter.get("r"), int):
        raise AdapterError(f"adapter_config.json in {str(folder)!r} names no rank r: name the folder that save_adapter wrote")
    base = (adapter.get("base_model_name_or_path"), adapter.get("revision"))
    if base != (profile.model, profile.revision):
        raise AdapterError(
            f"the adapter in {str(folder)!r} was trained on {base[0]!r} (revision {base[1]}), not on {profile.model!r} (revision {profile.revision}): load that base"
        )
    if not (folder / "adapter_model.safetensors").exists():
        raise AdapterError(
            f"{str(folder)!r} has no adapter_model.safetensors: save the adapter as safetensors; pickled files are not loaded, they can run code"
        )
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise AdapterError(
            f"adapter_model.safetensors in {str(folder)!r} is damaged: save or copy it again ({first_line(error)})"
        ) from error
    linear = memory.linear_shapes(config)
    for key, shape in shapes.items():
        kind = next((k for k in linear if f".{k}.lora_" in key), None)
        outs, ins = linear.get(kind, (None, None))
        wanted = None if kind is None else (adapter["r"], ins) if ".lora_A." in key else (outs, adapter["r"])
        if shape != wanted:
            raise AdapterError(
                f"tensor {key} of the adapter in {str(folder)!r} has shape {shape}, the base {profile.model!r} needs {wanted}: it belongs to another base or rank"
            )
    targets = adapter.get("target_modules")
    kinds = set(targets) & set(linear) if isinstance(targets, list) else set()
    if not shapes or (kinds and len(shapes) != 2 * config.num_hidden_layers * len(kinds)):
        raise AdapterError(
            f"the adapter in {str(folder)!r} has {len(shapes)} tensors, A and B of {len(kinds)} kinds in {config.num_hidden_layers} layers are {2 * config.num_hidden_layers * len(kinds)}: save or copy it again"
        )
