"""Judges of the exercises of notebook 06. Imports judging and errors."""

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from helpers.errors import AdapterError
from helpers.exercises.judging import as_mapping, as_number, call, exercise, expect, judge_error, judge_tensor


@exercise("06.1")
def drift_of_a_merge(answer: object) -> str:
    """The largest change of a weight after merging and unmerging in float32."""
    expect(not isinstance(answer, bool), "that is a yes or no: give the largest change, a number")
    drift = as_number(answer, "the largest change")
    expect(drift >= 0, "the largest change is negative: take magnitudes")
    expect(drift > 0, "nothing changed at all: were the weights cloned before the merge, and was anything merged?")
    rounding = torch.finfo(torch.float32).eps * 100  # of weights and updates below some tens
    expect(drift < rounding, "that is no rounding, it is the update itself: was it taken out again, and from the same copy?")
    return "not the same bits, since a sum that is rounded cannot be taken back exactly"


@exercise("06.2")
def rank_that_is_needed(answer: object) -> str:
    """{4: share of exact tickets with the update cut to rank 4, 1: the same for rank 1}."""
    shares = as_mapping(answer, (4, 1), "the share of exact tickets for the ranks 4 and 1")
    four, one = (as_number(share, f"the share at rank {rank}") for rank, share in shares.items())
    expect(min(four, one) >= 0 and max(four, one) <= 1, "a share lies between 0 and 1, not 100")
    expect(four != one, "both ranks score the same: with a single adapter `svd` is replaced by `linear`, and nothing is cut")
    expect(four > one, "the smaller rank scores better: have the two changed places?")
    expect(four > 0.5, "at rank 4 too much is lost: was the cut adapter set, and divided by `svd_scale`?")
    expect(one < 0.5, "at rank 1 too much is left: look at the rank in `model.peft_config`")
    return "a few directions carry the task, one does not"


@exercise("06.3")
def misspelt_adapter(answer: object) -> str:
    """The error that a mixed batch with an unknown name raises."""
    judge_error(
        answer,
        AdapterError,
        "there is no adapter",
        nothing="is the name one that the model does not have?",
        foreign="call adapters.generate_mixed",
        other="not an unknown name; read its sentence",
    )
    return "unchecked, the row would have gone to the bare base without a word"


@exercise("06.4")
def temperature_and_top_p(answer: object) -> str:
    """A function: probabilities of the next token after temperature and top-p, held against transformers."""
    for seed, T, p in ((0, 1.0, 0.9), (1, 2.0, 0.6), (2, 0.5, 0.8), (3, 1.0, 1.0)):
        logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
        warped = TemperatureLogitsWarper(T)(None, logits[None])
        truth = (TopPLogitsWarper(p)(None, warped) if p < 1 else warped).softmax(-1)[0]
        plain, kept = warped.softmax(-1)[0], truth > 0
        found = call(answer, logits, T, p)
        order = plain.argsort(descending=True)
        short = torch.zeros(12, dtype=torch.bool)
        short[order[: int(kept.sum()) - 1]] = True
        mistakes = [
            (plain * kept, "what is left does not add up to one: divide by its sum"),
            (plain, "no token was left out: `p` has no effect"),
            (
                plain * short / (plain * short).sum().clamp(min=1e-9),
                "one token too few is left: the one that reaches the share stays",
            ),
            ((logits * T).softmax(-1), "the logits are multiplied by the temperature: divide"),
            (logits.softmax(-1), "the temperature has no effect"),
        ]
        if p < 1:
            for wrong, hint in (
                (logits * T, "the logits are multiplied by the temperature: divide"),
                (logits, "the temperature has no effect"),
            ):
                mistakes.append((TopPLogitsWarper(p)(None, wrong[None]).softmax(-1)[0], hint))
        judge_tensor(found, truth, "the row of probabilities", mistakes)
    return "these are the probabilities that `generate` draws from"
