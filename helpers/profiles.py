"""Hardware profiles: all that differs between a laptop, a free T4 and a big GPU, in one place."""

import math
import os
from dataclasses import dataclass, replace

import torch

from helpers.environment import ROOT
from helpers.errors import TutorialError

FALCON_7B = "tiiuae/falcon-7b"
FALCON_7B_REVISION = "ec89142b67d748a1865ea4451372db8313ada0d8"
# The four linear kinds of a Falcon layer
ALL_LINEAR = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
DTYPES = ("bfloat16", "float16", "float32")
AT_LEAST = {"max_length": 2, "warmup_steps": 0} | dict.fromkeys(  # what settings have to be
    (
        "micro_batch",
        "accumulation",
        "max_steps",
        "save_steps",
        "eval_batch",
        "max_new_tokens",
        "lora_r",
    ),
    1,
)


@dataclass(frozen=True)
class Profile:
    """One way to run the series; lengths in tokens, batches in examples. TutorialError for settings
    that cannot be trained with."""

    name: str
    model: str  # hub id, or a folder of this repository
    revision: str | None  # a commit of the hub repository; None for a folder
    gpu_bytes: int  # memory of the smallest card this profile is meant for; 0 for a CPU
    compute_dtype: str  # what 4-bit weights are dequantized to: bfloat16 where the card has it
    max_length: int
    micro_batch: int
    accumulation: int
    max_steps: int
    learning_rate: float
    save_steps: int
    eval_batch: int
    max_new_tokens: int = 48
    warmup_steps: int = 20
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    weight_decay: float = 0.0
    target_modules: tuple[str, ...] = ALL_LINEAR
    optimizer: str = "paged_adamw_8bit"
    activation_checkpointing: bool = True

    def __post_init__(self):
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                self._refuse(name, f"a whole number of at least {least}")
        for name in ("learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                self._refuse(name, "a finite number above 0")
        if self.compute_dtype not in DTYPES:
            self._refuse("compute_dtype", f"one of {', '.join(DTYPES)}")
        if not self.target_modules:
            self._refuse("target_modules", "at least one kind of linear layer")

    def _refuse(self, name: str, wanted: str) -> None:
        value = getattr(self, name)
        raise TutorialError(f"{name} of profile {self.name!r} is {value!r}: give {wanted}")

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_bytes else "cpu"

    @property
    def model_path(self) -> str:
        """What `from_pretrained` takes: a model of this repository by its absolute folder."""
        folder = ROOT / self.model
        return str(folder) if folder.is_dir() else self.model


_TINY = Profile(
    name="tiny",
    model="data/tiny-falcon",
    revision=None,
    gpu_bytes=0,
    compute_dtype="float32",
    max_length=128,
    micro_batch=16,
    accumulation=1,
    max_steps=300,
    learning_rate=2e-3,
    save_steps=100,
    eval_batch=100,
    activation_checkpointing=False,
)
_T4 = Profile(
    name="colab-t4",
    model=FALCON_7B,
    revision=FALCON_7B_REVISION,
    gpu_bytes=15 * 10**9,
    compute_dtype="float16",
    max_length=256,
    micro_batch=4,
    accumulation=4,
    max_steps=32,
    learning_rate=2e-4,
    save_steps=8,
    eval_batch=64,
    warmup_steps=5,
)
_L4 = replace(
    _T4,
    name="colab-l4",
    gpu_bytes=23 * 10**9,
    compute_dtype="bfloat16",
    max_length=512,
    micro_batch=8,
    accumulation=2,
    eval_batch=64,
)
_A100 = replace(
    _L4, name="colab-a100", gpu_bytes=40 * 10**9, micro_batch=16, accumulation=1, eval_batch=64
)
_CPU = replace(  # for the rehearsal at full size, data/rehearsal
    _T4,
    name="cpu-7b",
    gpu_bytes=0,
    compute_dtype="bfloat16",
    max_length=64,
    micro_batch=1,
    accumulation=1,
    max_steps=4,
    save_steps=2,
    eval_batch=1,
    max_new_tokens=8,
)
PROFILES = {profile.name: profile for profile in (_TINY, _CPU, _T4, _L4, _A100)}


def problem(profile: Profile) -> str | None:
    """Why the first GPU cannot run a GPU profile, in a clause; None if it can."""
    if not torch.cuda.is_available():
        return "needs a GPU and none was found (in Colab: Runtime > Change runtime type > T4)"
    card = torch.cuda.get_device_properties(0)
    if card.total_memory < 0.93 * profile.gpu_bytes:
        needs, has = profile.gpu_bytes / 1e9, card.total_memory / 1e9
        return f"is made for a card of {needs:.0f} GB and {card.name} has {has:.1f} GB"
    if profile.compute_dtype == "bfloat16" and card.major < 8:  # it came with Ampere
        return f"computes in bfloat16, which {card.name} does not have"
    return None


def detect() -> str:
    """The largest GPU profile that the first card can run, else `tiny`."""
    return next((p.name for p in (_A100, _L4, _T4) if not problem(p)), "tiny")


def resolve(name: str | None = None) -> Profile:
    """The profile called `name`, else the one in QLORA_PROFILE; "auto", the default, asks the
    hardware.

    TutorialError for an unknown name, and for a GPU profile that the hardware cannot run."""
    name = name or os.environ.get("QLORA_PROFILE") or "auto"
    name = detect() if name == "auto" else name
    if name not in PROFILES:
        raise TutorialError(
            f"there is no profile {name!r}: choose auto or one of {', '.join(PROFILES)}"
        )
    profile = PROFILES[name]
    if profile.gpu_bytes and (reason := problem(profile)):
        raise TutorialError(f"profile {name!r} {reason}: use profile {detect()!r}")
    return profile
