"""Public functions of the op: argument checks, then the implementation."""

# B local batch, N global batch, E embedding dim

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels.dispatch import uses_triton
from ccmim_kernels.info_nce import reference


def _check(rows_BE: Tensor, all_NE: Tensor, offset: int, tau: float) -> None:
    if rows_BE.shape[1] != all_NE.shape[1]:
        raise ValueError(f"embeddings {list(rows_BE.shape)} and {list(all_NE.shape)} differ in width")
    if not len(rows_BE):
        raise ValueError("no rows: the mean over them is not defined")
    if not 0 <= offset <= len(all_NE) - len(rows_BE):
        raise ValueError(f"offset={offset} must be in 0..{len(all_NE) - len(rows_BE)}")
    if not tau > 0:
        raise ValueError(f"tau={tau} must be greater than 0")


def _wide(h: Tensor) -> Tensor:
    return h if h.dtype == torch.float64 else h.float()


def info_nce(
    masked_BE: Tensor,
    visible_BE: Tensor,
    visible_all_NE: Tensor | None = None,
    *,
    offset: int = 0,
    tau: float,
    kernels: str = "auto",
) -> Tensor:
    """L_NCE (Eq. 7), the mean over the B local images.

    For image i, with cosine similarity s:
    -log( exp(s(hM_i, hV_i) / tau) / ( sum_{j != i} exp(s(hV_i, hV_j) / tau) + sum_j exp(s(hM_i, hV_j) / tau) ) ).

    Args:
        masked_BE: [B, E] float, hM of the local images: the teacher, no gradient.
        visible_BE: [B, E] float, hV of the local images; receives a gradient.
        visible_all_NE: [N, E] float, hV of all ranks; rows offset .. offset + B - 1 are the local ones; receives a
            gradient. None: N = B, a single rank.
        offset: see above.
        tau: temperature.
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`.

    Returns:
        A scalar; float32, or float64 from float64.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    visible_all_NE = visible_BE if visible_all_NE is None else visible_all_NE
    _check(visible_BE, visible_all_NE, offset, tau)
    if masked_BE.shape != visible_BE.shape:
        raise ValueError(f"hM {list(masked_BE.shape)} and hV {list(visible_BE.shape)} differ")
    masked_BE = masked_BE.detach()
    if uses_triton(kernels, "info_nce", visible_BE.device, masked_BE, visible_BE, visible_all_NE):
        rows = (F.normalize(_wide(h), dim=-1) for h in (visible_BE, masked_BE, visible_all_NE))
        return _info_nce(*rows, offset, tau)[0].mean()
    # Losses stay float32 under autocast too.
    with torch.autocast(visible_BE.device.type, enabled=False):
        return reference.info_nce(_wide(masked_BE), _wide(visible_BE), _wide(visible_all_NE), offset, tau)


def moco_nce(
    visible_BE: Tensor, masked_all_NE: Tensor, *, offset: int = 0, tau: float, kernels: str = "auto"
) -> Tensor:
    """The authors' code's loss (MoCo v3): 2 tau times the cross-entropy of hV against all hM.

    Args:
        visible_BE: [B, E] float, hV of the local images; receives a gradient.
        masked_all_NE: [N, E] float, hM of all ranks, no gradient; rows offset .. offset + B - 1 are the local ones.
        offset, tau, kernels: as in `info_nce`.

    Returns:
        A scalar; float32, or float64 from float64.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    _check(visible_BE, masked_all_NE, offset, tau)
    masked_all_NE = masked_all_NE.detach()
    if uses_triton(kernels, "info_nce", visible_BE.device, visible_BE, masked_all_NE):
        rows = (F.normalize(_wide(h), dim=-1) for h in (visible_BE, masked_all_NE))
        return 2 * tau * _moco_nce(*rows, offset, tau)[0].mean()
    with torch.autocast(visible_BE.device.type, enabled=False):
        return reference.moco_nce(_wide(visible_BE), _wide(masked_all_NE), offset, tau)


# The operators below take rows of norm 1 (or 0), float32. The two losses give (loss_B, positive_B): each image's loss,
# and the similarity of its positive, which backward needs and which has no gradient.


@torch.library.custom_op("ccmim::info_nce", mutates_args=())
def _info_nce(student: Tensor, teacher: Tensor, keys: Tensor, offset: int, tau: float) -> tuple[Tensor, Tensor]:
    from ccmim_kernels.info_nce import triton_impl

    queries = torch.cat([student, teacher])
    return triton_impl.losses(queries, keys, excluded=len(student), offset=offset, tau=tau)


@torch.library.custom_op("ccmim::moco_nce", mutates_args=())
def _moco_nce(student: Tensor, keys: Tensor, offset: int, tau: float) -> tuple[Tensor, Tensor]:
    from ccmim_kernels.info_nce import triton_impl

    return triton_impl.losses(student, keys, excluded=0, offset=offset, tau=tau)


@torch.library.custom_op("ccmim::nce_student_gradient", mutates_args=())
def _student_gradient(
    student: Tensor,
    keys: Tensor,
    loss: Tensor,
    positive: Tensor,
    grad: Tensor,
    own_excluded: bool,
    offset: int,
    tau: float,
) -> Tensor:
    from ccmim_kernels.info_nce import triton_impl

    excluded = len(student) if own_excluded else 0
    return triton_impl.gradient(
        student, keys, loss, positive, grad, of_keys=False, excluded=excluded, offset=offset, tau=tau
    )


@torch.library.custom_op("ccmim::nce_key_gradient", mutates_args=())
def _key_gradient(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor,
    loss: Tensor,
    positive: Tensor,
    grad: Tensor,
    offset: int,
    tau: float,
) -> Tensor:
    from ccmim_kernels.info_nce import triton_impl

    queries = torch.cat([student, teacher])
    return triton_impl.gradient(
        keys, queries, loss, positive, grad, of_keys=True, excluded=len(student), offset=offset, tau=tau
    )


@_info_nce.register_fake
@_moco_nce.register_fake
def _(student, *_arguments):
    return student.new_empty(student.shape[0]), student.new_empty(student.shape[0])


@_student_gradient.register_fake
def _(student, *_arguments):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@_key_gradient.register_fake
def _(student, teacher, keys, *_arguments):
    return torch.empty_like(keys, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *rows, ctx.offset, ctx.tau = inputs
    ctx.save_for_backward(*rows, *output)
    ctx.mark_non_differentiable(output[1])


def _info_nce_backward(ctx, grad_loss, _grad_positive):
    student, teacher, keys, loss, positive = ctx.saved_tensors
    of_student = of_keys = None
    if ctx.needs_input_grad[0]:
        of_student = _student_gradient(student, keys, loss, positive, grad_loss, True, ctx.offset, ctx.tau)
    if ctx.needs_input_grad[2]:
        of_keys = _key_gradient(student, teacher, keys, loss, positive, grad_loss, ctx.offset, ctx.tau)
    return of_student, None, of_keys, None, None


def _moco_nce_backward(ctx, grad_loss, _grad_positive):
    student, keys, loss, positive = ctx.saved_tensors
    return _student_gradient(student, keys, loss, positive, grad_loss, False, ctx.offset, ctx.tau), None, None, None


_info_nce.register_autograd(_info_nce_backward, setup_context=_save)
_moco_nce.register_autograd(_moco_nce_backward, setup_context=_save)
