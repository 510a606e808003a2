"""Eq. 7 and the authors' form equal loops in float64, alone and with other ranks' rows; the kernels are near gold."""

import math

import pytest
import torch
import torch.nn.functional as F
from ops.gold import assert_close_to_gold, compare

from ccmim_kernels import info_nce, moco_nce
from ccmim_kernels.info_nce import _nce, _nce_gradient
from ccmim_kernels.triton_impl import info_nce as launchers


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def eq7(masked, visible, rows, tau):
    """Compute Eq. 7 averaged over `rows`; `masked` and `visible` are the embeddings of the whole batch."""
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


# B, N, E, offset: one image; odd; more than a tile; other ranks' rows; wider than a chunk of output columns.
SHAPES = [(1, 40, 50, 1), (13, 13, 40, 0), (70, 70, 33, 0), (37, 150, 100, 101), (5, 9, 300, 4)]


def embeddings(shape, dtype, device):
    """Make inputs of (info_nce, moco_nce): hV and hM of an image are close for some images and far apart for others."""
    B, N, E, offset = shape
    visible = torch.randn(N, E)
    masked = visible + torch.linspace(0.3, 3, N)[torch.randperm(N), None] * torch.randn(N, E)
    visible, masked = visible.to(device, dtype), masked.to(device, dtype)
    local = slice(offset, offset + B)
    nce = {"masked_BE": masked[local], "visible_BE": visible[local], "visible_all_NE": visible}
    return nce, {"visible_BE": visible[local], "masked_all_NE": masked}


def at_temperatures(loss, *taus):
    """Return the loss at several temperatures: of a single number, eager's error may be zero by luck."""
    return lambda **inputs: torch.stack([loss(tau=tau, **inputs) for tau in taus])


TAUS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
CASES = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[1], torch.float16), (SHAPES[1], torch.bfloat16)]


@pytest.mark.fault(
    "Eq. 7: the student's own similarity counted",
    "left_out = (key >= last)[None, :] | (own & (row < excluded)[:, None])",
    "left_out = (key >= last)[None, :]",
)
@pytest.mark.fault("Eq. 7: gradient 1 % off", "(grad_B / tau).contiguous()", "(1.01 * grad_B / tau).contiguous()")
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_kernels_against_gold(shape, dtype, device):
    nce, moco = embeddings(shape, dtype, device)
    compare(at_temperatures(info_nce, *TAUS), nce, ["visible_BE", "visible_all_NE"], "nce", offset=shape[3])
    compare(at_temperatures(moco_nce, *TAUS), moco, ["visible_BE"], "moco", offset=shape[3])


@pytest.mark.fault(
    "log-sum-exp not rescaled to the new maximum", "total = total * tl.exp(largest - finite) +", "total = total +"
)
@pytest.mark.parametrize("shape", [(20, 150, 24, 101), (70, 150, 16, 3)])
def test_sums_over_many_tiles(shape, device, monkeypatch):
    """Small inputs are split until a program has one tile; here each has all of them, as with many images."""
    monkeypatch.setattr(launchers, "_PROGRAMS", 1)
    nce, moco = embeddings(shape, torch.float32, device)
    compare(at_temperatures(info_nce, *TAUS[::2]), nce, ["visible_BE", "visible_all_NE"], "nce", offset=shape[3])
    compare(at_temperatures(moco_nce, *TAUS[::2]), moco, ["visible_BE"], "moco", offset=shape[3])


@pytest.mark.parametrize("loss", [info_nce, moco_nce])
def test_2048_columns(loss, device):
    nce, moco = embeddings((3, 7, 2048, 4), torch.float32, device)
    inputs, name = (nce, "visible_all_NE") if loss is info_nce else (moco, "visible_BE")
    grads = []
    for kernels, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        values = {key: x.to(dtype) for key, x in inputs.items()}
        values[name].requires_grad_()
        out = loss(**values, offset=4, tau=0.2, kernels=kernels)
        grads.append(torch.autograd.grad(out, values[name])[0])
        values[name].requires_grad_(False)
        if kernels == "triton":
            ours = out.item()
    assert ours == pytest.approx(out.item(), rel=1e-6)
    assert_close_to_gold(*grads, name)


def test_rows_in_any_layout(device):
    h = torch.randn(20, 2, 9, device=device).mT
    columns, every_second = h[..., 0].t().contiguous().t(), h[..., 1]
    assert not columns.is_contiguous()
    assert not every_second.is_contiguous()
    compare(info_nce, {"masked_BE": columns, "visible_BE": every_second}, ["visible_BE"], tau=0.2)
    compare(moco_nce, {"visible_BE": columns, "masked_all_NE": every_second}, ["visible_BE"], tau=0.2)


def test_only_the_gradients_asked_for(device):
    nce, moco = embeddings((6, 9, 16, 2), torch.float32, device)
    for name in ("visible_BE", "visible_all_NE"):
        compare(info_nce, nce, [name], name, offset=2, tau=0.2)
    for inputs, loss in ((nce, info_nce), (moco, moco_nce)):
        inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        loss(**inputs, offset=2, tau=0.2, kernels="triton").backward()
        teacher = inputs["masked_BE" if loss is info_nce else "masked_all_NE"]
        assert teacher.grad is None


def normal(*shape, device):
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


@pytest.mark.fault(
    "similarities read beyond the last row",
    "tl.load(positive_ptr + image, mask=row < R, other=0.0)",
    "tl.load(positive_ptr + image)",
)
@pytest.mark.fault(
    "a column of the padding left unwritten",
    "tl.store(out_ptr + place, total, mask=(a_row < A)[:, None] & (column < E)[None, :])",
    "tl.store(out_ptr + place, total, mask=(a_row < A)[:, None] & (column < E - 1)[None, :])",
)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_each_images_gradient_by_its_own_weight(with_teacher, device):
    """The mean gives every image the same weight, the operator takes any."""
    student, teacher = normal(2, 5, 12, device=device).unbind()
    keys = normal(9, 12, device=device)
    inputs = {"student": student, "keys": keys}

    def nce(student, keys, kernels):
        if kernels == "triton":
            return _nce(student, teacher if with_teacher else None, keys, 3, 0.2)[0]
        if not with_teacher:
            return (student @ keys.T / 0.2).logsumexp(1) - (student @ keys.T / 0.2).diagonal(3)
        hidden = torch.full((5, 9), 0.0, device=device).fill_diagonal_(float("-inf")).roll(3, 1).to(keys)
        own, foreign = student @ keys.T / 0.2 + hidden, teacher.to(keys) @ keys.T / 0.2
        return torch.cat([own, foreign], 1).logsumexp(1) - foreign.diagonal(3)

    compare(nce, inputs, ["student", "keys"])
    assert not _nce(student.clone().requires_grad_(), teacher, keys, 3, 0.2)[1].requires_grad


def chunked_loss(masked, visible, tau):
    """Compute Eq. 7 in float64, 512 images at a time."""
    masked, visible = (F.normalize(h.double(), dim=-1) for h in (masked, visible))
    loss = 0.0
    for start in range(0, len(visible), 512):
        student = (visible[start : start + 512] @ visible.T / tau).exp()
        teacher = (masked[start : start + 512] @ visible.T / tau).exp()
        negatives = student.sum(1) - student.diagonal(start)
        loss += ((negatives + teacher.sum(1)).log() - teacher.diagonal(start).log()).sum()
    return loss / len(visible)


@pytest.mark.slow
def test_8192_images(device, monkeypatch):
    """The loss equals a float64 sum over chunks; tiles are larger in the interpreter, where each costs milliseconds."""
    if device.type == "cpu":
        monkeypatch.setitem(launchers._LOGSUMEXP_TILES, "ieee", (1024, 1024, 16, 8))
    masked, visible = torch.randn(2, 8192, 16, device=device).unbind()
    ours = info_nce(masked, visible, tau=0.1, kernels="triton")
    assert ours.item() == pytest.approx(chunked_loss(masked, visible, 0.1).item(), rel=5e-7)


@pytest.mark.parametrize("size", [1, 2, 40])
def test_equal_embeddings(size, device):
    """All similarities are 1: the loss is the log of the number of terms, and no direction is better than another."""
    h = torch.ones(size, 8, device=device, requires_grad=True)
    loss = info_nce(h, h, tau=0.2, kernels="triton")
    assert loss.item() == pytest.approx(math.log(2 * size - 1), rel=1e-6, abs=1e-6)
    loss.backward()
    assert h.grad.abs().max() < 1e-6
    h.grad = None
    loss = moco_nce(h, h, tau=0.2, kernels="triton")
    assert loss.item() == pytest.approx(0.4 * math.log(size), rel=1e-6, abs=1e-6)
    loss.backward()
    assert h.grad.abs().max() < 1e-6


def test_opposite_embeddings(device):
    """All similarities are -1: a row of zeros beyond the last key would be far closer, were it counted."""
    h = torch.ones(5, 8, device=device, requires_grad=True)
    loss = moco_nce(h, -h, tau=0.001, kernels="triton")
    assert loss.item() == pytest.approx(0.002 * math.log(5), rel=1e-4)
    loss.backward()
    assert h.grad.abs().max() < 1e-6


@pytest.mark.parametrize("tau", [0.2, 0.001])
def test_rows_of_zeros_and_opposites_are_finite(tau, device):
    """Rows of zeros have no direction; a student opposite to its own teacher has the largest loss there is."""
    masked, visible = torch.randn(2, 6, 10, device=device).unbind()
    masked[1], visible[2], visible[3] = 0.0, 0.0, -masked[3]
    compare(info_nce, {"masked_BE": masked, "visible_BE": visible}, ["visible_BE"], tau=tau)
    compare(moco_nce, {"visible_BE": visible, "masked_all_NE": masked}, ["visible_BE"], tau=tau)


def test_not_a_number_stays_one(device):
    masked, visible = torch.randn(2, 6, 10, device=device).unbind()
    visible[4, 4] = float("nan")
    assert info_nce(masked, visible, tau=0.2, kernels="triton").isnan()
    assert moco_nce(visible, masked, tau=0.2, kernels="triton").isnan()


def test_run_to_run_equality(device):
    nce, moco = embeddings((37, 150, 40, 101), torch.float32, device)
    for loss, inputs, name in ((info_nce, nce, "visible_all_NE"), (moco_nce, moco, "visible_BE")):
        runs = []
        for _ in range(2):
            h = inputs[name].clone().requires_grad_()
            out = loss(**{**inputs, name: h}, offset=101, tau=0.2, kernels="triton")
            runs.append((out, *torch.autograd.grad(out, h)))
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])


def test_no_buffer_of_logits(device, monkeypatch):
    """The launches write far less than the B x 2 N logits."""
    written = []
    monkeypatch.setattr(
        launchers,
        "launch",
        lambda kernel, programs, *arguments, **_: written.extend(a.numel() for a in arguments if torch.is_tensor(a)),
    )
    student, keys, rows = (torch.zeros(*shape, device=device) for shape in ((2048, 32), (8192, 32), (2048,)))
    launchers.info_nce(student, student, keys, offset=0, tau=0.2)
    for of_keys in (False, True):
        launchers.info_nce_gradient(student, student, keys, rows, rows, rows, 0, 0.2, of_keys)
    assert len(written) == 4 + 2 * 6
    assert max(written) < 2048 * 2 * 8192 / 16


@pytest.mark.parametrize("offset", [0, 3])
def test_operators_pass_opcheck(offset, device):
    student, teacher = normal(2, 5, 12, device=device).unbind()
    keys = normal(9, 12, device=device)
    loss, positive = _nce(student, teacher, keys, offset, 0.2)
    s, k = student.clone().requires_grad_(), keys.clone().requires_grad_()
    for other in (teacher, None):
        torch.library.opcheck(_nce, (s, other, k, offset, 0.2))
        for of_keys in (False, True):
            arguments = (student, other, keys, loss, positive, loss, offset, 0.2, of_keys)
            torch.library.opcheck(_nce_gradient, arguments)


def test_compiled_in_one_graph(device):
    nce, moco = embeddings((6, 9, 16, 2), torch.float32, device)

    def step(masked, visible, visible_all, rows, masked_all):
        loss = info_nce(masked, visible, visible_all, offset=2, tau=0.2, kernels="triton")
        return loss + moco_nce(rows, masked_all, offset=2, tau=0.2, kernels="triton")

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        masked, visible, every, rows, masked_all = (x.clone() for x in (*nce.values(), *moco.values()))
        leaves = [x.requires_grad_() for x in (visible, every, rows)]
        loss = run(masked, visible, every, rows, masked_all)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)


def test_kernel_errors():
    h = torch.zeros(4, 6)
    for loss in (info_nce, moco_nce):
        with pytest.raises(ValueError, match=r"takes float32, float16 or bfloat16, got torch\.float64"):
            loss(h.double(), h.double(), tau=0.2, kernels="triton")
        with pytest.raises(ValueError, match="takes float32"):
            loss(h, h.double(), tau=0.2, kernels="triton")
        with pytest.raises(ValueError, match="kernels='cuda' must be one of auto, triton, reference"):
            loss(h, h, tau=0.2, kernels="cuda")


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_float32_even_under_autocast(kernels, device):
    masked, visible = torch.randn(2, 8, 16, device=device)
    plain = info_nce(masked, visible, tau=0.2, kernels=kernels), moco_nce(visible, masked, tau=0.2, kernels=kernels)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under = info_nce(masked, visible, tau=0.2, kernels=kernels), moco_nce(visible, masked, tau=0.2, kernels=kernels)
    assert all(torch.equal(a, b) for a, b in zip(plain, under))


def test_no_rows_and_unequal_sets_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        info_nce(torch.zeros(0, 4), torch.zeros(0, 4), tau=0.2)
    with pytest.raises(ValueError, match=r"hM \[2, 4\] and hV \[3, 4\] differ"):
        info_nce(torch.zeros(2, 4), torch.zeros(3, 4), tau=0.2)
