"""Hardware profiles: all that differs between a laptop, a free T4 and a big GPU, in one place."""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace

import torch

from helpers.environment import ROOT
from helpers.errors import TutorialError

FALCON_7B = "tiiuae/falcon-7b"
FALCON_7B_REVISION = "ec89142b67d748a1865ea4451372db8313ada0d8"
ALL_LINEAR = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # of a Falcon layer
DTYPES = ("bfloat16", "float16", "float32")
MAY_BE_ZERO = ("gpu_bytes", "warmup_steps")  # all other whole numbers are at least 1


@dataclass(frozen=True)
class Profile:
    """One way to run the series, in tokens and examples. TutorialError for a value of no use."""

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
        rules = {}  # of the fields that break theirs
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in MAY_BE_ZERO else 1
            if field.type is int and (not isinstance(value, int) or value < least):
                rules[field.name] = f"a whole number of at least {least}"
        if not 0 < self.learning_rate < math.inf:
            rules["learning_rate"] = "a finite number above 0"
        if self.compute_dtype not in DTYPES:
            rules["compute_dtype"] = f"one of {', '.join(DTYPES)}"
        if rules:
            wrong = [f"{name} is {getattr(self, name)!r}, give {rules[name]}" for name in rules]
            raise TutorialError(f"profile {self.name!r}: {'; '.join(wrong)}")

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_bytes else "cpu"

    @property
    def model_path(self) -> str:
        """What `from_pretrained` takes: a model of this repository by its absolute folder."""
        folder = ROOT / os.path.expanduser(self.model)
        return str(folder) if folder.is_dir() else self.model

    def settings(self, seed: int) -> dict:
        """What decides an adapter beside data and versions, as JSON reads it back."""
        decides = replace(self, max_new_tokens=1, eval_batch=1)  # these two do not: always 1
        return json.loads(json.dumps(asdict(decides) | {"seed": seed}))

    @property
    def step(self) -> str:
        """What a step takes, and what the next larger card would allow."""
        each = "{0.accumulation} x {0.micro_batch} examples of at most {0.max_length} tokens".format
        larger = [p for p in (_T4, _L4, _A100) if p.micro_batch > self.micro_batch]
        more = [f"a card of {p.gpu_bytes / 1e9:.0f} GB takes {each(p)}" for p in larger[:1]]
        return "; ".join([each(self), *more])


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
    learning_rate=5e-4,  # the lowest tried that solves validation: 2.5e-4 has .988 of it
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
_L4 = replace(_T4, name="colab-l4", gpu_bytes=23 * 10**9, compute_dtype="bfloat16")
_L4 = replace(_L4, max_length=512, micro_batch=8, accumulation=2, eval_batch=32)  # 64: no room
_A100 = replace(_L4, name="colab-a100", gpu_bytes=40 * 10**9, micro_batch=16)
_A100 = replace(_A100, accumulation=1, eval_batch=64)
PROFILES = {profile.name: profile for profile in (_TINY, _T4, _L4, _A100)}


def fitted(profile: Profile) -> Profile:
    """A GPU profile as the first card holds it by plan: bfloat16 where the card has it, fewer of a
    step's examples at a time where need be. TutorialError if not one fits, or there is no GPU."""
    from helpers import memory  # which is built on this module

    named, way_out = f"profile {profile.name!r}", "use profile 'tiny'"
    if not torch.cuda.is_available():
        way_out += ", or in Colab: Runtime > Change runtime type > T4"
        raise TutorialError(f"{named} needs a GPU and none was found: {way_out}")
    card = torch.cuda.get_device_properties(0)
    built = re.findall(r"\bsm_(\d+)", " ".join(torch.cuda.get_arch_list()))
    oldest = min(map(int, built), default=0)
    if 10 * card.major + card.minor < oldest:
        raise TutorialError(f"this torch has no code for {card.name}, an older card: {way_out}")
    dtype = "bfloat16" if card.major >= 8 else "float16"  # Ampere and later have it
    share = min(1, card.total_memory / profile.gpu_bytes) ** 2  # of answers, which no plan counts
    profile = replace(profile, compute_dtype=dtype, eval_batch=int(share * profile.eval_batch) or 1)
    if profile.model != FALCON_7B:  # no config is here: who fetches it plans, as notebook 05 does
        return profile
    config, batch = memory.known_config(profile.model), profile.micro_batch * profile.accumulation
    for size in (n for n in range(profile.micro_batch, 0, -1) if batch % n == 0):
        sized = replace(profile, micro_batch=size, accumulation=batch // size)
        needs = memory.plan(config, sized).total
        if needs <= (1 - memory.HEADROOM) * card.total_memory:
            return sized
    needs, has = needs / 1e9, card.total_memory / 1e9
    raise TutorialError(f"{named} needs {needs:.1f} GB and {card.name} has {has:.1f}: {way_out}")


def detect(model: str = FALCON_7B) -> Profile:
    """The largest GPU profile for the first card's memory, else the smallest that fits, or tiny."""
    if not torch.cuda.is_available():
        return _TINY
    room = torch.cuda.get_device_properties(0).total_memory
    large = (profile for profile in (_A100, _L4) if room >= 0.93 * profile.gpu_bytes)
    try:
        return fitted(replace(next(large, _T4), model=model))
    except TutorialError:
        return _TINY


def resolve(name: str | None = None, model: str = FALCON_7B) -> Profile:
    """The profile called `name`, or for "auto" and None the one in QLORA_PROFILE, else that of the
    hardware. TutorialError for an unknown name, and for one that does not fit the first card."""
    if name in (None, "", "auto"):
        name = os.environ.get("QLORA_PROFILE") or "auto"
    if name == "auto":
        return detect(model)
    if name not in PROFILES:
        raise TutorialError(f"there is no profile {name!r}: choose auto or {', '.join(PROFILES)}")
    profile = PROFILES[name]
    return fitted(replace(profile, model=model)) if profile.gpu_bytes else profile
