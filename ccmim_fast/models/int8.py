"""Linear layers in 8 bits, for passes without gradient: the teacher's, and the one that scores all blocks.

Activations have channels that are far from zero, and a few that are ten to a hundred times as wide as others: one scale
for all would leave the others two or three bits. So each input channel is moved to its midrange z and divided by c:

    y = x w^T + b = s_x s_w [(x - z) / (c s_x)] [w c / s_w]^T + (b + w z)

with whole numbers in square brackets, one scale s_x for all activations and one s_w for each output. The shift is that
of Outlier Suppression+ (Wei et al. 2023), c = sqrt(max|x - z| / max|w|) SmoothQuant's (Xiao et al. 2023), alpha = 1/2.
"""

# R rows, A inputs, D outputs

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# From so many rows on: a product of fewer gains less than it takes to quantise the weights, see
# benchmarks/results/2026-11-30-teacher-precision.md.
LEAST_ROWS = 512
_ROWS, _OUTPUTS = 128, 256  # at a time, in a core's cache; best of 32..256 rows and of 64, 256 and all outputs, there
_SEEN = 4  # every fourth output tells how large the weights of an input are; what they are divided by may be any number
_NARROWEST = 1 / 1024  # of the widest channel, that a channel counts for: it may be wider in the next micro-batch
_TINY = 1e-12  # in place of zero, where a whole layer is zero
_LEVELS = 127


def has_int8() -> bool:
    """Tell whether this CPU has products of 8-bit integers (AVX-512 VNNI), and this torch oneDNN."""
    return torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()


class Weights(NamedTuple):
    """The weights of a layer in 8 bits, and what its activations are moved and divided by."""

    own_DA: Tensor  # as they are; kept, so that no other weights come to their place in memory
    whole_AD: Tensor  # int8, of oneDNN
    scale_D: Tensor
    moved_D: Tensor  # w z
    shift_A: Tensor
    divisor_A: Tensor


class Int8Layers(TorchFunctionMode):
    """This context computes linear layers of float32 weights on a CPU in 8 bits, and quantises each layer once.

    Equivalent PyTorch: the code in it, as it is. The result has the dtype that it would have outside, no gradient, and
    an error of about 1 % of its norm; what is not finite stays so. Layers of fewer than `least_rows` rows are computed
    as outside. Weights must not change while the object is used: a step makes its own. Not for code to be compiled.
    """

    def __init__(self, least_rows: int = LEAST_ROWS):
        super().__init__()
        self._least_rows = least_rows
        self._weights: dict[tuple[int, torch.Size], Weights] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (self._linear if function is F.linear else function)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.numel() // max(1, input.shape[-1])
        taken = input.dtype in (torch.float32, torch.bfloat16) and weight.dtype == torch.float32
        if rows < self._least_rows or not taken or torch.is_grad_enabled():
            return F.linear(input, weight, bias)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        x_RA = input.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            high_A, low_A = _range(input)
            key = weight.data_ptr(), weight.shape
            if key not in self._weights:
                self._weights[key] = quantised(weight, high_A, low_A)
            result_RD = _product(x_RA, self._weights[key], bias, high_A, low_A, dtype)
        return result_RD.unflatten(0, input.shape[:-1])


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest value of each channel, [A] float32 each."""
    # Over the tokens of an image first: its channels stay in the cache.
    return x.amax(-2).view(-1, x.shape[-1]).amax(0).float(), x.amin(-2).view(-1, x.shape[-1]).amin(0).float()


def quantised(weight_DA: Tensor, high_A: Tensor, low_A: Tensor) -> Weights:
    """Quantise weights for activations whose channels reach from `low_A` to `high_A`."""
    shift_A = (high_A + low_A) / 2
    some_DA = weight_DA[::_SEEN]
    wide_A, large_A = (_floored(x) for x in (high_A - shift_A, torch.maximum(some_DA.amax(0), -some_DA.amin(0))))
    divisor_A = (wide_A / large_A).sqrt_()
    whole_DA, scales = torch.empty_like(weight_DA, dtype=torch.int8), []
    for rows_DA, out in zip(weight_DA.split(_OUTPUTS), whole_DA.split(_OUTPUTS)):
        scaled_DA = rows_DA * divisor_A
        scales.append(torch.maximum(scaled_DA.amax(1), -scaled_DA.amin(1)).div_(_LEVELS).clamp_min_(_TINY))
        out.copy_(scaled_DA.mul_((1 / scales[-1])[:, None]).round_())
    # A plain layout. `qlinear_prepack` takes ten times as long to make its own, in which a product takes 5 % less.
    return Weights(weight_DA, whole_DA.to_mkldnn().t(), torch.cat(scales), weight_DA @ shift_A, shift_A, divisor_A)


def _floored(x_A: Tensor) -> Tensor:
    return x_A.clamp_min((x_A.max() * _NARROWEST).clamp_min(_TINY))


def _product(
    x_RA: Tensor, weights: Weights, bias_D: Tensor | None, high_A: Tensor, low_A: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute the layer, [R, D]; `high_A` and `low_A` are of these activations."""
    wide_A = torch.maximum(high_A - weights.shift_A, weights.shift_A - low_A)
    scale = (wide_A / weights.divisor_A).max().div_(_LEVELS).clamp_min_(_TINY)
    factor_A = 1 / (weights.divisor_A * scale)
    whole_RA = torch.empty(x_RA.shape, dtype=torch.int8)
    for rows_RA, out in zip(x_RA.split(_ROWS), whole_RA.split(_ROWS)):
        # Subtracted first: x and z may be alike and large.
        out.copy_((rows_RA - weights.shift_A).mul_(factor_A).round_())
    # Unsigned with 128 for zero: for signed activations oneDNN 3.13 has a reference alone, a thousand times as slow.
    return torch.ops.onednn.qlinear_pointwise.tensor(
        whole_RA.view(torch.uint8).add_(128),
        scale,
        torch.tensor(128, dtype=torch.int32),
        weights.whole_AD,
        weights.scale_D,
        torch.zeros(len(weights.scale_D), dtype=torch.int32),
        weights.moved_D if bias_D is None else weights.moved_D + bias_D,
        1.0,  # scale and zero of a result that is quantised, which this is not
        0,
        dtype,
        "none",
        [],
        "",
    )
