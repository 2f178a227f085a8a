"""The model a run trains: the base in one of six formats, with adapters or without. Imports loading, memory, study.run.

The tiny Falcon's weights are stored in bfloat16 and every bfloat16 is a float32, so a base held here in float32 *is* the 16-bit base;
`training_bytes` counts it so. Only full fine-tuning in bf16 computes in another dtype than float32.
"""

from dataclasses import replace

import torch
from transformers import BitsAndBytesConfig, FalconForCausalLM

from helpers import loading, memory, profiles
from helpers.errors import NotQuantizedError
from helpers.study.run import METHODS, TARGETS, Run


def load_format(format: str) -> FalconForCausalLM:
    """The tiny Falcon with its linear layers stored as `format`, computing in float32 (full fine-tuning in bf16: see `prepare`)."""
    tiny = profiles.PROFILES["tiny"]
    options = {}
    if format in ("nf4+dq", "nf4", "fp4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=format[:3], bnb_4bit_use_double_quant=format == "nf4+dq", bnb_4bit_compute_dtype=tiny.dtype
        )  # fmt: skip
    with loading.falcon_made_of_plain_linear(), loading.progress_bars(False):
        model = FalconForCausalLM.from_pretrained(tiny.model_path, dtype=tiny.dtype, attn_implementation="sdpa", **options)
    found, wanted = len(loading.four_bit_layers(model)), 4 * model.config.num_hidden_layers * bool(options)
    if found != wanted:
        raise NotQuantizedError(
            f"{found} of {wanted} linear layers are 4-bit in format {format!r}: check the Falcon repair in helpers.loading"
        )
    for module in loading.four_bit_layers(model).values():
        module.support_avx512bf16_for_cpu = False  # see helpers.loading.load_base
    if format == "int4":
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in profiles.ALL_LINEAR:
                module.weight.data = round_to_int4(module.weight.data)
    return model


def round_to_int4(w: torch.Tensor, block_size: int = 64) -> torch.Tensor:
    """`w` through Int4 and back: codes -7 to 7 times a scale for each block (the block's absolute maximum / 7)."""
    blocks = w.reshape(-1, block_size)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).view_as(w)


def prepare(run: Run) -> torch.nn.Module:
    """The model of a run, ready to train: all of its weights trainable, or a frozen base with fresh adapters."""
    model = load_format(run.format)
    if run.method == "full":
        return model.to(torch.bfloat16 if run.format == "bf16" else torch.float32)
    profile = replace(profiles.PROFILES["tiny"], lora_r=run.rank, lora_alpha=2 * run.rank, target_modules=TARGETS[run.targets])
    return loading.attach_lora(model, profile, run.seed, **METHODS[run.method])


def training_bytes(model: torch.nn.Module, run: Run) -> int:
    """Bytes that weights, gradients and Adam's two moments take while this run trains, the base counted in its own format."""
    trained = loading.trainable_parameters(model)
    if run.method == "full":
        return trained * 4 * (2 if run.format == "bf16" else 4)
    config = model.config
    linear = sum(outs * ins for outs, ins in memory.linear_shapes(config).values()) * config.num_hidden_layers
    bits = {"bf16": 16, "nf4+dq": 4 + 8 / 64 + 32 / (64 * 256), "nf4": 4.5, "fp4": 4.5, "int4": 4.5}[run.format]
    rest = sum(memory.count_parameters(config).values()) - linear
    return round(linear * bits / 8 + 2 * rest + 16 * trained)
