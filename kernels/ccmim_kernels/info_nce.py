"""The op `info_nce` computes a contrastive loss: `info_nce` (Eq. 7 of the paper) or `moco_nce` (the authors' code)."""

# B local batch, N global batch, E embedding dim

import torch
import torch.nn.functional as F
from torch import Tensor

from ccmim_kernels.dispatch import choosable, operator, uses_triton, widened


def info_nce_reference(
    masked_BE: Tensor, visible_BE: Tensor, visible_all_NE: Tensor, offset: int, tau: float
) -> Tensor:
    """Specify `info_nce` in plain PyTorch."""
    masked_BE, visible_BE, all_NE = (F.normalize(h, dim=-1) for h in (masked_BE, visible_BE, visible_all_NE))
    visible_BN = visible_BE @ all_NE.T / tau
    masked_BN = masked_BE @ all_NE.T / tau
    own_B1 = torch.arange(len(visible_BE), device=visible_BE.device)[:, None] + offset
    # The student's similarity to itself is no negative (j != i in Eq. 7).
    visible_BN = visible_BN.scatter(1, own_B1, float("-inf"))
    denominator_B = torch.cat([visible_BN, masked_BN], dim=1).logsumexp(1)
    return (denominator_B - masked_BN.gather(1, own_B1)[:, 0]).mean()


def moco_nce_reference(visible_BE: Tensor, masked_all_NE: Tensor, offset: int, tau: float) -> Tensor:
    """Specify `moco_nce` in plain PyTorch."""
    logits_BN = F.normalize(visible_BE, dim=-1) @ F.normalize(masked_all_NE, dim=-1).T / tau
    own_B = torch.arange(len(visible_BE), device=visible_BE.device) + offset
    return 2 * tau * F.cross_entropy(logits_BN, own_B)


def _check(rows_BE: Tensor, all_NE: Tensor, offset: int, tau: float) -> None:
    if rows_BE.shape[1] != all_NE.shape[1]:
        raise ValueError(f"embeddings {list(rows_BE.shape)} and {list(all_NE.shape)} differ in width")
    if not len(rows_BE):
        raise ValueError("no rows: the mean over them is not defined")
    if not 0 <= offset <= len(all_NE) - len(rows_BE):
        raise ValueError(f"offset={offset} must be in 0..{len(all_NE) - len(rows_BE)}")
    if not tau > 0:
        raise ValueError(f"tau={tau} must be greater than 0")


@choosable("info_nce")
def info_nce(
    masked_BE: Tensor,
    visible_BE: Tensor,
    visible_all_NE: Tensor | None = None,
    *,
    offset: int = 0,
    tau: float,
    kernels: str = "auto",
) -> Tensor:
    """Compute L_NCE (Eq. 7), the mean over the B local images: a scalar, float32 (float64 from float64).

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
    """
    visible_all_NE = visible_BE if visible_all_NE is None else visible_all_NE
    _check(visible_BE, visible_all_NE, offset, tau)
    if masked_BE.shape != visible_BE.shape:
        raise ValueError(f"hM {list(masked_BE.shape)} and hV {list(visible_BE.shape)} differ")
    rows = masked_BE.detach(), visible_BE, visible_all_NE
    # Losses stay float32 under autocast too.
    with torch.autocast(visible_BE.device.type, enabled=False):
        if uses_triton(kernels, "info_nce", visible_BE.device, *rows):
            teacher_BE, student_BE, keys_NE = (F.normalize(widened(h), dim=-1) for h in rows)
            return _nce(student_BE, teacher_BE, keys_NE, offset, tau)[0].mean()
        return info_nce_reference(*(widened(h) for h in rows), offset, tau)


@choosable("info_nce")
def moco_nce(
    visible_BE: Tensor, masked_all_NE: Tensor, *, offset: int = 0, tau: float, kernels: str = "auto"
) -> Tensor:
    """Compute the loss of the authors' code (MoCo v3): 2 tau times the cross-entropy of hV against all hM.

    Args:
        visible_BE: [B, E] float, hV of the local images; receives a gradient.
        masked_all_NE: [N, E] float, hM of all ranks, no gradient; rows offset .. offset + B - 1 are the local ones.
        offset, tau, kernels: as in `info_nce`, as is the result.
    """
    _check(visible_BE, masked_all_NE, offset, tau)
    rows = visible_BE, masked_all_NE.detach()
    with torch.autocast(visible_BE.device.type, enabled=False):
        if uses_triton(kernels, "info_nce", visible_BE.device, *rows):
            student_BE, keys_NE = (F.normalize(widened(h), dim=-1) for h in rows)
            return 2 * tau * _nce(student_BE, None, keys_NE, offset, tau)[0].mean()
        return moco_nce_reference(*(widened(h) for h in rows), offset, tau)


def _save(ctx, inputs, output):
    *rows, ctx.offset, ctx.tau = inputs
    ctx.save_for_backward(*rows, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_loss, _grad_positive):
    inputs = (*ctx.saved_tensors, grad_loss, ctx.offset, ctx.tau)
    of_student = _nce_gradient(*inputs, of_keys=False) if ctx.needs_input_grad[0] else None
    of_keys = _nce_gradient(*inputs, of_keys=True) if ctx.needs_input_grad[2] else None
    return of_student, None, of_keys, None, None


@operator("info_nce", _save, _backward)
def _nce(student: Tensor, teacher: Tensor | None, keys: Tensor, offset: int, tau: float) -> tuple[Tensor, Tensor]:
    """Return (loss_B, positive_B): each image's loss, and the similarity of its positive, which has no gradient.

    All rows have norm 1 (or 0) and are float32. With a teacher the loss is that of `info_nce`, without that of
    `moco_nce` but for its factor.
    """
    return student.new_empty(student.shape[0]), student.new_empty(student.shape[0])


@operator("info_nce_gradient")
def _nce_gradient(
    student: Tensor,
    teacher: Tensor | None,
    keys: Tensor,
    loss: Tensor,
    positive: Tensor,
    grad: Tensor,
    offset: int,
    tau: float,
    of_keys: bool,
) -> Tensor:
    """Return the gradient of the students, or with `of_keys` of the keys; `grad` is that of each image's loss."""
    return torch.empty_like(keys if of_keys else student, memory_format=torch.contiguous_format)
