"""Bytes that a forward pass keeps for its backward pass, from a Falcon's config alone. Imports shapes and profiles."""

from transformers import FalconConfig

from helpers.profiles import Profile
from helpers.shapes import feed_forward, linear_shapes, norms_per_layer


def autocast(profile: Profile) -> bool:
    """Whether Trainer, as helpers.training asks it to, computes this profile under autocast: on a GPU, in 16 bits."""
    return bool(profile.gpu_bytes) and profile.compute_dtype != "float32"


def widths(profile: Profile, method: str) -> tuple[int, int, int]:
    """Bytes an element of (compute dtype, residual stream, kept inputs of trained matrices)."""
    compute = 4 if profile.compute_dtype == "float32" else 2
    stream = 4 if method == "qlora" else compute
    inner = compute if method == "full" or autocast(profile) else 4  # without autocast an adapter reads float32, as it is itself
    return compute, stream, inner


def layer_activations(config: FalconConfig, profile: Profile, method: str = "qlora", attention: str = "sdpa") -> int:
    """Bytes that one decoder layer keeps for its backward pass, its input included.

    `stream` is the width of the residual stream: float32 after kbit preparation, the compute dtype else. `inner` is the width of what the
    adapters (or, in full fine-tuning, the linear layers) keep of their inputs. torch's fused attention keeps q, k, v, its output and one
    number a row; with fewer key heads than query heads (multi-query) it falls back to plain float32 arithmetic, which keeps the probabilities.
    """
    tokens, hidden, heads = profile.micro_batch * profile.max_length, config.hidden_size, config.num_attention_heads
    compute, stream, inner = widths(profile, method)
    targets = set(linear_shapes(config)) if method == "full" else set(profile.target_modules)
    reads = len({"query_key_value", "dense_h_to_4h"} & targets)
    own_copies = method != "full" and (autocast(profile) or stream != inner)  # then each adapter keeps a cast of its own
    norms = norms_per_layer(config)
    per_token = (
        hidden * stream * (1 if config.parallel_attn else 2) + 8 * norms
    )  # the inputs of the norms, their means and deviations
    per_token += hidden * inner * (reads if own_copies or norms == 2 else min(1, reads))  # the outputs of the norms
    per_token += feed_forward(config) * (stream + (inner if "dense_4h_to_h" in targets else 0))  # around the activation function
    per_token += 0 if method == "full" else len(targets) * profile.lora_r * inner
    dense, attended = (hidden * inner if "dense" in targets else 0), compute if autocast(profile) else stream
    few_keys = config.multi_query and not config.new_decoder_architecture
    if attention == "eager":
        return tokens * (per_token + dense + (3 * hidden + heads * profile.max_length) * attended)
    if few_keys:
        return tokens * (per_token + dense + (3 * hidden + heads * profile.max_length) * 4)
    per_token += 4 * hidden * attended + 4 * heads + 4 * profile.max_length  # q, k, v, output, one number a row, the mask
    if not config.multi_query and not config.new_decoder_architecture and stream == attended:
        per_token += 2 * hidden * attended  # v is a view that keeps the whole of query_key_value's output
    return tokens * (per_token + (dense if autocast(profile) or inner != attended else 0))  # else the output is `dense`'s input


def kept_activations(config: FalconConfig, profile: Profile, method: str = "qlora", attention: str = "sdpa") -> int:
    """Bytes that the forward pass leaves for backward, logits and casts of weights not counted."""
    _, stream, inner = widths(profile, method)
    state = profile.micro_batch * profile.max_length * config.hidden_size * stream
    head = state // stream * inner if method == "full" else 0  # the head's input is kept only where the head is trained
    if profile.activation_checkpointing:
        return (config.num_hidden_layers + 1) * state + head
    rotary = 2 * profile.max_length * (config.hidden_size // config.num_attention_heads) * stream
    first = state if method == "full" else 0  # the first norm keeps its input only where the embedding is trained
    return config.num_hidden_layers * layer_activations(config, profile, method, attention) + first + head + rotary
