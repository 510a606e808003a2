"""`divide_tokens` is score, sample and gather in one: it must equal the three done apart."""

import pytest
import torch
from ops.gold import DTYPES, assert_close_to_gold, compare

from ccmim_kernels import divide_tokens, gather_tokens, restore_tokens, sample_partition
from ccmim_kernels.divide_tokens import _divide_tokens
from ccmim_kernels.triton_impl.launch import recorded

GRID = (4, 5)
WHERE = {"grid": GRID, "keep": 6, "seed": 2, "epoch": 1}


def made(dtype=torch.float64):
    tokens = torch.randn(3, 20, 8, dtype=dtype, requires_grad=True)
    prefix = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    return tokens, prefix, torch.tensor([5, 0, 9])


def test_direction_equals_layer_norm_written_as_loops():
    tokens, prefix, ids = made()
    direction = torch.randn(8, dtype=torch.float64)
    out = divide_tokens(tokens, prefix, ids, direction_D=direction, eps=1e-6, **WHERE)
    for b in range(3):
        for i in range(20):
            x = tokens[b, i].tolist()
            mean = sum(x) / 8
            var = sum((v - mean) ** 2 for v in x) / 8
            expected = sum((v - mean) / (var + 1e-6) ** 0.5 * d for v, d in zip(x, direction.tolist()))
            assert out.logits[b, i].item() == pytest.approx(expected, rel=1e-12)
    alone = sample_partition(out.logits, ids, **WHERE)
    assert torch.equal(out.partition.mask_BL, alone.mask_BL)


@pytest.mark.parametrize("strategy", ["random", "block", "importance", "importance_sampling"])
def test_equals_its_parts(strategy):
    tokens, prefix, ids = made()
    logits = torch.randn(3, 20) if strategy.startswith("importance") else None
    out = divide_tokens(tokens, prefix, ids, logits_BL=logits, strategy=strategy, **WHERE)
    part = sample_partition(logits, ids, strategy=strategy, **WHERE)
    assert all(torch.equal(a, b) for a, b in zip(out.partition, part))
    assert torch.equal(out.visible, gather_tokens(tokens, part.ids_visible_BK, prefix))
    assert torch.equal(out.masked, gather_tokens(tokens, part.ids_masked_BM, prefix))


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
        ({"logits_BL": torch.zeros(3, 20), "direction_D": torch.zeros(8)}, "needs either logits or direction, got 2"),
        ({}, "needs either logits or direction, got 0"),
        ({"keep": 20}, r"keep=20 must be in 1\.\.19"),
        ({"epoch": 2**32, "strategy": "random"}, r"epoch=4294967296 must be in 0\.\.4294967295"),
        ({"seed": -1, "strategy": "random"}, "seed=-1 must be in"),
        ({"logits_BL": torch.zeros(1, 20)}, r"logits are \[1, 20\], expected \[3, 20\]"),
        ({"direction_D": torch.zeros(5)}, r"direction is \[5\], expected \[8\]"),
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


@pytest.mark.fault("LayerNorm: deviations between tiles of columns left out", " + step * step * (start * share)", "")
@pytest.mark.fault(
    "LayerNorm: masked columns counted",
    "x = tl.where(inside[None, :], x - mean_new[:, None], 0.0)",
    "x = x - mean_new[:, None]",
)
@pytest.mark.fault(
    "scores read without a barrier",
    "tl.store(logits_ptr + row, logits, mask=row < L)\n    tl.debug_barrier()",
    "tl.store(logits_ptr + row, logits, mask=row < L)",
)
@pytest.mark.fault("places read without a barrier", "is read below.\n    tl.debug_barrier()\n", "is read below.\n")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_scores_like_gold(shape, dtype, device):
    tokens, prefix, ids, where = given(shape, dtype, device)
    direction = torch.randn(shape[-1], device=device)
    ours, eager = (
        divide_tokens(tokens, prefix, ids, direction_D=direction, kernels=k, **where) for k in ("triton", "reference")
    )
    gold = divide_tokens(tokens.double(), prefix.double(), ids, direction_D=direction.double(), **where)
    assert_close_to_gold(ours.logits, eager.logits, gold.logits, "logits")
    # The partition is that of the kernel's own float32 scores, bit for bit; both sets are copies.
    parts = divide_tokens(tokens, prefix, ids, logits_BL=ours.logits, kernels="reference", **where)
    assert all(torch.equal(a, b) for a, b in zip(ours.partition, parts.partition))
    assert torch.equal(ours.visible, parts.visible)
    assert torch.equal(ours.masked, parts.masked)


@pytest.mark.fault(
    "dropped [CLS] row of the masked set",
    "copy_prefix(prefix_ptr, masked_ptr, P, D, BLOCK_D)",
    "copy_prefix(prefix_ptr, masked_ptr, 0, D, BLOCK_D)",
)
@pytest.mark.parametrize("with_masked", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernel_equals_reference(strategy, with_masked, device):
    for shape in SHAPES[:4]:
        tokens, prefix, ids, where = given(shape, torch.float32, device)
        logits = torch.randn(tokens.shape[:2], device=device) if strategy.startswith("importance") else None
        options = {"logits_BL": logits, "strategy": strategy, "with_masked": with_masked, "block_min": 1, **where}
        ours = divide_tokens(tokens, prefix, ids, kernels="triton", **options)
        expected = divide_tokens(tokens, prefix, ids, kernels="reference", **options)
        assert all(torch.equal(a, b) for a, b in zip(ours.partition, expected.partition))
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
    tokens.requires_grad_()
    direction = torch.randn(tokens.shape[-1], device=device)
    out = divide_tokens(tokens, prefix, ids, direction_D=direction, kernels="triton", **where)
    assert out.visible.requires_grad
    assert not out.masked.requires_grad
    assert not out.logits.requires_grad


def test_kernel_on_tokens_far_from_zero(device):
    """Rows have mean 1000 and deviation 1: E[x^2] - E[x]^2 would lose all digits."""
    tokens, prefix, ids, where = given((2, (4, 4), 4, 1, 700), torch.float32, device)
    tokens, direction = tokens + 1000, torch.randn(700, device=device)
    results = [
        divide_tokens(tokens.to(t), prefix, ids, direction_D=direction, kernels=k, **where).logits
        for t, k in ((torch.float32, "triton"), (torch.float32, "reference"), (torch.float64, "reference"))
    ]
    assert_close_to_gold(*results, "logits")


def test_kernel_on_constant_tokens(device):
    """Without variance LN gives zeros: all scores are equal, the partition is the noise's alone."""
    tokens, prefix, ids, where = given((2, (4, 4), 4, 1, 24), torch.float32, device)
    tokens = torch.full_like(tokens, 3.0)
    out = divide_tokens(tokens, prefix, ids, direction_D=torch.randn(24, device=device), kernels="triton", **where)
    assert torch.equal(out.logits, torch.zeros_like(out.logits))
    alone = sample_partition(torch.zeros_like(out.logits), ids, **where)
    assert torch.equal(out.partition.mask_BL, alone.mask_BL)


def test_kernel_flags_rows_with_nan(device):
    tokens, prefix, ids, where = given((3, (4, 4), 4, 1, 24), torch.float32, device)
    tokens[1, 5, 3] = float("nan")
    direction = torch.randn(24, device=device)
    for kernels in ("triton", "reference"):
        out = divide_tokens(tokens, prefix, ids, direction_D=direction, kernels=kernels, **where)
        assert out.partition.nan_B.tolist() == [False, True, False]
        assert 5 in out.partition.ids_masked_BM[1].tolist()


@pytest.mark.fault(
    "wrong stride between tokens",
    "source = tokens_ptr + (row.to(tl.int64) * stride_l)[:, None]",
    "source = tokens_ptr + (row.to(tl.int64) * D)[:, None]",
)
def test_kernel_takes_strided_tokens(device):
    tokens, prefix, ids, where = given((4, (3, 5), 7, 1, 32), torch.float32, device)
    direction = torch.randn(32, device=device)
    expected = divide_tokens(tokens, prefix, ids, direction_D=direction, kernels="triton", **where)
    outer = torch.zeros(4, 16, 40, device=device)
    outer[:, 1:, :32] = tokens
    for strided in (outer[:, 1:, :32], tokens.transpose(0, 1).contiguous().transpose(0, 1)):
        out = divide_tokens(strided, prefix, ids, direction_D=direction, kernels="triton", **where)
        assert torch.equal(out.visible, expected.visible)
        assert torch.equal(out.masked, expected.masked)


def test_kernel_is_one_launch(device):
    tokens, prefix, ids, where = given(SHAPES[1], torch.float32, device)
    with recorded(run=True) as launches:
        divide_tokens(tokens, prefix, ids, direction_D=torch.randn(7, device=device), kernels="triton", **where)
    assert [launch.kernel.__name__ for launch in launches] == ["ccmim_divide_tokens_kernel"]


def test_kernel_is_the_same_every_time(device):
    tokens, prefix, ids, where = given(SHAPES[0], torch.bfloat16, device)
    direction = torch.randn(768, device=device)
    first, second = (
        divide_tokens(tokens, prefix, ids, direction_D=direction, kernels="triton", **where) for _ in range(2)
    )
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.masked, second.masked)


@pytest.mark.fault("one epoch for all images", "tl.load(epochs_ptr + image)", "tl.load(epochs_ptr)")
def test_each_image_has_its_epoch(device):
    """A batch may cross from one epoch into the next."""
    tokens, prefix, ids, where = given((3, (4, 4), 4, 1, 16), torch.float32, device)
    options = {**where, "direction_D": torch.randn(16, device=device), "kernels": "triton"}
    epochs = torch.tensor([0, 2**32 - 1, 7], device=device)
    together = divide_tokens(tokens, prefix, ids, **options | {"epoch": epochs})
    for i in range(3):
        one = slice(i, i + 1)
        alone = divide_tokens(tokens[one], prefix, ids[one], **options | {"epoch": int(epochs[i])})
        assert torch.equal(together.partition.ids_restore_BL[one], alone.partition.ids_restore_BL)
        assert torch.equal(together.visible[one], alone.visible)


@pytest.mark.parametrize("with_masked", [True, False])
def test_opcheck(with_masked, device):
    tokens, prefix, ids, _ = given((2, (2, 4), 3, 1, 6), torch.float32, device)
    sampling = {
        "keep": 3,
        "seed": 0,
        "epoch": torch.ones(2, dtype=torch.int64, device=device),
        "strategy": "importance",
        "noise": "gumbel",
        "temperature": 1.0,
    }
    rest = {"eps": 1e-6, "with_masked": with_masked, **sampling}
    leaves = tokens.requires_grad_(), prefix.requires_grad_(), ids
    torch.library.opcheck(_divide_tokens, (*leaves, None, torch.randn(6, device=device)), rest)
    torch.library.opcheck(_divide_tokens, (*leaves, torch.randn(2, 8, device=device), None), rest)


def test_half_precision_direction_still_scores_in_float32(device):
    tokens, prefix, ids, where = given((2, (4, 4), 4, 1, 24), torch.bfloat16, device)
    direction = torch.randn(24, device=device).bfloat16()
    ours, expected = (
        divide_tokens(tokens, prefix, ids, direction_D=direction, kernels=k, **where) for k in ("triton", "reference")
    )
    assert ours.logits.dtype == expected.logits.dtype == torch.float32
    torch.testing.assert_close(ours.logits, expected.logits)


def test_a_new_batch_size_is_not_a_new_graph(device):
    """The fakes hand symbolic sizes on: the first size is compiled, the next makes it dynamic, the rest reuse it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def visible(tokens, prefix, ids):
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
