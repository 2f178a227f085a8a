"""The study of notebook 07: what a run of it is, its model, its training and its scores.
plan.py says which runs there are, build.py makes them; the notebook repeats a few."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

import pandas as pd
import torch
import transformers
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, FalconForCausalLM

from helpers import loading, prompting, records
from helpers.environment import ROOT
from helpers.errors import DataError, NotQuantizedError, TutorialError
from helpers.profiles import ALL_LINEAR, PROFILES

FILE = ROOT / "data" / "study" / "study.csv"
TINY = PROFILES["tiny"]
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 9e-3)  # learning rates
STEPS, BATCH, WARMUP, WINDOW = 300, 8, 20, 128  # WINDOW: tokens of general text read at once
TARGETS = {
    "all": ALL_LINEAR,
    "attention": ("query_key_value", "dense"),
    "mlp": ("dense_h_to_4h", "dense_4h_to_h"),
    "query_key_value": ("query_key_value",),
    "": (),  # full fine-tuning
}
# How to train: what LoraConfig is told; "loraplus" differs in its optimizer.
METHODS = {"full": {}, "lora": {}, "loraplus": {}, "rslora": {"use_rslora": True}}
METHODS |= {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}
FORMATS = ("fp32", "bf16", "nf4+dq", "nf4", "fp4", "int4")
DATA = ("tickets", "text", "skewed-counts", "skewed-labels", "rebalanced")


@dataclass(frozen=True)
class Run:
    """What is trained; DataError for an unknown name. Full fine-tuning: no targets, rank 0."""

    experiment: str
    method: str
    format: str  # of the base; in full fine-tuning of weights, gradients and Adam's moments
    targets: str
    rank: int
    examples: int
    learning_rate: float
    seed: int
    data: str = "tickets"
    steps: int = STEPS

    def __post_init__(self):
        known = {"method": METHODS, "format": FORMATS, "targets": TARGETS, "data": DATA}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise DataError(f"{self} has an unknown {name}: use {', '.join(choices)}")


def read(path=FILE) -> pd.DataFrame:
    """The rows of a study file. Columns: those of `Run`, what was measured, versions."""
    return pd.read_csv(path, converters={"learning_rate": float}).fillna({"targets": ""})


def runs(stored: pd.DataFrame) -> list[Run]:
    """The run of every row."""
    return [Run(**row) for row in stored[list(Run.__annotations__)].to_dict("records")]


def load_format(format: str) -> FalconForCausalLM:
    """The tiny Falcon with linear layers stored as `format`, computing in float32. Its weights are
    bfloat16, and each bfloat16 is a float32: "fp32" and "bf16" are the same base."""
    options = {"dtype": TINY.dtype, "attn_implementation": "sdpa"}
    options["device_map"] = {"": "cpu"}  # else a GPU takes 4-bit models, and the rows stay here
    if format in ("nf4+dq", "nf4", "fp4"):
        options["quantization_config"] = config = loading.quantization_config(TINY)
        config.bnb_4bit_quant_type = format[:3]
        config.bnb_4bit_use_double_quant = format == "nf4+dq"
    transformers.logging.disable_progress_bar()  # it loads in a tenth of a second
    with loading.falcon_made_of_plain_linear():
        model = FalconForCausalLM.from_pretrained(TINY.model_path, **options)
    layers = loading.four_bit_layers(model)
    if len(layers) != ("quantization_config" in options) * 4 * model.config.num_hidden_layers:
        raise NotQuantizedError(f"{len(layers)} layers are 4-bit in {format!r}: repair Falcon")
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False  # see helpers.loading
    for name, layer in model.named_modules():
        if format == "int4" and name.rpartition(".")[2] in ALL_LINEAR:
            blocks = layer.weight.data.view(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True) / 7  # codes -7 to 7
            blocks.copy_((blocks / scale).round() * scale)
    return model


def prepare(run: Run) -> torch.nn.Module:
    """The model of a run, ready to train: all weights, or a frozen base with fresh adapters."""
    model = load_format(run.format)
    if run.method == "full":
        return model.to(torch.bfloat16 if run.format == "bf16" else torch.float32)
    profile = replace(TINY, lora_r=run.rank, lora_alpha=2 * run.rank, lora_dropout=0.0)
    profile = replace(profile, target_modules=TARGETS[run.targets])
    return loading.attach_lora(model, profile, run.seed, **METHODS[run.method])


def training_rows(run: Run) -> list[dict]:
    """The tickets or windows of text that a run learns from, drawn by its seed."""
    if run.data == "text":
        return text_windows("train")
    if run.data != "tickets":
        raise DataError(f"the rows of {run.data!r} are made by data/study/skew.py: pass them on")
    rows, generator = encoded("train"), torch.Generator().manual_seed(run.seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[: run.examples]]


def training_steps(model, rows: Sequence[dict], run: Run) -> Iterator[int]:
    """Train, yielding the number of each step after it; TutorialError if a loss is not finite.
    AdamW, a short warm-up, then cosine decay; gradient norm at most 1."""
    options = {"lr": run.learning_rate, "weight_decay": 0.0}
    if run.method == "loraplus":  # B learns 16 times as fast as A
        adam = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=16, **options)
    else:
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda s: min(1, (s + 1) / WARMUP) * (1 + math.cos(math.pi * s / run.steps)) / 2
    )
    lengths = [len(row["input_ids"]) for row in rows]
    order = prompting.length_grouped_order(lengths, BATCH, run.steps, run.seed)
    collate = DataCollatorForSeq2Seq(tokenizer())
    model.train()
    for step in range(1, run.steps + 1):
        batch = collate([rows[i] for i in order[(step - 1) * BATCH : step * BATCH]])
        loss = F.cross_entropy(*answer_logits(model, batch)[:2])
        if not torch.isfinite(loss):
            raise TutorialError(f"{run}: the loss of step {step} is {loss.item()}: lower its rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
        yield step


def execute(run: Run, rows: Sequence[dict] = (), watch=lambda model, step: {}) -> dict:
    """Train as `run` says; its scores, losses (nats a token), perplexities, processor seconds.
    `rows`: what it learns from, default `training_rows(run)`; `watch` is called after each step and
    returns more columns. On one thread of one machine a run repeats to the last bit."""
    torch.manual_seed(run.seed)
    began = time.process_time()
    row = asdict(run) | {"perplexity_before": text_perplexity(load_format(run.format))}
    model = prepare(run)
    for step in training_steps(model, rows or training_rows(run), run):
        row |= watch(model, step)
    row["perplexity"] = text_perplexity(model)
    for split in ("validation", "test", "test_reworded") if run.data != "text" else ():
        right, row[f"{split}_loss"] = answer_losses(model, encoded(split))
        row[f"{split}_exact"] = sum(right) / len(right)
    return row | {"seconds": round(time.process_time() - began, 1)}


@cache
def tokenizer():
    return loading.load_tokenizer(TINY)


@cache
def encoded(split: str) -> list[dict]:
    """A split of the tickets as `input_ids` and `labels`."""
    return list(prompting.encode(records.read_tickets(split), tokenizer(), TINY.max_length)[0])


@cache
def text_windows(part: str) -> list[dict]:
    """General text that pretraining left out: of five windows three are for "train", two "test"."""
    ids = tokenizer()(records.HELDOUT.read_text(encoding="utf-8"))["input_ids"]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)]
    mine = [w for k, w in enumerate(windows) if (k % 5 < 3) == (part == "train")]
    return [{"input_ids": window, "labels": window} for window in mine]


def answer_logits(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) of the n labelled tokens, their labels, and the mask of their places.
    The head is applied there only, which saves most of its work behind a long message."""
    falcon = model.get_base_model() if isinstance(model, PeftModel) else model
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    hidden = falcon.transformer(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    labels = inputs["labels"][:, 1:]
    learned = labels != prompting.IGNORED
    return falcon.lm_head(hidden[:, :-1][learned]).float(), labels[learned], learned


@torch.inference_mode()
def answer_losses(model, rows: Sequence[dict], batch: int = 50) -> tuple[list[bool], float]:
    """Whether greedy decoding would give each row's answer, and the mean loss in nats a token. It
    would if and only if each token of the answer is the most likely one after those before it."""
    was_training, collate = model.training, DataCollatorForSeq2Seq(tokenizer())
    model.eval()
    right, total, count = {}, 0.0, 0
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(rows), batch):
        chosen = by_length[start : start + batch]
        logits, labels, learned = answer_logits(model, collate([rows[i] for i in chosen]))
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
        wrong = set(learned.nonzero()[:, 0][logits.argmax(-1) != labels].tolist())
        right |= {i: k not in wrong for k, i in enumerate(chosen)}
    model.train(was_training)
    return [right[i] for i in range(len(rows))], total / count


def text_perplexity(model) -> float:
    """exp of the mean loss (nats a token) on the scoring windows of the general text."""
    return math.exp(answer_losses(model, text_windows("test"))[1])


@cache
def t_quantile(degrees: int) -> float:
    """97.5% quantile of Student's t distribution, its density integrated from 0."""
    x = torch.linspace(0, 100, 1_000_001, dtype=torch.float64)
    student = torch.distributions.StudentT(torch.tensor(degrees, dtype=torch.float64))
    area = torch.cumulative_trapezoid(student.log_prob(x).exp(), x)
    return x[1 + torch.searchsorted(area, 0.475)].item()


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values, and half the width of its 95% interval by Student's t."""
    values = torch.tensor(list(values), dtype=torch.float64)
    if len(values) < 2:
        raise DataError(f"an interval needs 2 values and has {len(values)}: run more seeds")
    half = t_quantile(len(values) - 1) * values.std() / len(values) ** 0.5
    return values.mean().item(), half.item()
