"""Means with their 95% intervals. Imports errors."""

from collections.abc import Sequence
from functools import cache

import torch

from helpers.errors import DataError


@cache
def t_quantile(degrees: int, p: float = 0.975) -> float:
    """Quantile of Student's t distribution, its density integrated from 0 (p >= 0.5); 2.776 for 4 degrees of freedom."""
    x = torch.linspace(0, 100, 1_000_001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(float(degrees), dtype=torch.float64)).log_prob(x).exp()
    above_zero = torch.cumulative_trapezoid(density, x)
    return x[1 + torch.searchsorted(above_zero, p - 0.5)].item()


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values, and half the width of its 95% interval by Student's t."""
    values = torch.tensor(list(values), dtype=torch.float64)
    if len(values) < 2:
        raise DataError(f"an interval needs at least 2 values and {len(values)} were given: run more seeds")
    return values.mean().item(), t_quantile(len(values) - 1) * values.std().item() / len(values) ** 0.5
