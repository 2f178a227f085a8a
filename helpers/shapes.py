"""What a Falcon's config says about its parameters: shapes and counts, no weights made. Imports profiles and errors."""

import json
from pathlib import Path

from transformers import FalconConfig

from helpers.errors import ModelError
from helpers.profiles import FALCON_7B, ROOT

FALCON_11B, FALCON_40B, FALCON_180B = "tiiuae/falcon-11B", "tiiuae/falcon-40b", "tiiuae/falcon-180B"
HYPOTHETICAL_13B = "hypothetical-falcon-13b"
KNOWN_CONFIGS = {
    FALCON_7B: "data/falcon-7b/config.json",
    FALCON_11B: "data/falcon-11b/config.json",
    FALCON_40B: "data/falcon-40b/config.json",
    FALCON_180B: "data/falcon-180b/config.json",
    "data/tiny-falcon": "data/tiny-falcon/config.json",
    HYPOTHETICAL_13B: "data/falcon-7b/config.json",
}
# Nobody published a 13B Falcon. This is Falcon-7b's architecture, wider and deeper, so that the 13B question can be asked.
_13B = {"hidden_size": 5120, "num_attention_heads": 80, "num_hidden_layers": 48}


def known_config(model: str) -> FalconConfig:
    """The config of a model that ships with the series, without network. ModelError for any other."""
    if model not in KNOWN_CONFIGS:
        raise ModelError(f"no config of {model!r} is stored here: choose one of {', '.join(KNOWN_CONFIGS)}")
    entries = json.loads((ROOT / KNOWN_CONFIGS[model]).read_text())
    return FalconConfig(**entries | (_13B if model == HYPOTHETICAL_13B else {}))


def read_config(model: str) -> FalconConfig:
    """A known model's config, or that of a local folder or config.json. ModelError if it is neither, unreadable, or not a Falcon's."""
    if model in KNOWN_CONFIGS:
        return known_config(model)
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model!r} is neither known nor a readable config.json: give one, a folder that holds one, or one of {', '.join(KNOWN_CONFIGS)}"
        ) from error
    if not isinstance(entries, dict) or entries.get("model_type") != "falcon":
        found = entries.get("model_type") if isinstance(entries, dict) else None
        raise ModelError(
            f"{model!r} describes a {found!r} model and this planner knows Falcon: give a config of model_type 'falcon'"
        )
    return FalconConfig(**entries)


def check_config(config: FalconConfig) -> None:
    """ModelError unless `config` is a Falcon's."""
    if not isinstance(config, FalconConfig):
        kind = getattr(config, "model_type", type(config).__name__)
        raise ModelError(f"{kind!r} is no Falcon config: give a FalconConfig, for instance known_config({FALCON_7B!r})")


def feed_forward(config: FalconConfig) -> int:
    """Width of the feed-forward layer: 4 * hidden unless the config says otherwise."""
    return getattr(config, "ffn_hidden_size", None) or 4 * config.hidden_size


def linear_shapes(config: FalconConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the four linear kinds of one decoder layer."""
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        qkv = hidden + 2 * config.num_kv_heads * head
    else:
        qkv = hidden + 2 * head if config.multi_query else 3 * hidden
    return {
        "query_key_value": (qkv, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (feed_forward(config), hidden),
        "dense_4h_to_h": (hidden, feed_forward(config)),
    }


def norms_per_layer(config: FalconConfig) -> int:
    """Layer norms in one decoder layer, as transformers' FalconDecoderLayer builds them."""
    if not config.parallel_attn:
        return 2
    asked = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    return 2 if asked == 2 else 1


def parameter_tensors(config: FalconConfig) -> dict[str, list[tuple[int, int]]]:
    """(how many, elements of each) for every parameter tensor, by part: `linear`, `bias`, `norm`, `embedding`, `head` (if not tied)."""
    layers, hidden, shapes = config.num_hidden_layers, config.hidden_size, linear_shapes(config).values()
    table = config.vocab_size * hidden
    return {
        "linear": [(layers, out * inp) for out, inp in shapes],
        "bias": [(layers, out) for out, _ in shapes] if config.bias else [],
        "norm": [(2 * (layers * norms_per_layer(config) + 1), hidden)],
        "embedding": [(1, table)],
        "head": [] if config.tie_word_embeddings else [(1, table)],
    }


def adapter_tensors(config: FalconConfig, r: int, target_modules: tuple[str, ...]) -> list[tuple[int, int]]:
    """(how many, elements of each) for LoRA's A (r x in) and B (out x r) on every targeted weight."""
    shapes = linear_shapes(config)
    return [(config.num_hidden_layers, r * side) for kind in target_modules for side in shapes[kind]]


def total(tensors: list[tuple[int, int]]) -> int:
    """Elements in a list of (how many, elements of each)."""
    return sum(count * elements for count, elements in tensors)


def count_parameters(config: FalconConfig) -> dict[str, int]:
    """Parameters by part: `linear` (what is quantized), `embedding` (with the head), `norm` (with the biases)."""
    tensors = parameter_tensors(config)
    return {
        "linear": total(tensors["linear"]),
        "embedding": total(tensors["embedding"] + tensors["head"]),
        "norm": total(tensors["norm"] + tensors["bias"]),
    }


def adapter_parameters(config: FalconConfig, r: int, target_modules: tuple[str, ...]) -> int:
    """Trainable parameters of LoRA: r * (in + out) for every targeted weight."""
    return total(adapter_tensors(config, r, target_modules))
