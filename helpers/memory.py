"""Bytes, predicted from a Falcon's config alone. Imports profiles and errors."""

import json
from dataclasses import dataclass

from transformers import FalconConfig

from helpers.errors import ModelError
from helpers.profiles import FALCON_7B, ROOT, Profile

BLOCK, BLOCK2 = 64, 256  # weights in a block that share one absmax; absmax values in a block that share one absmax2
BITS_PER_WEIGHT = 4 + 8 / BLOCK + 32 / (BLOCK * BLOCK2)  # QLoRA paper, section 3: 4.127 with double quantization
CUDA_CONTEXT = 600 * 10**6  # an allowance, not a measurement
KNOWN_CONFIGS = {FALCON_7B: "data/falcon-7b/config.json", "data/tiny-falcon": "data/tiny-falcon/config.json"}


def known_config(model: str) -> FalconConfig:
    """The config of a model that ships with the series, without network. ModelError for any other."""
    if model not in KNOWN_CONFIGS:
        raise ModelError(f"no config of {model!r} is stored here: choose one of {', '.join(KNOWN_CONFIGS)}")
    return FalconConfig(**json.loads((ROOT / KNOWN_CONFIGS[model]).read_text()))


def linear_shapes(config: FalconConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the four linear kinds of one decoder layer."""
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        qkv = hidden + 2 * config.num_kv_heads * head
    else:
        qkv = hidden + 2 * head if config.multi_query else 3 * hidden
    ffn = getattr(config, "ffn_hidden_size", None) or 4 * hidden
    return {
        "query_key_value": (qkv, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (ffn, hidden),
        "dense_4h_to_h": (hidden, ffn),
    }


def count_parameters(config: FalconConfig) -> dict[str, int]:
    """Parameters by part: `linear` (what is quantized), `embedding` (tied with the head), `norm`. Biases count as norm-like rest."""
    shapes = linear_shapes(config)
    norms = 2 if config.new_decoder_architecture or not config.parallel_attn else 1
    bias = sum(out for out, _ in shapes.values()) if config.bias else 0
    per_layer = norms * 2 * config.hidden_size + bias
    return {
        "linear": config.num_hidden_layers * sum(out * inp for out, inp in shapes.values()),
        "embedding": config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2),
        "norm": config.num_hidden_layers * per_layer + 2 * config.hidden_size,
    }


def adapter_parameters(config: FalconConfig, r: int, target_modules: tuple[str, ...]) -> int:
    """Trainable parameters of LoRA: r * (in + out) for every targeted weight."""
    shapes = linear_shapes(config)
    return config.num_hidden_layers * sum(r * sum(shapes[kind]) for kind in target_modules)


def expected_footprint(config: FalconConfig, rest_bytes: int) -> int:
    """Bytes of the model as loaded: linear weights in NF4 with double quantization, everything else at `rest_bytes` each."""
    parts = count_parameters(config)
    return round(parts["linear"] * BITS_PER_WEIGHT / 8) + (parts["embedding"] + parts["norm"]) * rest_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of a QLoRA run, by part."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    context: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.logits + self.context


def plan(config: FalconConfig, profile: Profile) -> MemoryPlan:
    """What training `profile` on a model of this config will take, in bytes: a prediction, with a rough model of activations.

    Adapter and gradients are float32 (peft's default), 8-bit Adam keeps two bytes a parameter, checkpointing keeps one hidden state a
    layer and recomputes one layer at a time, logits exist three times in float32 (logits, their gradient, and one temporary of the loss).
    """
    adapter = adapter_parameters(config, profile.lora_r, profile.target_modules)
    tokens = profile.micro_batch * profile.max_length
    width = 2 if profile.compute_dtype != "float32" else 4
    one_layer = (
        tokens * (14 * config.hidden_size + 3 * (getattr(config, "ffn_hidden_size", None) or 4 * config.hidden_size)) * width
    )
    kept = tokens * config.hidden_size * width * config.num_hidden_layers
    return MemoryPlan(
        # kbit preparation raises what is not 4-bit to float32
        weights=expected_footprint(config, rest_bytes=4),
        adapter=4 * adapter,
        gradients=4 * adapter,
        optimizer=(2 if profile.optimizer.endswith("8bit") else 8) * adapter,
        activations=kept + one_layer if profile.activation_checkpointing else one_layer * config.num_hidden_layers,
        logits=3 * 4 * tokens * config.vocab_size,
        context=CUDA_CONTEXT if profile.gpu_bytes else 0,
    )
