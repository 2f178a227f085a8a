"""What a run of the study can be. Imports profiles."""

from dataclasses import dataclass

from helpers import profiles

STEPS, BATCH, WARMUP = 300, 8, 20
BIAS_STEPS = 600  # what a group of products has in common is learnt later than the tickets, in as sudden a phase
TEXT_STEPS = 60  # of runs on general text: about two and a half passes over it
TARGETS = {
    "all": profiles.ALL_LINEAR,
    "attention": ("query_key_value", "dense"),
    "mlp": ("dense_h_to_4h", "dense_4h_to_h"),
    "query_key_value": ("query_key_value",),
}
# What peft's LoraConfig is told for each way of training; "full" has no adapters, "loraplus" differs in its optimizer.
METHODS = {
    "full": {},
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "loraplus": {},
}
FORMATS = ("fp32", "bf16", "nf4+dq", "nf4", "fp4", "int4")
DATA = ("tickets", "skewed-counts", "skewed-labels", "rebalanced", "text")


@dataclass(frozen=True)
class Run:
    """What is trained: `method` (METHODS) on a base stored as `format` (FORMATS), adapters of `rank` on `targets`, `examples` of `data`.

    Full fine-tuning has no targets and rank 0; there `format` is what weights, gradients and Adam's moments are kept in.
    """

    experiment: str
    method: str
    format: str
    targets: str
    rank: int
    examples: int
    learning_rate: float
    seed: int
    data: str = "tickets"
