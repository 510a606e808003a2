"""`divide_tokens` samples and gathers: it must equal both done apart."""

import pytest
import torch
from ops.gold import DTYPES, compare

from ccmim_kernels import divide_tokens, embed_tokens, gather_tokens, restore_tokens, sample_partition
from ccmim_kernels.divide_tokens import _divide_tokens
from ccmim_kernels.triton_impl.launch import recorded

GRID = (4, 5)
WHERE = {"grid": GRID, "keep": 6, "seed": 2, "epoch": 1}


def made(dtype=torch.float64):
    tokens = torch.randn(3, 20, 8, dtype=dtype, requires_grad=True)
    prefix = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    return tokens, prefix, torch.tensor([5, 0, 9])


@pytest.mark.parametrize("strategy", ["random", "block", "importance", "importance_sampling"])
def test_equals_its_parts(strategy):
    tokens, prefix, ids = made()
    logits = torch.randn(3, 20) if strategy.startswith("importance") else None
    for teacher in (None, 5):
        options = {"strategy": strategy, "teacher": teacher, **WHERE}
        out = divide_tokens(tokens, prefix, ids, logits_BL=logits, **options)
        part = sample_partition(logits, ids, **options)
        assert all(torch.equal(a, b) for a, b in zip(out.partition, part, strict=True))
        assert torch.equal(out.visible, gather_tokens(tokens, part.ids_visible_BK, prefix))
        assert out.masked.shape == (3, 2 + (teacher or 14), 8)
        assert torch.equal(out.masked, gather_tokens(tokens, part.ids_teacher_BT, prefix))


def test_gradient_comes_from_the_visible_set_alone():
    tokens, prefix, ids = made()
    out = divide_tokens(tokens, prefix, ids, logits_BL=torch.randn(3, 20), **WHERE)
    assert not out.masked.requires_grad
    out.visible.sum().backward()
    for b in range(3):
        touched = tokens.grad[b].abs().sum(1).nonzero()[:, 0].tolist()
        assert touched == out.partition.ids_visible_BK[b].tolist()
    assert torch.equal(prefix.grad, torch.full_like(prefix, 3.0))


def test_without_the_masked_set():
    tokens, prefix, ids = made()
    assert divide_tokens(tokens, prefix, ids, strategy="random", with_masked=False, **WHERE).masked is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (4, 4)}, r"grid=\(4, 4\) has 16 patches, tokens have 20"),
        ({}, "strategy=importance_sampling needs logits"),
        ({"keep": 20}, r"keep=20 must be in 1\.\.19"),
        ({"epoch": 2**32, "strategy": "random"}, r"epoch=4294967296 must be in 0\.\.4294967295"),
        ({"seed": -1, "strategy": "random"}, "seed=-1 must be in"),
        ({"logits_BL": torch.zeros(1, 20)}, r"logits are \[1, 20\], expected \[3, 20\]"),
        ({"prefix_PD": torch.zeros(8)}, r"prefix \[8\] must be \[P, 8\]"),
        ({"ids_B": torch.arange(1)}, r"ids are \[1\], expected \[3\]"),
    ],
)
def test_errors(options, message):
    tokens, prefix, ids = made()
    with pytest.raises(ValueError, match=message):
        divide_tokens(**{"tokens_BLD": tokens, "prefix_PD": prefix, "ids_B": ids, **WHERE, **options})


STRATEGIES = ["random", "block", "importance", "importance_sampling"]
# (B, grid, K, P, D): ViT-B, odd, the smallest, registers, 576 patches, widths past a tile of columns.
SHAPES = [
    (2, (14, 14), 49, 1, 768),
    (3, (3, 5), 7, 2, 7),
    (1, (1, 2), 1, 1, 1),
    (2, (4, 8), 31, 5, 32),
    (1, (24, 24), 144, 1, 48),
    (1, (3, 6), 1, 1, 2048),
]


def given(shape, dtype, device):
    B, grid, K, P, D = shape
    tokens = torch.randn(B, grid[0] * grid[1], D, device=device) * 2 + 0.5
    # Float32 values that are exact in every dtype: the interpreter truncates where hardware rounds to bfloat16.
    prefix, ids = torch.randn(P, D, device=device).bfloat16().float(), torch.arange(B, device=device) * 2**31 + 3
    return tokens.to(dtype), prefix, ids, {"grid": grid, "keep": K, "seed": 2, "epoch": 1}


@pytest.mark.fault("dropped [CLS] row of the masked set", "tl.where(T > 0, P, 0), D", "tl.where(T > 0, 0, 0), D")
@pytest.mark.fault("the first masked patch left out", "(row >= K) & (row < K + T)", "(row > K) & (row < K + T)")
@pytest.mark.fault("more rows than the teacher's", "(row >= K) & (row < K + T)", "(row >= K)")
@pytest.mark.fault(
    "the teacher's rows taken as the visible ones", "ids_teacher_ptr + image * T", "ids_visible_ptr + image * K"
)
@pytest.mark.parametrize("with_masked", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernel_equals_reference(strategy, with_masked, device):
    """Of the teacher's sets all sizes are here: one patch, some, all."""
    whole = strategy == "importance_sampling" and with_masked
    for place, shape in enumerate(SHAPES if whole else SHAPES[1:4]):
        tokens, prefix, ids, where = given(shape, torch.float32, device)
        logits = torch.randn(tokens.shape[:2], device=device) if strategy.startswith("importance") else None
        masked = tokens.shape[1] - where["keep"]
        teacher = (None, 1, max(1, masked // 3))[place % 3] if with_masked else None
        options = {"strategy": strategy, "with_masked": with_masked, "block_min": 1, "teacher": teacher, **where}
        options["logits_BL"] = logits
        ours = divide_tokens(tokens, prefix, ids, kernels="triton", **options)
        expected = divide_tokens(tokens, prefix, ids, kernels="reference", **options)
        assert all(torch.equal(a, b) for a, b in zip(ours.partition, expected.partition, strict=True))
        assert torch.equal(ours.visible, expected.visible)
        assert ours.masked is None if expected.masked is None else torch.equal(ours.masked, expected.masked)
        assert (ours.logits is None) == (expected.logits is None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_gradients(shape, dtype, device):
    tokens, prefix, ids, where = given(shape, dtype, device)
    logits = torch.randn(tokens.shape[:2], device=device)

    def visible(tokens, prefix, kernels):
        return divide_tokens(tokens, prefix, ids, logits_BL=logits, kernels=kernels, **where).visible

    compare(visible, {"tokens": tokens, "prefix": prefix}, ["tokens", "prefix"], str(shape))


def test_kernel_gives_gradient_to_the_visible_set_alone(device):
    tokens, prefix, ids, where = given(SHAPES[1], torch.float32, device)
    out = divide_tokens(tokens.requires_grad_(), prefix, ids, strategy="random", kernels="triton", **where)
    assert out.visible.requires_grad
    assert not out.masked.requires_grad


def test_kernel_flags_rows_with_nan(device):
    tokens, prefix, ids, where = given((3, (4, 4), 4, 1, 24), torch.float32, device)
    logits = torch.randn(3, 16, device=device)
    logits[1, 5] = float("nan")
    for kernels in ("triton", "reference"):
        out = divide_tokens(tokens, prefix, ids, logits_BL=logits, kernels=kernels, **where)
        assert out.partition.nan_B.tolist() == [False, True, False]
        assert 5 in out.partition.ids_masked_BM[1].tolist()


@pytest.mark.fault("wrong stride between tokens", "index * stride_l)", "index * D)")
def test_kernel_takes_strided_tokens(device):
    tokens, prefix, ids, where = given((4, (3, 5), 7, 1, 32), torch.float32, device)
    where |= {"strategy": "random", "kernels": "triton"}
    expected = divide_tokens(tokens, prefix, ids, **where)
    outer = torch.zeros(4, 16, 40, device=device)
    outer[:, 1:, :32] = tokens
    for strided in (outer[:, 1:, :32], tokens.transpose(0, 1).contiguous().transpose(0, 1)):
        out = divide_tokens(strided, prefix, ids, **where)
        assert torch.equal(out.visible, expected.visible)
        assert torch.equal(out.masked, expected.masked)


@pytest.mark.parametrize("teacher", [None, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernel_is_two_launches(strategy, teacher, device):
    tokens, prefix, ids, where = given(SHAPES[1], torch.float32, device)
    logits = torch.randn(tokens.shape[:2], device=device)
    options = {"strategy": strategy, "teacher": teacher, "kernels": "triton", **where}
    with recorded(run=True) as launches:
        divide_tokens(tokens, prefix, ids, logits_BL=logits, **options)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["ccmim_sample_partition_kernel", "ccmim_divide_tokens_kernel"]


@pytest.mark.fault(
    "one epoch for all images",
    "tl.load(epochs_ptr + image)",
    "tl.load(epochs_ptr)",
    file="triton_impl/sample_partition.py",
)
def test_each_image_has_its_epoch(device):
    """A batch may cross from one epoch into the next."""
    tokens, prefix, ids, where = given((3, (4, 4), 4, 1, 16), torch.float32, device)
    options = {**where, "kernels": "triton"}
    logits, epochs = torch.randn(3, 16, device=device), torch.tensor([0, 2**32 - 1, 7], device=device)
    together = divide_tokens(tokens, prefix, ids, logits_BL=logits, **options | {"epoch": epochs})
    for i in range(3):
        one = slice(i, i + 1)
        alone = divide_tokens(
            tokens[one], prefix, ids[one], logits_BL=logits[one], **options | {"epoch": int(epochs[i])}
        )
        assert torch.equal(together.partition.ids_restore_BL[one], alone.partition.ids_restore_BL)
        assert torch.equal(together.visible[one], alone.visible)


@pytest.mark.parametrize("with_masked", [True, False])
def test_opcheck(with_masked, device):
    tokens, prefix, ids, where = given((2, (2, 4), 3, 1, 6), torch.float32, device)
    part = sample_partition(None, ids, strategy="random", teacher=2, **where)
    leaves = tokens.requires_grad_(), prefix.requires_grad_()
    torch.library.opcheck(_divide_tokens, (*leaves, part.ids_visible_BK, part.ids_teacher_BT if with_masked else None))


def test_a_new_batch_size_is_not_a_new_graph(device):
    """The fakes hand symbolic sizes on: the first size is compiled, the next makes it dynamic, the rest reuse it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def visible(projected, prefix, ids):
        tokens = embed_tokens(projected, positions[1:], positions[0], kernels="triton").tokens
        out = divide_tokens(
            tokens, prefix, ids, strategy="random", grid=(4, 4), keep=4, seed=0, epoch=0, kernels="triton"
        )
        grid = restore_tokens(out.visible, prefix[0], out.partition.ids_restore_BL, tokens[0, :1] * 0 + positions)
        return grid + gather_tokens(tokens, out.partition.ids_visible_BK, kernels="triton").sum()

    positions = torch.zeros(17, 8, device=device)
    compiled = torch.compile(visible, backend=backend, fullgraph=True)
    for batch in (3, 4, 5, 6):
        compiled(*given((batch, (4, 4), 4, 1, 8), torch.float32, device)[:3])
    assert len(graphs) == 2
