"""NF4 and double quantization by hand against bitsandbytes: not one byte may differ."""

import bitsandbytes.functional as F
import pytest
import torch
from bitsandbytes.cextension import CudaBNBNativeLibrary, lib
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.nf4 import NF4_CODEBOOK as CODEBOOK
from helpers.nf4 import dequantize_nf4, double_dequantize, double_quantize, quantize_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "uniform", "heavy-tailed", "constant", "zero", "denormal", "huge")
KINDS += ("midpoints", "two outliers", "zero blocks")
cases = given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 300) | st.integers(1, 40_000) | st.sampled_from((64, 128, 4096, 16_384)),
    seed=st.integers(0, 2**31),
    block_size=st.sampled_from((32, 64, 64, 64, 128, 512, 4096)),
)
thoroughly = settings(derandomize=True, max_examples=250, deadline=None, database=None)


@pytest.fixture(autouse=True, scope="module")
def no_compiling():
    """bitsandbytes compiles its code for odd sizes, once a shape; eagerly it computes the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def weights(kind, n, seed, dtype):
    """`n` weights of a kind, in `dtype`, always finite."""
    generator, info = torch.Generator().manual_seed(seed), torch.finfo(dtype)
    normal = torch.randn(n, generator=generator)
    uniform = torch.rand(n, generator=generator) * 2 - 1
    midpoints = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2
    ties = midpoints[torch.randint(15, (n,), generator=generator)]
    ties[::32] = 1.0
    # an absmax other than 1, so that dividing and multiplying by its reciprocal differ
    ties = ties * (0.5 + uniform[:1].abs())
    spiked = normal.clone()
    spiked[torch.randint(n, (2,), generator=generator)] = 60.0
    gaps = normal.clone()
    gaps[n // 3 : 2 * n // 3] = 0
    values = [normal, uniform, normal / uniform, uniform[:1].repeat(n), torch.zeros(n)]
    values += [uniform * info.tiny, uniform * info.max, ties, spiked, gaps]
    made = dict(zip(KINDS, values, strict=True))[kind]
    return made.nan_to_num(0.0, 1.0, -1.0).clamp(info.min, info.max).to(dtype)


def differing_bytes(a, b):
    """How many bytes of two tensors of equal shape and dtype differ; -0 and 0 do."""
    assert a.dtype == b.dtype and a.numel() == b.numel()
    return (a.flatten().view(torch.uint8) != b.flatten().view(torch.uint8)).sum().item()


def differing_reads(ours, theirs):
    """`differing_bytes` of dequantized weights. bitsandbytes' library for CUDA rounds float16
    otherwise (ties away from zero), the bfloat16 instruction of some CPUs takes subnormal numbers
    for zero at some lengths: there, and only there, such values count as equal."""
    theirs = theirs.reshape(ours.shape)
    if ours.dtype == torch.float16 and isinstance(lib, CudaBNBNativeLibrary):
        torch.testing.assert_close(theirs, ours, rtol=2**-10, atol=2**-24)
        return 0
    if ours.dtype == torch.bfloat16:
        subnormal = ours.abs() <= torch.finfo(torch.bfloat16).tiny
        assert (theirs[subnormal].abs() <= torch.finfo(torch.bfloat16).tiny).all()
        ours, theirs = ours.masked_fill(subnormal, 0), theirs.masked_fill(subnormal, 0)
    return differing_bytes(ours, theirs)


def assert_same_bytes(w, block_size=64):
    packed, absmax = quantize_nf4(w, block_size)
    stored, state = F.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    assert differing_bytes(packed, stored) == differing_bytes(absmax, state.absmax) == 0
    read = dequantize_nf4(packed, absmax, w.shape, w.dtype, block_size)
    assert read.shape == w.shape and differing_reads(read, F.dequantize_4bit(stored, state)) == 0


@cases
@thoroughly
def test_quantizes_and_dequantizes_to_the_bytes_of_bitsandbytes(kind, n, seed, block_size):
    for dtype in DTYPES:
        assert_same_bytes(weights(kind, n, seed, dtype), block_size)


@pytest.mark.parametrize("n", [2**20, 2**21 + 33])
def test_large_weights_are_quantized_to_the_same_bytes(n):
    assert_same_bytes(weights("normal", n, 0, torch.float32))


@cases
@thoroughly
def test_double_quantizes_to_the_bits_of_bitsandbytes(kind, n, seed, block_size):
    for dtype in DTYPES:
        w = weights(kind, n, seed, dtype)
        packed, absmax = quantize_nf4(w, block_size)
        if not absmax.mean().isfinite():  # huge weights only: bitsandbytes would store NaN
            with pytest.raises(ValueError, match="mean of absmax is inf"):
                double_quantize(absmax)
            continue
        codes, absmax2, offset = double_quantize(absmax)
        options = {"blocksize": block_size, "quant_type": "nf4", "compress_statistics": True}
        stored, state = F.quantize_4bit(w, **options)
        assert differing_bytes(codes, state.absmax) == 0
        assert differing_bytes(absmax2, state.state2.absmax) == 0 and offset.equal(state.offset)
        absmax = double_dequantize(codes, absmax2, offset)
        read = dequantize_nf4(packed, absmax, w.shape, dtype, block_size)
        assert differing_reads(read, F.dequantize_4bit(stored, state)) == 0


@pytest.mark.parametrize("shape", [(3, 48), (7, 33), (2, 3, 64), ()])
def test_any_shape_comes_back_as_its_values_in_a_row(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    read, row = (dequantize_nf4(*quantize_nf4(x), x.shape, x.dtype) for x in (w, w.flatten()))
    assert read.equal(row.view(shape))


def test_a_transposed_matrix_and_a_parameter_are_read_in_their_own_order():
    w = torch.randn(128, 64)
    assert quantize_nf4(w.T)[0].equal(quantize_nf4(w.T.contiguous())[0])
    packed, absmax = quantize_nf4(torch.nn.Parameter(w))
    assert not absmax.requires_grad and packed.equal(quantize_nf4(w)[0])


NAN = torch.linspace(-1, 1, 128).masked_fill(torch.arange(128) == 70, float("nan"))
BAD = [  # function, argument, what the message says
    (quantize_nf4, NAN, "w has a nan at flat index 70:"),
    (quantize_nf4, NAN.nan_to_num(float("-inf"))[:71].half(), "w has a -inf at flat index 70:"),
    (double_quantize, NAN, "the mean of absmax is nan:"),
    (double_quantize, torch.full((4,), 3e38), "the mean of absmax is inf:"),
]


@pytest.mark.parametrize(("function", "argument", "message"), BAD)
def test_numbers_that_are_not_finite_are_refused(function, argument, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(argument)
