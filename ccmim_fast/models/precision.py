"""The arithmetic of a device: its precision, weights cast to it, and whose products a CPU takes in float32."""

# R rows, A inputs, D outputs

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ccmim_fast.errors import ConfigError
from ccmim_kernels.dispatch import choosable

_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision(NamedTuple):
    """This tuple is the autocast dtype (None: fp32) and whether gradients are scaled; weights are fp32 always."""

    name: str
    dtype: torch.dtype | None
    scaled: bool

    def autocast(self, device: torch.device, cache: bool = True):
        """Return the context of the forward pass; `cache`: a weight that is used twice is cast once."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=cache)


def choose_precision(name: str, device: torch.device) -> Precision:
    """Choose the precision `name` on `device`; sets the TF32 policy of fp32 matmuls.

    `auto`: CUDA 6.x fp32 (fp16 runs at 1/64 rate there), 7.x fp16 with gradient scaling, 8.0 and later bf16; CPU bf16
    where it has the instructions, else fp32. Raises ConfigError where the device cannot do what was asked.
    """
    if name == "auto":
        name = _auto(device)
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision=fp16: not on a CPU; nearest: bf16, fp32")
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(f"train.precision=bf16: needs compute capability 8.0, this GPU has {major}.{minor}; use auto")
    # TF32 only where half precision was accepted for the rest: `fp32` means fp32.
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    return Precision(name, _DTYPES[name], scaled=name == "fp16")


def _auto(device: torch.device) -> str:
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "fp32" if major < 7 else "fp16" if major < 8 else "bf16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


class CastWeights:
    """The weights and biases of a module's linear layers, cast as autocast casts them, but once for all their uses.

    A context: the layers have the cast ones within, and their own outside. Gradients reach the layers' own.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        # An assignment to the attribute would refuse a tensor that is no parameter.
        self._own = [(layer._parameters, *item) for layer in layers for item in layer.named_parameters(recurse=False)]
        with torch.enable_grad():  # a pass without gradients may be the first to use them
            self._cast = _Cast.apply(dtype, *(weight for *_, weight in self._own))

    def __enter__(self) -> None:
        for (parameters, name, _), cast in zip(self._own, self._cast):
            parameters[name] = cast

    def __exit__(self, *_: object) -> None:
        for parameters, name, weight in self._own:
            parameters[name] = weight


def with_cast_weights(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compute(module, ...)`, run with the module's cast weights where it has any, see `cast_once`."""

    def run(module: nn.Module, *rest: Any) -> Any:
        with vars(module).get("cast_weights", contextlib.nullcontext()):
            return compute(module, *rest)

    return run


@contextlib.contextmanager
def cast_once(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Keep cast weights of these modules within, for `with_cast_weights`; nothing for None."""
    modules = [] if dtype is None else list(modules)
    for module in modules:
        module.cast_weights = CastWeights(module, dtype)
    try:
        yield
    finally:
        for module in modules:
            del module.cast_weights


class _Cast(torch.autograd.Function):
    """Tensors in another dtype, all by one kernel of a GPU; and so their gradients back."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cast = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    tensors = list(tensors)
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if cast:
        torch._foreach_copy_(cast, tensors)
    return cast


LINEAR = ("torch", "onednn")
Layers = Mapping[tuple[int, int], str]  # inputs and outputs of linear layers: who computes their products


def linear_layers(chosen: Layers | None) -> contextlib.AbstractContextManager:
    """Return a context in which linear layers of float32 on a CPU, outside autocast, run as `chosen` says.

    Equivalent PyTorch: the code in it, as it is; result and gradients are the same up to rounding. On AMD EPYC (Zen 4,
    AVX-512), two threads, a step of ViT-B takes 3 to 15 % less time by oneDNN than by torch's MKL; bf16 products are
    oneDNN's in any case.
    Not for code to be compiled, nor to be computed again in the backward pass, which no context reaches; and the
    gradient has no gradient. None, or where this torch has no oneDNN: nothing happens.
    """
    if chosen is None or not torch.backends.mkldnn.is_available():
        return contextlib.nullcontext()
    return _LinearLayers(chosen)


@choosable(lambda input, weight, *_: f"linear {weight.shape[1]} x {weight.shape[0]}", by="backend")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "torch") -> Tensor:
    """Compute `F.linear` by torch or, of float32 on a CPU, by oneDNN."""
    if backend == "onednn" and input.numel():  # oneDNN has no product of no rows
        return _Linear.apply(input, weight, bias)
    return F.linear(input, weight, bias)


def product(x_RA: Tensor, weight_DA: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """Compute x w^T + b by oneDNN, [R, D] float32 of float32 on a CPU; any strides; no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x_RA, weight_DA, bias_D, "none", [], "")


class _LinearLayers(TorchFunctionMode):
    def __init__(self, chosen: Layers):
        super().__init__()
        self._chosen = chosen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not torch.is_autocast_enabled("cpu"):
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (input, weight)):
            return F.linear(input, weight, bias)
        outputs, inputs = weight.shape
        return linear(input, weight, bias, backend=self._chosen.get((inputs, outputs), "torch"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_DA, bias_D):
        ctx.save_for_backward(x, weight_DA)
        return product(x.flatten(0, -2), weight_DA, bias_D).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight_DA = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_RD = grad.flatten(0, -2)
        return (
            product(grad_RD, weight_DA.t()).view_as(x) if of_x else None,
            product(grad_RD.t(), x.flatten(0, -2).t()) if of_weight else None,
            grad_RD.sum(0) if of_bias else None,
        )
