"""Bytes of a training run, predicted from a model's config, without its weights.

Stored bytes are counted on a model built on the meta device; activations follow a formula. `python
-m helpers.memory --model tiiuae/falcon-7b --gpu T4 --batch 1 --length 512` prints the plan."""

import argparse
import bisect
import csv
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import PreTrainedConfig as Config
from transformers.pytorch_utils import Conv1D

from helpers.environment import ROOT, exit_status, whole_number
from helpers.errors import ModelError, TutorialError
from helpers.profiles import ALL_LINEAR, FALCON_7B, PROFILES, Profile

KNOWN_CONFIGS = json.loads((ROOT / "data/falcon-configs/models.json").read_text())
FILES = [(ROOT / f"data/measured/{name}.csv").read_text("utf-8") for name in ("cards", "rates")]
CARDS, RATES = ({row["card"]: row for row in csv.DictReader(t.splitlines())} for t in FILES)
GPUS = {card: int(float(row["gib"]) * 2**30) for card, row in CARDS.items()}
OLD_NAMES = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
OLD_NAMES |= {"n_head_kv": "num_kv_heads"}  # in Falcon's configs before transformers knew it
MODELLED = ("falcon", "llama", "mistral", "qwen2", "qwen3")  # tested: real activations agree
METHODS, ATTENTIONS = ("full", "lora", "qlora"), ("sdpa", "eager")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit")
OPTIMIZERS += ("paged_adamw_8bit", "paged_adamw_32bit", "sgd")
CUDA_CONTEXT = 600 * 10**6  # an allowance, not a measurement
RESERVE = 0.4  # reserved and unused, per byte of activations and logits: data/measured/README.md
HEADROOM = 0.04  # of a card, an allowance for what else is on it


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of a training run, by part."""

    weights: int  # of the linear layers: packed 4-bit, or 16-bit
    constants: int  # what dequantization needs
    rest: int  # embedding, head, norms, biases, buffers
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # kept for backward, and what a layer's backward needs beyond the logits
    logits: int
    casts: int  # 16-bit copies that autocast makes of float32 weights
    workspace: int  # the one weight matrix that is dequantized at a time
    context: int
    reserve: int  # an estimate of what the allocator holds and cannot use

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def one_of(what: str, value: str, choices: Sequence[str], error=TutorialError) -> str:
    """`value`; `error`, with the choices, unless it is one of them."""
    if value not in choices:
        raise error(f"there is no {what} {value!r}: choose one of {', '.join(choices)}")
    return value


def capacity(gpu: str) -> int:
    """Bytes that torch finds on the card `gpu`; TutorialError for one that is not in GPUS."""
    return GPUS[one_of("GPU", gpu, tuple(GPUS))]


def known_config(model: str) -> Config:
    """A known model's config, or that of a folder or config.json; Falcon's old names are read too.
    ModelError unless transformers builds a causal language model of it, without remote code."""
    path = ROOT / KNOWN_CONFIGS[model] if model in KNOWN_CONFIGS else Path(model)
    try:
        file = path / "config.json" if path.is_dir() else path
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
        if entries["model_type"] in ("RefinedWeb", "RefinedWebModel", "falcon"):
            entries = {OLD_NAMES.get(name, name): value for name, value in entries.items()}
            entries.setdefault("new_decoder_architecture", "num_kv_heads" in entries)
            entries["model_type"] = "falcon"
        config = AutoConfig.for_model(**entries)
        if not skeleton(config).layers:
            raise ValueError("it has no layers")
    except Exception as error:  # each model's code refuses in its own way
        wrong = f"{model!r} is no config of a causal language model ({error!r:.150})"
        ways = f"a config.json, a folder that holds one, or one of {', '.join(KNOWN_CONFIGS)}"
        raise ModelError(f"{wrong}: give {ways}") from error
    return config


class Skeleton(NamedTuple):
    """What a model holds, counted on the meta device: names and shapes, no memory."""

    layers: dict[str, tuple[int, int]]  # (out, in) of each linear layer but the output head
    tensors: dict[str, list[int]]  # elements of each: linear, embedding, head (unless tied), norm
    others: list[torch.Size]  # shapes of all but the linear weights
    buffers: int  # bytes, all float32: for most models the rotary frequencies, twice


def skeleton(config: Config) -> Skeleton:
    """The skeleton of a config's model, built once; transformers' own errors if it cannot be."""
    return _skeleton(config.to_json_string())


@functools.lru_cache(maxsize=64)
def _skeleton(text: str) -> Skeleton:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(text)))
    head, layers, others = model.get_output_embeddings(), {}, []
    tensors = {"linear": [], "embedding": [], "head": [], "norm": []}
    part_of = {head: "head"}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            shape = tuple(module.weight.shape)
            layers[name] = shape[::-1] if isinstance(module, Conv1D) else shape
        elif isinstance(module, torch.nn.Embedding):
            part_of[module] = "embedding"
    for name, parameter in model.named_parameters():  # a tied head is the embedding
        owner, _, kind = name.rpartition(".")
        part = part_of.get(model.get_submodule(owner), "norm")
        part = "linear" if owner in layers and kind == "weight" else part
        tensors[part].append(parameter.numel())
        others += [parameter.shape] if part != "linear" else []
    return Skeleton(layers, tensors, others, sum(buffer.nbytes for buffer in model.buffers()))


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of each kind of linear layer, by the last part of its name."""
    return {name.rpartition(".")[2]: shape for name, shape in skeleton(config).layers.items()}


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by part: `linear` (quantized), `embedding` (with the head), `norm` (others)."""
    parts = {part: sum(sizes) for part, sizes in skeleton(config).tensors.items()}
    parts["embedding"] += parts.pop("head")
    return parts


def targets(config: Config, names: Sequence[str]) -> list[str]:
    """The kinds of linear layers named, for ALL_LINEAR all; TutorialError for one it lacks."""
    kinds = list(linear_shapes(config))
    every = names == "all-linear" or tuple(names) == ALL_LINEAR
    return kinds if every else [one_of("target module", name, kinds) for name in names]


def adapter_tensors(config: Config, r: int, target_modules: Sequence[str]) -> list[int]:
    """Elements of LoRA's A (r x in) and B (out x r) on every targeted layer."""
    layers, kinds = skeleton(config).layers.items(), targets(config, target_modules)
    targeted = [shape for name, shape in layers if name.rpartition(".")[2] in kinds]
    return [r * side for shape in targeted for side in shape]


def adapter_parameters(config: Config, r: int, target_modules: Sequence[str]) -> int:
    """Trainable parameters of LoRA: r * (in + out) for every targeted layer."""
    return sum(adapter_tensors(config, r, target_modules))


def packed_bytes(config: Config) -> int:
    """Bytes of all linear weights at two weights a byte."""
    return sum(-(-size // 2) for size in skeleton(config).tensors["linear"])


def constant_bytes(config: Config, tables: bool = False) -> int:
    """Bytes beside NF4 weights: for each 64 an 8-bit code of their absmax, for each 256 codes a
    float32, and an offset (QLoRA, section 3); `tables` adds bitsandbytes' code book and map."""
    blocks = [-(-size // 64) for size in skeleton(config).tensors["linear"]]
    return sum(count + 4 * -(-count // 256) + 4 + 4 * (16 + 256) * tables for count in blocks)


def expected_footprint(config: Config, rest_bytes: int) -> int:
    """Bytes of the model as loaded: NF4 weights and constants, the rest at `rest_bytes` each."""
    counts = count_parameters(config)
    rest = counts["embedding"] + counts["norm"]
    return packed_bytes(config) + constant_bytes(config) + rest_bytes * rest


def optimizer_bytes(
    tensors: Sequence[int], optimizer: str, width: int, embeddings: Sequence[int] = ()
) -> int:
    """Bytes of the optimizer's state for tensors of so many elements, `width` bytes each.
    torch's AdamW: two moments in the parameter's dtype and a float32 step a tensor. bitsandbytes:
    float32 moments, or 8-bit codes with a float32 absmax for each 256; tensors under 4096 elements
    and `embeddings` (so Trainer asks) stay float32, and the two code maps exist once."""
    every = [*tensors, *embeddings]
    if optimizer == "sgd":
        return 0
    if optimizer.startswith("adamw_torch"):
        return sum(2 * size * width + 4 for size in every)
    coded = [size for size in tensors if size >= 4096] if optimizer.endswith("8bit") else []
    codes = sum(2 * size + 8 * -(-size // 256) for size in coded)
    return codes + 8 * (sum(every) - sum(coded)) + (2 * 4 * 256 if coded else 0)


class Activations:
    """A step's formulas. Each gives bytes: kept for backward, and the peak of the backward pass."""

    def __init__(self, config: Config, profile: Profile, method: str, attention: str):
        self.config, self.profile, self.shapes = config, profile, linear_shapes(config)
        self.falcon, self.eager = config.model_type == "falcon", attention == "eager"
        self.alibi, self.full = self.falcon and config.alibi, method == "full"
        self.trained = set(self.shapes if self.full else targets(config, profile.target_modules))
        self.queries = self.shapes["dense" if self.falcon else "o_proj"][1]
        # bytes an element of what is computed under Trainer's autocast, of the residual stream,
        # which is float32 after kbit preparation, and of a norm: float32, and what RMS norms scale
        self.compute = profile.dtype.itemsize
        self.stream = 4 if method == "qlora" else self.compute
        self.norm = 4 + (self.stream if self.full and not self.falcon else 0)
        self.copies = self.compute < 4 and not self.full  # each adapter casts its input

    def attention(self) -> tuple[int, int]:
        """A token's bytes in one layer's attention, from q, k, v to what the last projection reads.
        Fused attention keeps q, k, v, its output, one number a row and the mask. Eager attention,
        and fused attention with a single key head, which falls back to plain float32 arithmetic,
        keep the probabilities; backward makes their gradient and that of the scores: three copies,
        and CUDA's kernel a fourth, gradient times probability (data/measured/gpu.json has 16.2
        bytes a score)."""
        compute, queries, length = self.compute, self.queries, self.profile.max_length
        old = self.falcon and not self.config.new_decoder_architecture
        output = queries * compute if {"dense", "o_proj"} & self.trained else 0
        scores, mask = self.config.num_attention_heads * length, length * compute
        product = 4 if self.profile.gpu_bytes else 0  # of gradient and probability, a score
        if self.eager:
            probability = self.stream if self.falcon else 4
            cast = compute if compute < probability else 0
            peak = 4 + cast + 2 * 4  # two gradients in float32
            if self.falcon:  # with alibi five float32 copies, counted at the peak
                peak = 20 + cast if self.alibi else 4 * probability
            kept = 3 * queries * compute + output
            return kept + scores * (probability + cast), kept + scores * (peak + product)
        if old and self.config.multi_query:
            kept = 3 * 4 * queries + output
            return kept + scores * 4, kept + scores * (3 * 4 + product) + mask
        if self.alibi:  # one bias a head, made once, which autocast casts in each layer
            mask = scores * compute if compute < self.stream else 0
        kept = 4 * queries * compute + 4 * self.config.num_attention_heads + mask
        if old and not self.alibi and compute == self.stream:
            kept += 2 * queries * compute  # v is a view that keeps query_key_value's output
        kept += output if self.copies else 0  # else it is the attention's
        return kept, kept

    def layer(self) -> tuple[int, int]:
        """A token's bytes in one decoder layer, its input included."""
        config, compute, stream = self.config, self.compute, self.stream
        hidden, norms, normed = config.hidden_size, 2, 2 * config.hidden_size
        if self.falcon and config.parallel_attn:  # as FalconDecoderLayer decides
            norms = config.num_ln_in_parallel_attn or 1 + config.new_decoder_architecture
            normed = hidden  # both norms have one input
        if config.model_type == "qwen3":  # norms of queries and keys
            normed += self.shapes["q_proj"][0] + self.shapes["k_proj"][0]
        attends = len({"query_key_value", "q_proj", "k_proj", "v_proj"} & self.trained)
        feeds = len({"dense_h_to_4h", "gate_proj", "up_proj"} & self.trained)
        down = len({"dense_4h_to_h", "down_proj"} & self.trained)
        reads = attends + feeds if self.copies else min(bool(attends) + bool(feeds), norms)
        # the norms' inputs and statistics, and their outputs for what reads them
        kept = normed * self.norm + 8 * norms + hidden * compute * reads
        kept += 0 if self.full else len(self.trained) * self.profile.lora_r * compute
        # Falcon's MLP keeps the activation function's input; others also its output and the gated
        ffn = self.shapes["dense_h_to_4h" if self.falcon else "up_proj"][0]
        mlp, mlp_peak = (stream, 3 * stream) if self.falcon else (3 * stream, 6 * stream)
        mlp += compute if down else 0
        if not self.full and (feeds or down):  # gradients in float32, as adapters have them
            mlp_peak = mlp + 12 - compute
        attended, attention_peak = self.attention()
        peak = max(attended + ffn * mlp_peak + 2 * hidden * stream, attention_peak)
        return kept + attended + ffn * mlp, kept + peak

    def model(self) -> tuple[int, int]:
        """A step's bytes, without logits and casts."""
        config, profile, stream = self.config, self.profile, self.stream
        stays, peak = self.layer()
        more = peak - stays
        if profile.activation_checkpointing:  # a layer's input stays, and all is made once more
            stays, more = config.hidden_size * stream, peak
        mask = stream if self.eager else 1
        if self.alibi and (self.compute == stream or profile.activation_checkpointing):
            mask = stream * config.num_attention_heads
        kept = config.num_hidden_layers * stays + profile.max_length * mask
        kept += config.hidden_size * (self.norm + (self.compute if self.full else 0))  # at the end
        kept += 64  # token ids and the like
        tokens = profile.micro_batch * profile.max_length
        rotary = 2 * profile.max_length * self.queries // config.num_attention_heads * stream
        return tokens * kept + rotary, tokens * (kept + more) + rotary


def stored(config: Config, profile: Profile, method: str) -> dict[str, int]:
    """Bytes held from step to step, for any model: the fields of MemoryPlan up to `optimizer`."""
    compute, (_, parts, _, buffers) = profile.dtype.itemsize, skeleton(config)
    trained, embeddings = adapter_tensors(config, profile.lora_r, profile.target_modules), []
    width, four_bit, full = 4, method == "qlora", method == "full"  # adapters are float32
    if full:
        trained, embeddings = parts["linear"] + parts["norm"] + parts["head"], parts["embedding"]
        width = compute
    rest = sum(parts["embedding"] + parts["head"] + parts["norm"])
    return {
        "weights": packed_bytes(config) if four_bit else compute * sum(parts["linear"]),
        "constants": constant_bytes(config, tables=True) if four_bit else 0,
        "rest": rest * (4 if four_bit else compute) + buffers,
        "adapter": 0 if full else width * sum(trained),
        "gradients": width * sum(trained + embeddings),
        "optimizer": optimizer_bytes(trained, profile.optimizer, width, embeddings),
    }


def plan(config: Config, profile: Profile, method="qlora", attention="sdpa") -> MemoryPlan:
    """What training `profile` on a model of this config will take, in bytes.
    `method`: "qlora" (NF4 with double quantization, prepared for kbit training: the rest in
    float32), "lora" (the base in the compute dtype) or "full" (weights and gradients in the compute
    dtype). Adapters are float32, peft's default. Two phases exclude each other: logits three times
    in float32 (log-probabilities, their gradient, the logits' gradient), and the backward pass of
    one layer; what the second needs more is in `activations`. Gradients are counted as held
    throughout, as accumulation does. ModelError: a family not MODELLED; TutorialError: a name."""
    one_of("formula for", config.model_type, MODELLED, ModelError)
    one_of("method", method, METHODS)
    one_of("attention implementation", attention, ATTENTIONS)
    one_of("optimizer", profile.optimizer, OPTIMIZERS)
    compute, held = profile.dtype.itemsize, stored(config, profile, method)
    kept, backward = Activations(config, profile, method, attention).model()
    logits = 3 * 4 * profile.micro_batch * profile.max_length * config.vocab_size
    largest = compute * max(skeleton(config).tensors["linear"])
    embedding, cast = config.vocab_size * config.hidden_size, held["adapter"] // 4  # elements
    if profile.activation_checkpointing:
        cast = -(-cast // config.num_hidden_layers)
    if method == "full":  # new gradients beside their sums: a layer's, the head's, the embedding's
        new = compute * embedding
        backward += largest + (new if config.tie_word_embeddings else 0)
        backward = max(backward, kept + logits * 2 // 3 + new, kept // 2 + 3 * new)
    if method == "qlora" and compute < 4:
        cast += embedding  # the head, whose copy goes with the logits
        backward -= compute * embedding
    activations, gpu = max(kept, backward - logits), bool(profile.gpu_bytes)
    return MemoryPlan(
        **held,
        activations=activations,
        logits=logits,
        casts=compute * cast if compute < 4 else 0,
        workspace=largest if method == "qlora" else 0,
        context=CUDA_CONTEXT if gpu else 0,
        reserve=int(RESERVE * (activations + logits)) if gpu else 0,
    )


def fits(planned: MemoryPlan, gpu: str) -> bool:
    """Whether a plan fits the card with HEADROOM left; TutorialError for an unknown card."""
    return planned.total <= (1 - HEADROOM) * capacity(gpu)


def largest_batch(
    config: Config, profile: Profile, gpu: str, method: str = "qlora", attention: str = "sdpa"
) -> int:
    """The largest batch of `profile.max_length` tokens each whose plan fits `gpu`, or 0."""

    def too_large(batch: int) -> bool:
        sized = replace(profile, micro_batch=batch)
        return not fits(plan(config, sized, method, attention), gpu)

    return bisect.bisect_left(range(1, 2**20), True, key=too_large)


def gpu_profile(model: str, gpu: str, batch: int, length: int, **changes) -> Profile:
    """A profile to plan with on `gpu`: bfloat16 where the card has it, r = 16 on all linear layers
    of a Falcon, 8-bit paged AdamW, checkpointing; `changes` are fields of Profile."""
    asked = {"name": gpu, "model": model, "revision": None, "gpu_bytes": capacity(gpu)}
    asked |= {"compute_dtype": CARDS[gpu]["dtype"], "micro_batch": batch, "max_length": length}
    return replace(PROFILES["colab-t4"], **asked | changes)


def table(config: Config, profile: Profile, gpu: str, attention: str = "sdpa") -> str:
    """The plan of each method as text, in GB, whether it fits `gpu`, and the largest batch; of a
    family that is not MODELLED only what is held from step to step."""
    columns = [stored(config, profile, method) for method in METHODS]
    last = {"activations": ["not modelled"]}
    if config.model_type in MODELLED:
        plans = [plan(config, profile, method, attention) for method in METHODS]
        columns = [asdict(planned) | {"total": planned.total} for planned in plans]
        last = {f"fits {gpu}": ["yes" if fits(planned, gpu) else "no" for planned in plans]}
        batches = [largest_batch(config, profile, gpu, method, attention) for method in METHODS]
        last["largest batch"] = batches
    rows = {part: [f"{column[part] / 1e9:.3f}" for column in columns] for part in columns[0]}
    rows = {"GB, predicted": METHODS} | rows | last
    return "\n".join(f"{name:<15}" + "".join(f" {x:>8}" for x in row) for name, row in rows.items())


def time_of(gpu: str, examples: int, length: int) -> str:
    """The minutes in which QLoRA of a 7B model learns so many examples, by RATES, as a sentence."""
    if gpu not in RATES:
        return f"time: nobody measured {gpu} here or told it; known: {', '.join(RATES)}"
    rate, tokens = RATES[gpu], examples * length
    minutes = [float(rate[pace]) * examples / 60 for pace in ("fastest", "slowest")]
    if rate["unit"] == "tokens a second":
        minutes = [tokens / 60 / float(rate[pace]) for pace in ("fastest", "slowest")]
    return f"time: {minutes[0]:.1f} to {minutes[1]:.1f} minutes for 7B QLoRA ({rate['source']})"


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `environment.exit_status`."""
    parser = argparse.ArgumentParser("python -m helpers.memory", description="Plan memory.")
    option = parser.add_argument
    option("--model", default=FALCON_7B, help=f"{', '.join(KNOWN_CONFIGS)}, or a config.json")
    option("--gpu", default="T4", help=f"one of {', '.join(GPUS)}; default T4")
    option("--batch", type=whole_number(), default=1, help="examples in a forward pass; default 1")
    option("--length", type=whole_number(2), default=512, help="tokens an example; default 512")
    option("--rank", type=whole_number(), default=16, help="of the adapters; default 16")
    option("--optimizer", choices=OPTIMIZERS, default="paged_adamw_8bit", help="default 8 bits")
    option("--attention", choices=ATTENTIONS, default="sdpa", help="default sdpa")
    option("--examples", type=whole_number(), default=512, help="to learn from; default 512")
    option("--no-checkpointing", action="store_true", help="keep activations, recompute none")
    args = parser.parse_args(arguments)
    changes = {"lora_r": args.rank, "optimizer": args.optimizer}
    changes["activation_checkpointing"] = not args.no_checkpointing

    def work() -> None:
        config = known_config(args.model)
        profile = gpu_profile(args.model, args.gpu, args.batch, args.length, **changes)
        text = table(config, profile, args.gpu, args.attention)
        size = sum(count_parameters(config).values())
        batch = f"batch {args.batch} x {args.length} tokens, {profile.compute_dtype}"
        print(f"{args.model}, {size:,} parameters; {batch}\n{text}")
        print(f"{args.examples} examples, {time_of(args.gpu, args.examples, args.length)}")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
