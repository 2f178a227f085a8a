"""Memory plans for several cards, and what a run costs in hours. Imports memory, profiles and errors.

Nothing here has been measured on several cards; what a process holds under FSDP is measured on the CPU in notebook 08.
"""

from dataclasses import replace

from transformers import FalconConfig

from helpers import memory
from helpers.errors import PlanError
from helpers.memory import MemoryPlan
from helpers.profiles import Profile

STRATEGIES = ("ddp", "fsdp")


def card_plan(config: FalconConfig, profile: Profile, method: str, cards: int, strategy: str) -> MemoryPlan:
    """What each of `cards` cards will hold, in bytes, with `profile.micro_batch` examples on every one of them.

    "ddp": the whole model on each card, and a second copy of the gradients, the buckets that are summed over cards. "fsdp": parameters,
    gradients and optimizer state in equal parts; the quantization constants, which are no parameters, whole on each; and, under `workspace`,
    what is gathered at a time: embedding and head, the layer at work and the next one. 8-bit optimizers do not know sharded parameters, so
    FSDP is planned with torch's AdamW. Raises PlanError for an unknown strategy or fewer than one card, and what `memory.plan` raises.
    """
    if strategy not in STRATEGIES:
        raise PlanError(f"there is no strategy {strategy!r} in this planner: choose one of {', '.join(STRATEGIES)}")
    if not isinstance(cards, int) or cards < 1:
        raise PlanError(f"{cards!r} cards cannot be planned for: give a whole number of at least 1")
    if cards == 1:
        return memory.plan(config, profile, method)
    if strategy == "ddp":
        whole = memory.plan(config, profile, method)
        return replace(whole, gradients=2 * whole.gradients)
    whole = memory.plan(config, replace(profile, optimizer="adamw_torch"), method)
    rest = whole.rest - memory.buffer_bytes(config)
    layers, width = config.num_hidden_layers, rest // memory.rest_parameters(config)
    root = width * (memory.count_parameters(config)["embedding"] + 2 * config.hidden_size)
    layer = (whole.weights + whole.adapter + rest - root) // layers
    whole_gradient = max(root, whole.gradients // layers) if method == "full" else whole.gradients // layers

    def part(size: int) -> int:
        return -(-size // cards)

    return replace(
        whole,
        weights=part(whole.weights),
        rest=part(rest) + memory.buffer_bytes(config),
        adapter=part(whole.adapter),
        gradients=part(whole.gradients) + whole_gradient,
        optimizer=part(whole.optimizer),
        workspace=whole.workspace + root + 2 * layer,
    )


def cards_needed(
    config: FalconConfig, profile: Profile, method: str, gpu: str, strategy: str = "fsdp", most: int = 8
) -> int | None:
    """The fewest cards of 1, 2, 4, ... up to `most` on which the plan fits `gpu`; None if it fits none of them."""
    cards = 1
    while cards <= most:
        if memory.fits(card_plan(config, profile, method, cards, strategy), gpu):
            return cards
        cards *= 2
    return None


def hours(tokens: float, tokens_per_second: float, cards: int = 1, efficiency: float = 1.0) -> float:
    """Hours for `tokens` (examples x tokens each x epochs) at a measured rate of one card; `efficiency` is what each of several keeps of it."""
    for what, value in (("tokens", tokens), ("tokens a second", tokens_per_second), ("cards", cards), ("efficiency", efficiency)):
        if not value > 0:
            raise PlanError(f"{what} of {value!r} give no time: give a number above 0")
    return tokens / (tokens_per_second * cards * efficiency) / 3600
