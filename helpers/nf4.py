"""NF4 and double quantization by hand, byte for byte what bitsandbytes' CPU library computes.

Notebook 02 derives each step; this version also takes odd sizes and refuses NaN and infinity.
Source: QLoRA (arXiv 2305.14314), section 3 and appendix E."""

from math import prod
from statistics import NormalDist

import torch
from torch.nn.functional import pad


def _nf4_codebook(p_max: float = 0.9677083) -> torch.Tensor:
    """16 sorted values in [-1, 1], float32: quantiles of N(0, 1), 7 below zero, zero, 8 above."""
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(p_max, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(p_max, 0.5, 8)[:-1].tolist()]
    return torch.tensor(sorted([*negative, 0.0, *positive])) / positive[0]


def _dynamic_map() -> torch.Tensor:
    """256 sorted values in (-1, 1], float32: seven decades, each with twice as many steps."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


NF4_CODEBOOK, DYNAMIC_MAP = _nf4_codebook(), _dynamic_map()


def quantize_nf4(w: torch.Tensor, block_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4 codes of `w`, two a byte (the first in the high half), and the absmax of each block.
    Flat, uint8 and float32. Whole blocks are multiplied by 1 / absmax, an incomplete last block is
    divided, absmax counts as 1e-38 or more: that decides ties. ValueError if `w` is not finite."""
    flat, n = w.detach().reshape(-1).float(), w.numel()
    if not flat.isfinite().all():
        at = flat.isfinite().int().argmin().item()
        raise ValueError(f"w has a {flat[at].item()} at flat index {at}: repair the weights first")
    blocks = pad(flat, (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()[:n]
    if rest := n % block_size:
        absmax[-1] = absmax[-1].clamp(min=1e-38)
        scaled[-rest:] = flat[-rest:] / absmax[-1]
    codebook = NF4_CODEBOOK.to(w.device)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    codes = torch.bucketize(pad(scaled, (0, n % 2)), midpoints).to(torch.uint8).view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], absmax


def dequantize_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, shape, dtype: torch.dtype, block_size: int = 64
) -> torch.Tensor:
    """The weights that `quantize_nf4` stored: codebook value times absmax in float32, then cast."""
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: prod(shape)].int()
    scale = absmax.repeat_interleave(block_size)[: prod(shape)]
    return (NF4_CODEBOOK.to(packed.device)[codes] * scale).to(dtype).view(shape)


def double_quantize(absmax: torch.Tensor, block_size: int = 256) -> tuple[torch.Tensor, ...]:
    """uint8 codes (n,) of `absmax` less its mean, the float32 absmax of each block of them, and the
    mean. ValueError if that is not finite."""
    n, code_map, offset = absmax.numel(), DYNAMIC_MAP.to(absmax.device), absmax.mean()
    if not offset.isfinite():
        raise ValueError(f"the mean of absmax is {offset.item()}: scale the weights down first")
    blocks = pad(absmax.reshape(-1) - offset, (0, -n % block_size)).view(-1, block_size)
    absmax2 = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax2)[:, None]).nan_to_num(-1.0).clamp(-1, 1)  # zeros count as -1
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).int()  # bitsandbytes looks codes up in 65,536 steps
    codes = torch.bucketize(-1 + 2 * step / 65535, (code_map[:-1] + code_map[1:]) / 2)
    return codes.flatten()[:n].to(torch.uint8), absmax2, offset


def double_dequantize(
    codes: torch.Tensor, absmax2: torch.Tensor, offset: torch.Tensor, block_size: int = 256
) -> torch.Tensor:
    """The absmax values that `double_quantize` stored, float32 and flat."""
    values = DYNAMIC_MAP.to(codes.device)[codes.reshape(-1).int()]
    return values * absmax2.repeat_interleave(block_size)[: codes.numel()] + offset
