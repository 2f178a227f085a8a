"""Judges of the exercises of notebook 08. Imports judging, memory, processes, profiles and scaling."""

from dataclasses import asdict

import torch

from helpers import memory, processes, scaling
from helpers.errors import LaunchError
from helpers.exercises.judging import as_mapping, as_tuple, as_whole_number, call, exercise, expect, judge_tensor
from helpers.profiles import FALCON_7B, PROFILES


@exercise("08.1")
def shares_of_a_batch(answer: object) -> str:
    """{processes: (accumulation, micro batch) of each, or None where it does not come out even} for a batch of 4 x 4."""
    sizes = (2, 3, 4, 8)
    shares = as_mapping(
        answer, sizes, "for 2, 3, 4 and 8 processes (accumulation, micro batch), or None where that is impossible"
    )
    profile = PROFILES["colab-t4"]
    for size in sizes:
        try:
            shared = processes.share(profile, size)
            truth = shared.accumulation, shared.micro_batch
        except LaunchError:
            truth = None
        mine = shares[size]
        expect(truth is not None or mine is None, f"{size} processes cannot share this batch evenly, and yours get a share")
        expect((mine is None) == (truth is None), f"{size} processes can share this batch evenly, and yours get nothing")
        if truth is None:
            continue
        mine = as_tuple(mine, 2, f"a pair for {size} processes: accumulation, then micro batch")
        examples = size * mine[0] * mine[1]
        expect(
            examples == profile.accumulation * profile.micro_batch,
            f"{size} processes with that share make another batch than before",
        )
        expect(
            mine != truth[::-1] or mine == truth,
            f"for {size} processes the two have changed places, or the micro batch was shared first",
        )
        expect(mine == truth, f"for {size} processes the micro batch was cut while accumulation was left: share that first")
    return "accumulation goes first, since it costs time and gives back no memory"


@exercise("08.2")
def heaviest_parts(answer: object) -> str:
    """The three parts of the plan that weigh most on each of eight cards, heaviest first."""
    parts = as_tuple(answer, 3, "the names of the three heaviest parts")
    expect(all(isinstance(part, str) for part in parts), "give the names of the parts, not their bytes")
    config, profile = memory.known_config(FALCON_7B), memory.gpu_profile(FALCON_7B, "A100-80GB", 1, 512)
    one, eight = (asdict(scaling.card_plan(config, profile, "qlora", cards, "fsdp")) for cards in (1, 8))
    unknown = [part for part in parts if part not in eight]
    expect(not unknown, f"the plan has no part {', '.join(map(repr, unknown))}: its parts are {', '.join(sorted(eight))}")
    truth, alone, least = (tuple(sorted(plan, key=key, reverse=True)[:3]) for plan, key in ((eight, eight.get), (one, one.get), (eight, lambda k: -eight[k])))  # fmt: skip
    expect(set(parts) != set(alone), "those weigh most on one card: look at the plan for eight")
    expect(set(parts) != set(least), "those weigh least: sort the other way round")
    expect(
        set(parts) == set(truth),
        "not all three are among the heaviest: compare the parts of the plan for eight cards by their bytes",
    )
    expect(parts == truth, "the right three, in another order: the heaviest comes first")
    return "none of them is a share of the weights: they are what every card needs whole"


@exercise("08.3")
def cards_for_a_deadline(answer: object) -> str:
    """(fewest cards for three hours, fewest for one) at 1,500 tokens a second, 20,000 x 400 tokens, two epochs, efficiency 0.85."""
    three, one = (
        as_whole_number(part, "the number of cards") for part in as_tuple(answer, 2, "the cards for three hours and for one")
    )

    def fewest(limit: float, epochs: int = 2, efficiency: float = 0.85, alone: float = 1.0) -> int:
        work = 20_000 * 400 * epochs
        return next(n for n in range(1, 99) if scaling.hours(work, 1500, n, efficiency if n > 1 else alone) <= limit)

    truth = fewest(3), fewest(1)
    usual = {
        (fewest(3, alone=0.85), fewest(1)): "one card has no other to wait for: it works at its full rate",
        (fewest(3, efficiency=1.0), fewest(1, efficiency=1.0)): "the efficiency is forgotten: several cards do not add up fully",
        (fewest(3, epochs=1), fewest(1, epochs=1)): "that is one epoch: two are asked for",
        truth[::-1]: "the two have changed places: three hours come first",
    }
    if (three, one) == truth:
        return "measure the rate and the efficiency first; the rest is a division"
    expect((three, one) not in usual, usual.get((three, one), ""))
    expect(
        three == truth[0],
        f"for three hours that is {'more than needed' if three > truth[0] else 'too few'}: compute the hours of one card",
    )
    raise_hint = "more than needed" if one > truth[1] else "too few"
    expect(False, f"for one hour that is {raise_hint}: divide by the efficiency as well, and round up")
    return ""


@exercise("08.4")
def whole_gradient(answer: object) -> str:
    """A function that makes the gradient of the whole batch out of each process's mean gradient and its token count."""
    generator = torch.Generator().manual_seed(0)
    tokens = [120, 30, 50]
    gradients = [torch.randn(6, generator=generator) for _ in tokens]
    truth = sum(n * g for n, g in zip(tokens, gradients, strict=True)) / sum(tokens)
    mistakes = [
        (sum(gradients) / 3, "that is the mean of the means: a process with more tokens must count for more"),
        (sum(gradients), "that is the plain sum: each was divided by its own count already"),
        (truth * sum(tokens), "that is the gradient of the sum: divide by the tokens of all processes together"),
        (truth * sum(tokens) / 3, "divide by the number of tokens, not of processes"),
        (sum(g / n for n, g in zip(tokens, gradients, strict=True)), "each is divided by its count a second time: multiply"),
        (truth / 3, "the weights add up to less than one: the tokens have been divided, there is no mean left to take"),
    ]
    found = call(answer, gradients, tokens)
    judge_tensor(found, truth, "the gradient", mistakes)
    return "this is what Trainer does when it divides by the common count"
