"""Eq. 7 and the authors' form against loops in float64, alone and with other ranks' rows."""

import math

import pytest
import torch

from ccmim_kernels import info_nce, moco_nce


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def eq7(masked, visible, rows, tau):
    """Eq. 7 averaged over `rows`; `masked` and `visible` are the embeddings of the whole batch."""
    losses = []
    for i in rows:
        positive = math.exp(cosine(masked[i], visible[i]) / tau)
        students = sum(math.exp(cosine(visible[i], visible[j]) / tau) for j in range(len(visible)) if j != i)
        teachers = sum(math.exp(cosine(masked[i], visible[j]) / tau) for j in range(len(visible)))
        losses.append(-math.log(positive / (students + teachers)))
    return sum(losses) / len(losses)


def moco(masked, visible, rows, tau):
    losses = []
    for i in rows:
        positive = math.exp(cosine(visible[i], masked[i]) / tau)
        losses.append(-math.log(positive / sum(math.exp(cosine(visible[i], m) / tau) for m in masked)))
    return 2 * tau * sum(losses) / len(losses)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("rows", [range(7), range(2, 5)])
def test_nce_against_loops(tau, rows):
    masked, visible = torch.randn(2, 7, 5, dtype=torch.float64)
    local = slice(rows.start, rows.stop)
    loss = info_nce(masked[local], visible[local], visible, offset=rows.start, tau=tau)
    assert loss.item() == pytest.approx(eq7(masked.tolist(), visible.tolist(), rows, tau), rel=1e-12)


@pytest.mark.parametrize("rows", [range(7), range(2, 5)])
def test_moco_against_loops(rows):
    masked, visible = torch.randn(2, 7, 5, dtype=torch.float64)
    loss = moco_nce(visible[rows.start : rows.stop], masked, offset=rows.start, tau=0.5)
    assert loss.item() == pytest.approx(moco(masked.tolist(), visible.tolist(), rows, 0.5), rel=1e-12)


def test_single_rank_is_the_default():
    masked, visible = torch.randn(2, 4, 6)
    assert torch.equal(info_nce(masked, visible, tau=0.2), info_nce(masked, visible, visible, tau=0.2))


def test_gradient_of_the_student_and_none_of_the_teacher():
    masked, visible = torch.randn(2, 4, 6, dtype=torch.float64).unbind()
    masked, visible = masked.clone().requires_grad_(), visible.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: info_nce(masked, v, tau=0.3), (visible,))
    assert torch.autograd.gradcheck(lambda v: moco_nce(v, masked, tau=0.3), (visible,))
    info_nce(masked, visible, tau=0.3).backward()
    assert masked.grad is None


def test_gradient_reaches_the_other_ranks_rows():
    masked, visible, other = torch.randn(3, 4, 6, dtype=torch.float64).unbind()
    rows = torch.cat([other, visible]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, r: info_nce(masked, v, r, offset=4, tau=0.3), (visible.clone().requires_grad_(), rows)
    )


def test_errors():
    a, b = torch.zeros(4, 6), torch.zeros(8, 6)
    with pytest.raises(ValueError, match=r"offset=5 must be in 0\.\.4"):
        info_nce(a, a, b, offset=5, tau=0.2)
    with pytest.raises(ValueError, match="tau=0 must be greater than 0"):
        info_nce(a, a, tau=0)
    with pytest.raises(ValueError, match="differ in width"):
        moco_nce(a, torch.zeros(4, 5), tau=0.2)
