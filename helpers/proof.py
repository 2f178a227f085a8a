"""What a loaded model really holds: 4-bit layers counted, bytes counted, bits hashed. Imports memory and errors."""

import hashlib
from dataclasses import dataclass

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from transformers import FalconForCausalLM

from helpers import memory
from helpers.errors import NotQuantizedError


def four_bit_layers(model: torch.nn.Module) -> dict[str, Linear4bit]:
    """All `Linear4bit` modules by name, also those inside LoRA layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of a base model's weights, with the quantization constants (absmax codes, their absmax, the offset).

    The two lookup tables (16 and 256 values, the same for every layer) are left out; `get_memory_footprint` leaves out all constants.
    """
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes
            if state.nested:
                total += state.state2.absmax.nbytes + state.offset.nbytes
    return total


@dataclass(frozen=True)
class FourBitProof:
    """What `prove_4bit` counted."""

    linear4bit_modules: int
    footprint_bytes: int
    footprint_expected_bytes: int


def prove_4bit(model: FalconForCausalLM) -> FourBitProof:
    """Count 4-bit layers and bytes and hold both against the config; NotQuantizedError unless they agree (bytes within 0.5%) in NF4."""
    config, layers = model.config, four_bit_layers(model)
    expected_layers = 4 * config.num_hidden_layers
    if len(layers) != expected_layers:
        raise NotQuantizedError(
            f"{len(layers)} of {expected_layers} linear layers are 4-bit: transformers {transformers.__version__} did not quantize this Falcon, load it with helpers.loading.load_base"
        )
    expected = memory.expected_footprint(config, rest_bytes=model.lm_head.weight.element_size())
    found = stored_bytes(model)
    if abs(found - expected) > 0.005 * expected:
        raise NotQuantizedError(
            f"the model takes {found:,} bytes where 4-bit weights predict {expected:,}: check quantization_config (NF4, double quantization)"
        )
    for name, layer in layers.items():  # FP4 has as many bytes, and larger errors
        if layer.weight.quant_state.quant_type != "nf4":
            raise NotQuantizedError(
                f"layer {name} holds {layer.weight.quant_state.quant_type!r} codes where NF4 was asked for: check quantization_config (bnb_4bit_quant_type)"
            )
    return FourBitProof(len(layers), found, expected)


def base_fingerprint(model: torch.nn.Module) -> str:
    """sha256 over every 4-bit layer's packed bytes and block scales: equal fingerprints mean that the base kept every bit."""
    digest = hashlib.sha256()
    for module in four_bit_layers(model).values():
        for tensor in (module.weight.data, module.weight.quant_state.absmax):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
