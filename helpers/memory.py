"""Bytes of a training run, predicted from a Falcon's config alone. Imports shapes, activations, gpus, command, profiles and errors.

`python -m helpers.memory --model tiiuae/falcon-7b --gpu T4 --batch 1 --length 512` prints the plan, without network.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from transformers import FalconConfig

from helpers import command
from helpers.activations import autocast, kept_activations, layer_activations, widths
from helpers.errors import PlanError
from helpers.gpus import GPUS, HEADROOM, capacity
from helpers.profiles import FALCON_7B, PROFILES, Profile
from helpers.shapes import (  # noqa: F401 - notebooks and helpers know these names as memory's
    FALCON_11B,
    FALCON_40B,
    FALCON_180B,
    HYPOTHETICAL_13B,
    KNOWN_CONFIGS,
    adapter_parameters,
    adapter_tensors,
    check_config,
    count_parameters,
    known_config,
    linear_shapes,
    parameter_tensors,
    read_config,
    total,
)

BLOCK, BLOCK2 = 64, 256  # weights in a block that share one absmax; absmax values in a block that share one absmax2
BITS_PER_WEIGHT = 4 + 8 / BLOCK + 32 / (BLOCK * BLOCK2)  # QLoRA paper, section 3: 4.127 with double quantization
TABLES = 4 * 16 + 4 * 256  # bytes of the NF4 code book and the 8-bit map that bitsandbytes keeps beside every weight
CUDA_CONTEXT = 600 * 10**6  # an allowance, not a measurement
METHODS = ("full", "lora", "qlora")
ATTENTIONS = ("sdpa", "eager")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd")


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of a training run, by part. The parts do not all peak together, so the total is on the safe side."""

    weights: int  # of the linear layers: packed 4-bit, or 16-bit
    constants: int  # what dequantization needs
    rest: int  # embedding, head, norms, biases, rotary buffers
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # kept for backward; with checkpointing one hidden state a layer and one recomputed layer
    logits: int
    casts: int  # 16-bit copies that autocast makes of float32 weights
    workspace: int  # the one weight matrix that is dequantized at a time
    context: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def quantization_constants(weights: int, double_quant: bool = True, tables: bool = False) -> int:
    """Bytes beside one NF4 weight of `weights` elements: float32 absmax, or its 8-bit codes, absmax2 and offset; `tables` adds the maps."""
    blocks = -(-weights // BLOCK)
    if not double_quant:
        return 4 * blocks + (4 * 16 if tables else 0)
    return blocks + 4 * -(-blocks // BLOCK2) + 4 + (TABLES if tables else 0)


def packed_bytes(config: FalconConfig) -> int:
    """Bytes of all linear weights at two weights a byte."""
    return sum(count * -(-elements // 2) for count, elements in parameter_tensors(config)["linear"])


def constant_bytes(config: FalconConfig, double_quant: bool = True, tables: bool = False) -> int:
    """Bytes of all quantization constants of a config, see `quantization_constants`."""
    return sum(n * quantization_constants(size, double_quant, tables) for n, size in parameter_tensors(config)["linear"])


def rest_parameters(config: FalconConfig) -> int:
    """Parameters that stay in 16 or 32 bits: embedding, head, norms, biases."""
    parts = count_parameters(config)
    return parts["embedding"] + parts["norm"]


def buffer_bytes(config: FalconConfig) -> int:
    """Bytes of the two float32 rotary buffers (the frequencies and their original)."""
    return 2 * 4 * len(range(0, config.hidden_size // config.num_attention_heads, 2))


def expected_footprint(config: FalconConfig, rest_bytes: int) -> int:
    """Bytes of the model as loaded: linear weights in NF4 with double quantization and constants, everything else at `rest_bytes` each."""
    return packed_bytes(config) + constant_bytes(config) + rest_parameters(config) * rest_bytes


def optimizer_bytes(tensors: Sequence[tuple[int, int]], optimizer: str, width: int, whole: Sequence[tuple[int, int]] = ()) -> int:
    """Bytes of the optimizer's state for `tensors` of `width` bytes an element; `whole` are embeddings, which Trainer keeps out of 8-bit.

    torch's AdamW: two moments in the parameter's dtype and a float32 step a tensor. bitsandbytes: float32 moments, or 8-bit codes with a
    float32 absmax for each 256; tensors under 4096 elements stay float32, and the two code maps exist once.
    """
    every = [*tensors, *whole]
    if optimizer == "sgd":
        return 0
    if optimizer.startswith("adamw_torch"):
        return sum(count * (2 * size * width + 4) for count, size in every)
    if not optimizer.endswith("8bit"):
        return 8 * total(every)
    small = [(count, size) for count, size in tensors if size < 4096]
    large = [(count, size) for count, size in tensors if size >= 4096]
    coded = sum(count * (2 * size + 8 * -(-size // 256)) for count, size in large)
    return coded + 8 * total([*small, *whole]) + (2 * 4 * 256 if large else 0)


def plan(config: FalconConfig, profile: Profile, method: str = "qlora", attention: str = "sdpa") -> MemoryPlan:
    """What training `profile` on a model of this config will take, in bytes: a prediction from the config alone.

    `method`: "qlora" (NF4 with double quantization, prepared for kbit training: the rest in float32), "lora" (the base in the compute dtype)
    or "full" (weights and gradients in the compute dtype). Adapters are float32, peft's default. On a GPU, Trainer computes a 16-bit
    profile under autocast. Logits are counted three times in float32: log-probabilities, their gradient, the logits' gradient.
    Raises ModelError for a config that is not Falcon's, PlanError for an unknown name or a size below 1.
    """
    check(config, profile, method, attention)
    compute, _, _ = widths(profile, method)
    parts, tensors = count_parameters(config), parameter_tensors(config)
    adapter = [] if method == "full" else adapter_tensors(config, profile.lora_r, profile.target_modules)
    rest_width = 4 if method == "qlora" else compute
    if method == "full":
        plain = tensors["linear"] + tensors["bias"] + tensors["norm"] + tensors["head"]
        state = optimizer_bytes(plain, profile.optimizer, compute, whole=tensors["embedding"])
        gradients = compute * sum(parts.values())
    else:
        state, gradients = optimizer_bytes(adapter, profile.optimizer, 4), 4 * total(adapter)
    activations, cast = kept_activations(config, profile, method, attention), total(adapter)
    if profile.activation_checkpointing:
        activations += layer_activations(config, profile, method, attention)
        cast //= config.num_hidden_layers
    cast += config.vocab_size * config.hidden_size if rest_width > compute else 0  # the head
    return MemoryPlan(
        weights=packed_bytes(config) if method == "qlora" else compute * parts["linear"],
        constants=constant_bytes(config, tables=True) if method == "qlora" else 0,
        rest=rest_width * rest_parameters(config) + buffer_bytes(config),
        adapter=4 * total(adapter),
        gradients=gradients,
        optimizer=state,
        activations=activations,
        logits=3 * 4 * profile.micro_batch * profile.max_length * config.vocab_size,
        casts=compute * cast if autocast(profile) else 0,
        workspace=compute * max(size for _, size in tensors["linear"]) if method == "qlora" else 0,
        context=CUDA_CONTEXT if profile.gpu_bytes else 0,
    )


def check(config: FalconConfig, profile: Profile, method: str, attention: str) -> None:
    """ModelError or PlanError unless the arguments of `plan` make sense."""
    check_config(config)
    for what, value, choices in (
        ("method", method, METHODS),
        ("attention implementation", attention, ATTENTIONS),
        ("optimizer", profile.optimizer, OPTIMIZERS),
        *(("target module", name, tuple(linear_shapes(config))) for name in profile.target_modules),
    ):
        if value not in choices:
            raise PlanError(f"there is no {what} {value!r} in this planner: choose one of {', '.join(choices)}")
    for what, value in (("batch", profile.micro_batch), ("length", profile.max_length), ("rank", profile.lora_r)):
        if not isinstance(value, int) or value < 1:
            raise PlanError(f"a {what} of {value!r} cannot be planned: give a whole number of at least 1")


def fits(planned: MemoryPlan, gpu: str) -> bool:
    """Whether a plan fits the card, with a few percent left for the allocator. PlanError for an unknown card."""
    return planned.total <= (1 - HEADROOM) * capacity(gpu)


def largest_batch(config: FalconConfig, profile: Profile, gpu: str, method: str = "qlora", attention: str = "sdpa") -> int:
    """The largest batch of `profile.max_length` tokens each whose plan fits `gpu`; 0 if not even one does."""

    def fit(batch: int) -> bool:
        return fits(plan(config, replace(profile, micro_batch=batch), method, attention), gpu)

    low, high = 0, 1
    while fit(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def gpu_profile(model: str, gpu: str, batch: int, length: int, **changes) -> Profile:
    """A profile to plan with on `gpu`: bfloat16 (float16 on a T4, which has no bfloat16), r = 16 on all linear layers, 8-bit paged AdamW."""
    dtype = "float16" if gpu == "T4" else "bfloat16"
    asked = {"model": model, "gpu_bytes": capacity(gpu), "compute_dtype": dtype, "micro_batch": batch, "max_length": length}
    return replace(PROFILES["colab-t4"], **asked | {"name": gpu, "revision": None} | changes)


def table(config: FalconConfig, profile: Profile, gpu: str, attention: str = "sdpa") -> str:
    """The plan of each method side by side as text, in GB, whether it fits `gpu`, and the largest batch that would."""
    plans = {method: plan(config, profile, method, attention) for method in METHODS}
    lines = [f"{'GB, predicted':<16}" + "".join(f"{method:>10}" for method in plans)]
    for part in asdict(plans["qlora"]):
        lines.append(f"{part:<16}" + "".join(f"{getattr(p, part) / 1e9:>10.3f}" for p in plans.values()))
    lines.append(f"{'total':<16}" + "".join(f"{p.total / 1e9:>10.3f}" for p in plans.values()))
    lines.append(f"{'fits ' + gpu:<16}" + "".join(f"{'yes' if fits(p, gpu) else 'no':>10}" for p in plans.values()))
    batches = [largest_batch(config, profile, gpu, method, attention) for method in METHODS]
    lines.append(f"{'largest batch':<16}" + "".join(f"{batch:>10}" for batch in batches))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`."""
    parser = argparse.ArgumentParser(prog="python -m helpers.memory", description="Predict the memory of tuning a Falcon.")
    parser.add_argument("--model", default=FALCON_7B, help=f"{', '.join(KNOWN_CONFIGS)}, or a local config.json")
    parser.add_argument("--gpu", default="T4", help=f"one of {', '.join(GPUS)}; default T4")
    parser.add_argument("--batch", type=command.whole("batch size"), default=1, help="examples in one forward pass; default 1")
    parser.add_argument("--length", type=command.whole("length in tokens"), default=512, help="tokens an example; default 512")
    parser.add_argument("--rank", type=command.whole("rank"), default=16, help="of the adapters; default 16")
    parser.add_argument("--optimizer", default="paged_adamw_8bit", help=f"one of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--attention", default="sdpa", help=f"one of {', '.join(ATTENTIONS)}; default sdpa")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations instead of recomputing them")
    args = parser.parse_args(arguments)
    changes = {"lora_r": args.rank, "optimizer": args.optimizer, "activation_checkpointing": not args.no_checkpointing}

    def work() -> None:
        config = read_config(args.model)
        profile = gpu_profile(args.model, args.gpu, args.batch, args.length, **changes)
        text = table(config, profile, args.gpu, args.attention)
        print(
            f"{args.model}, {sum(count_parameters(config).values()):,} parameters; batch {args.batch} x {args.length} tokens, {profile.compute_dtype}"
        )
        print(text)

    return command.status(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
