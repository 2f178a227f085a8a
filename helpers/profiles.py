"""Hardware profiles: everything that differs between a laptop, a free T4 and a big GPU, in one place. Imports only errors."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers.errors import ProfileError

ROOT = Path(__file__).resolve().parent.parent
FALCON_7B = "tiiuae/falcon-7b"
FALCON_7B_REVISION = "ec89142b67d748a1865ea4451372db8313ada0d8"
ALL_LINEAR = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the four linear kinds of a Falcon layer
DTYPES = ("bfloat16", "float16", "float32")
GIB = 2**30


@dataclass(frozen=True)
class Profile:
    """One way to run the series. Lengths are in tokens, batches in examples, `gpu_bytes` is 0 for a CPU profile."""

    name: str
    model: str  # hub id, or a folder of this repository
    revision: str | None  # a commit of the hub repository; None for a folder
    gpu_bytes: int  # memory of the smallest card this profile is meant for
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
    target_modules: tuple[str, ...] = ALL_LINEAR
    optimizer: str = "paged_adamw_8bit"
    activation_checkpointing: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_bytes else "cpu"

    @property
    def model_path(self) -> str:
        """What `from_pretrained` takes: an absolute folder for a model of this repository, else the hub id."""
        folder = ROOT / self.model
        return str(folder) if folder.is_dir() else self.model


_7B = dict(model=FALCON_7B, revision=FALCON_7B_REVISION, max_steps=300, learning_rate=2e-4, save_steps=25)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "tiny", "data/tiny-falcon", None, gpu_bytes=0, compute_dtype="float32", max_length=128, micro_batch=16, accumulation=1,
            max_steps=600, learning_rate=2e-3, save_steps=100, eval_batch=100, activation_checkpointing=False,
        ),
        Profile("cpu-7b", **_7B | {"max_steps": 4, "save_steps": 2}, gpu_bytes=0, compute_dtype="bfloat16", max_length=64, micro_batch=1, accumulation=1, eval_batch=1, max_new_tokens=8),
        Profile("colab-t4", **_7B, gpu_bytes=15 * 10**9, compute_dtype="float16", max_length=256, micro_batch=4, accumulation=4, eval_batch=16),
        Profile("colab-l4", **_7B, gpu_bytes=23 * 10**9, compute_dtype="bfloat16", max_length=512, micro_batch=8, accumulation=2, eval_batch=32),
        Profile("colab-a100", **_7B, gpu_bytes=40 * 10**9, compute_dtype="bfloat16", max_length=512, micro_batch=16, accumulation=1, eval_batch=64),
    )
}  # fmt: skip


def detect() -> str:
    """The name of the profile that suits the hardware found: the largest GPU profile that the first card can run, else `tiny`."""
    if not torch.cuda.is_available():
        return "tiny"
    card = torch.cuda.get_device_properties(0)
    for name in ("colab-a100", "colab-l4", "colab-t4"):
        profile = PROFILES[name]
        has_dtype = profile.compute_dtype != "bfloat16" or card.major >= 8  # bfloat16 arithmetic came with Ampere
        if has_dtype and card.total_memory >= 0.93 * profile.gpu_bytes:
            return name
    return "tiny"


def resolve(name: str | None = None) -> Profile:
    """The profile called `name`; without a name the one in QLORA_PROFILE; "auto" (the default) asks the hardware.

    Raises ProfileError for an unknown name, and for a GPU profile on a machine whose card is missing, too small or without its dtype.
    """
    name = name or os.environ.get("QLORA_PROFILE") or "auto"
    if name == "auto":
        name = detect()
    if name not in PROFILES:
        raise ProfileError(f"there is no profile {name!r}: choose auto or one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if profile.gpu_bytes:
        check_card(profile)
    return profile


def check_settings(profile: Profile) -> None:
    """ProfileError, with the setting, its value and what it may be, unless every setting of a profile can be trained with."""
    least = dict.fromkeys(("micro_batch", "accumulation", "max_steps", "save_steps", "eval_batch", "max_new_tokens", "lora_r"), 1)
    for name, smallest in (least | {"max_length": 2, "warmup_steps": 0}).items():
        value = getattr(profile, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise ProfileError(f"{name} of profile {profile.name!r} is {value!r}: give a whole number of at least {smallest}")
    for name in ("learning_rate", "lora_alpha"):
        value = getattr(profile, name)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ProfileError(f"{name} of profile {profile.name!r} is {value!r}: give a finite number above 0")
    if profile.compute_dtype not in DTYPES:
        raise ProfileError(
            f"compute_dtype of profile {profile.name!r} is {profile.compute_dtype!r}: give one of {', '.join(DTYPES)}"
        )
    if not profile.target_modules or set(profile.target_modules) - set(ALL_LINEAR):
        raise ProfileError(
            f"target_modules of profile {profile.name!r} are {profile.target_modules!r}: give at least one of {', '.join(ALL_LINEAR)}"
        )


def check_card(profile: Profile) -> None:
    """ProfileError unless the first GPU has the memory and the compute dtype that `profile` was made for."""
    if not torch.cuda.is_available():
        raise ProfileError(
            f"profile {profile.name!r} needs a GPU and none was found: use profile 'tiny', or in Colab choose Runtime > Change runtime type > T4"
        )
    card = torch.cuda.get_device_properties(0)
    if card.total_memory < 0.93 * profile.gpu_bytes:
        raise ProfileError(
            f"profile {profile.name!r} is made for a card of {profile.gpu_bytes / 1e9:.0f} GB and {card.name} has {card.total_memory / 1e9:.1f} GB: use profile {detect()!r}"
        )
    if profile.compute_dtype == "bfloat16" and card.major < 8:
        raise ProfileError(
            f"profile {profile.name!r} computes in bfloat16, which {card.name} does not have: use profile {detect()!r}"
        )
