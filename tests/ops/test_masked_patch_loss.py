"""Eq. 9 with and without norm_pix equals loops over images, patches and pixels; the kernel is near gold."""

import math

import pytest
import torch
from ops.gold import DTYPES, compare

from ccmim_kernels import masked_patch_loss, masked_target, patchify, unpatchify
from ccmim_kernels.triton_impl.launch import INTERPRETED

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def stats(channels):
    return (
        torch.tensor((MEAN * 3)[:channels], dtype=torch.float64),
        torch.tensor((STD * 3)[:channels], dtype=torch.float64),
    )


def target_by_loops(image, patch_index, patch, norm_pix):
    """List the values of one patch in (row, column, channel) order; `image` is a nested list [H][W][C]."""
    columns, channels = len(image[0]) // patch, len(image[0][0])
    top, left = patch_index // columns * patch, patch_index % columns * patch
    values = [
        (image[top + y][left + x][c] / 255 - (MEAN * 3)[c]) / (STD * 3)[c]
        for y in range(patch)
        for x in range(patch)
        for c in range(channels)
    ]
    if norm_pix:
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        values = [(v - mean) / math.sqrt(var + 1e-6) for v in values]
    return values


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("size", "patch", "channels"), [((6, 10), 2, 3), ((8, 4), 4, 1), ((5, 5), 5, 4)])
def test_against_loops(norm_pix, size, patch, channels):
    images = torch.randint(0, 256, (2, *size, channels), dtype=torch.uint8)
    patches = size[0] // patch * (size[1] // patch)
    ids = torch.stack([torch.randperm(patches)[: max(1, patches // 2)].sort().values for _ in range(2)])
    pred = torch.randn(2, ids.shape[1], patch * patch * channels, dtype=torch.float64, requires_grad=True)
    mean, std = stats(channels)
    loss = masked_patch_loss(pred, images, ids, patch=patch, mean_C=mean, std_C=std, norm_pix=norm_pix)
    total, count = 0.0, 0
    for b in range(2):
        for m, index in enumerate(ids[b].tolist()):
            target = target_by_loops(images[b].tolist(), index, patch, norm_pix)
            total += sum((p - t) ** 2 for p, t in zip(pred[b, m].tolist(), target))
            count += len(target)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    loss.backward()
    mine = masked_target(images, ids, patch, mean, std, norm_pix)
    torch.testing.assert_close(pred.grad, 2 * (pred.detach() - mine) / count)


def test_constant_image_is_finite():
    images = torch.full((1, 4, 4, 3), 128, dtype=torch.uint8)
    mean, std = stats(3)
    pred = torch.zeros(1, 4, 12, dtype=torch.float64)
    loss = masked_patch_loss(pred, images, torch.arange(4)[None], patch=2, mean_C=mean, std_C=std)
    assert loss.isfinite()


def test_half_precision_prediction_gives_a_float32_loss():
    images = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    mean, std = (s.float() for s in stats(3))
    loss = masked_patch_loss(
        torch.zeros(1, 4, 12).bfloat16(), images, torch.arange(4)[None], patch=2, mean_C=mean, std_C=std
    )
    assert loss.dtype == torch.float32


def kernel_inputs(batch, size, patch, channels, masked, dtype, device):
    """Make predictions, images, ids and float32 statistics, as `masked_patch_loss` names them."""
    patches = size[0] // patch * (size[1] // patch)
    ids = torch.stack([torch.randperm(patches)[:masked] for _ in range(batch)])
    inputs = {
        "pred_BMP": torch.randn(batch, masked, patch * patch * channels).to(dtype),
        "images_BHWC": torch.randint(0, 256, (batch, *size, channels), dtype=torch.uint8),
        "ids_masked_BM": ids,
        "mean_C": stats(channels)[0].float(),
        "std_C": stats(channels)[1].float(),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def compare_loss(inputs, **options):
    """Compare loss and gradient with gold."""
    if not (INTERPRETED and inputs["pred_BMP"].dtype == torch.bfloat16):
        return compare(masked_patch_loss, inputs, ["pred_BMP"], **options)
    # Triton's interpreter truncates to bfloat16, an error of 2**-7 in the residual, before the gradient's own of 2**-8.
    compare(masked_patch_loss, inputs, [], **options)
    grads = []
    for kernels in ("triton", "reference"):
        pred = inputs["pred_BMP"].clone().requires_grad_()
        masked_patch_loss(**inputs | {"pred_BMP": pred}, kernels=kernels, **options).backward()
        grads.append(pred.grad)
    # A prediction may be within a rounding error of its target, of at most 3 standard deviations.
    rounding = 2 / inputs["pred_BMP"].numel() * 4 * torch.finfo(torch.float32).eps * 3
    torch.testing.assert_close(*grads, rtol=4 * 2**-8, atol=rounding)


@pytest.mark.fault("channels rotated", "step % CHANNELS == q", "(step + 1) % CHANNELS == q")
@pytest.mark.fault("biased variance", "/ (LENGTH - 1)", "/ LENGTH")
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "size", "patch", "channels", "masked"),
    [
        (2, (224, 224), 16, 3, 147),  # ViT-B/16
        (1, (42, 70), 14, 3, 9),  # rows that are no multiple of 16 bytes, patches no multiple of 256 entries
        (3, (25, 15), 5, 1, 1),
        (2, (10, 35), 5, 4, 13),
        (4, (32, 32), 32, 3, 1),
        (5, (8, 8), 2, 3, 16),
        (1, (48, 48), 48, 3, 1),  # a patch of several warps
        (1, (15, 20), 5, 7, 11),
    ],
)
def test_kernel_against_gold(batch, size, patch, channels, masked, dtype, norm_pix, device):
    inputs = kernel_inputs(batch, size, patch, channels, masked, dtype, device)
    compare_loss(inputs, patch=patch, norm_pix=norm_pix)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("size", "patch", "channels"), [((32, 48), 16, 3), ((10, 35), 5, 4), ((15, 20), 5, 1)])
def test_kernel_on_float32_images(size, patch, channels, norm_pix, device):
    """Pixels between bytes, below black and beyond white, as wide images have."""
    inputs = kernel_inputs(2, size, patch, channels, 4, torch.float32, device)
    inputs["images_BHWC"] = 400 * torch.rand(inputs["images_BHWC"].shape, device=device) - 100
    compare(masked_patch_loss, inputs, ["pred_BMP"], patch=patch, norm_pix=norm_pix)
    bytes_too = inputs | {"images_BHWC": inputs["images_BHWC"].clamp(0, 255).to(torch.uint8)}
    floats = bytes_too | {"images_BHWC": bytes_too["images_BHWC"].float()}
    for kernels in ("triton", "reference"):
        losses = [
            masked_patch_loss(**one, patch=patch, norm_pix=norm_pix, kernels=kernels) for one in (bytes_too, floats)
        ]
        assert torch.equal(*losses)


@pytest.mark.fault("mean of large numbers", "u * a + b - first", "u * a + b")
@pytest.mark.parametrize("value", [0, 77, 255])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", [5, 16])
def test_kernel_on_patches_without_variance(value, channels, patch, device):
    inputs = kernel_inputs(1, (2 * patch, 2 * patch), patch, channels, 3, torch.float32, device)
    inputs["images_BHWC"] = torch.full_like(inputs["images_BHWC"], value)
    # The same statistics in every channel, so that the normalised patch is constant too.
    inputs["mean_C"], inputs["std_C"] = (torch.full_like(inputs["mean_C"], x) for x in (0.45, 0.23))
    compare(masked_patch_loss, inputs, ["pred_BMP"], patch=patch)
    loss = masked_patch_loss(**inputs, patch=patch, kernels="triton")
    # The target is exactly zero.
    torch.testing.assert_close(loss, inputs["pred_BMP"].square().mean())


def test_kernel_on_patches_of_little_variance(device):
    """One pixel differs by 1: the variance is 1e-8 of the squared mean, and would drown in E[x^2] - E[x]^2."""
    inputs = kernel_inputs(2, (32, 32), 16, 1, 4, torch.float32, device)
    images = torch.full_like(inputs["images_BHWC"], 254)
    images[:, 3::16, 5::16] = 255
    compare(masked_patch_loss, inputs | {"images_BHWC": images}, ["pred_BMP"], patch=16)


@pytest.mark.fault(
    "loss gradient 1 % off",
    "2 * grad / residual_BMP.numel()",
    "2.02 * grad / residual_BMP.numel()",
    file="masked_patch_loss.py",
)
@pytest.mark.parametrize(("spread", "grad"), [(1, 65536), (1e4, 1)])
def test_kernel_gradient_does_not_underflow(spread, grad, device):
    """2 / count is below float16's normal range, its product with GradScaler's 65536 or a large residual is not."""
    inputs = kernel_inputs(2, (224, 224), 16, 3, 147, torch.float16, device)
    pred = inputs.pop("pred_BMP") * spread
    grads = {}
    for kernels, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaf = pred.to(dtype, copy=True).requires_grad_()
        loss = masked_patch_loss(leaf, **inputs, patch=16, kernels=kernels)
        (grads[kernels],) = torch.autograd.grad(loss, leaf, torch.tensor(grad, device=device).to(loss))
    assert grads["triton"].dtype == torch.float16
    assert (grads["triton"] != 0).float().mean() > 0.999
    torch.testing.assert_close(grads["triton"].double(), grads["reference"], rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_takes_any_strides(dtype, device):
    inputs = kernel_inputs(2, (20, 30), 5, 3, 7, dtype, device)
    plain = masked_patch_loss(**inputs, patch=5, kernels="triton")
    strided = {
        "pred_BMP": inputs["pred_BMP"].transpose(1, 2).contiguous().transpose(1, 2),
        "images_BHWC": inputs["images_BHWC"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "ids_masked_BM": inputs["ids_masked_BM"].t().contiguous().t(),
        "mean_C": inputs["mean_C"].repeat_interleave(2)[::2],
        "std_C": inputs["std_C"].repeat_interleave(2)[::2],
    }
    assert not any(x.is_contiguous() for x in strided.values())
    assert torch.equal(masked_patch_loss(**strided, patch=5, kernels="triton"), plain)
    compare_loss(strided, patch=5)


def test_kernel_gives_the_same_bits_in_every_run(device):
    inputs = kernel_inputs(3, (70, 42), 14, 3, 11, torch.bfloat16, device)
    runs = []
    for _ in range(2):
        pred = inputs["pred_BMP"].clone().requires_grad_()
        loss = masked_patch_loss(**inputs | {"pred_BMP": pred}, patch=14, kernels="triton")
        runs.append((loss, *torch.autograd.grad(loss, pred)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_a_proper_custom_op(dtype, device):
    pred, images, ids, mean, std = kernel_inputs(2, (20, 30), 5, 3, 7, dtype, device).values()
    for norm_pix in (True, False):
        arguments = (pred.clone().requires_grad_(), images, ids, 5, mean, std, norm_pix)
        torch.library.opcheck(torch.ops.ccmim.masked_patch_loss.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_compiled_equals_eager(dtype, device):
    inputs = kernel_inputs(2, (20, 30), 5, 3, 7, dtype, device)

    def loss_of(pred):
        return masked_patch_loss(**{**inputs, "pred_BMP": pred * 2}, patch=5, kernels="triton") * 3

    results = []
    for run in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        pred = inputs["pred_BMP"].clone().requires_grad_()
        loss = run(pred)
        results.append((loss, *torch.autograd.grad(loss, pred)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_kernel_refuses_float64(device):
    inputs = kernel_inputs(1, (4, 4), 2, 3, 2, torch.float32, device)
    for name in ("pred_BMP", "mean_C"):
        wide = inputs | {name: inputs[name].double()}
        with pytest.raises(ValueError, match=r"kernels=triton takes float32, float16 or bfloat16, got torch\.float64"):
            masked_patch_loss(**wide, patch=2, kernels="triton")


def test_kernel_refuses_large_patches(device):
    inputs = kernel_inputs(1, (75, 75), 75, 3, 1, torch.float32, device)
    with pytest.raises(ValueError, match=r"patch \* patch \* channels=16875 must be at most 16384 for kernels=triton"):
        masked_patch_loss(**inputs, patch=75, kernels="triton")


def test_patchify_order_and_inverse():
    images = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 of image 1 covers rows 2-3 and columns 2-3; value 7 is row 1, column 0, channel 1.
    assert patches[1, 4, 7] == images[1, 3, 2, 1]
    assert torch.equal(unpatchify(patches, 2, 4, 6), images)


def test_errors():
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    mean, std = stats(3)
    with pytest.raises(ValueError, match=r"prediction is \[1, 3, 12\], expected \[1, 4, 12\]"):
        masked_patch_loss(torch.zeros(1, 3, 12), images, torch.arange(4)[None], patch=2, mean_C=mean, std_C=std)
    with pytest.raises(ValueError, match=r"images are torch\.int16, expected torch\.uint8 or torch\.float32"):
        masked_patch_loss(torch.zeros(1, 4, 12), images.short(), torch.arange(4)[None], patch=2, mean_C=mean, std_C=std)
    with pytest.raises(ValueError, match="image 4x4 is no multiple of patch=3"):
        patchify(images, 3)
    with pytest.raises(ValueError, match="image 4x4 is no multiple of patch=3"):
        masked_patch_loss(torch.zeros(1, 4, 27), images, torch.arange(4)[None], patch=3, mean_C=mean, std_C=std)
    with pytest.raises(ValueError, match="images are 1, ids are of 2"):
        masked_patch_loss(torch.zeros(2, 4, 12), images, torch.arange(4).expand(2, 4), patch=2, mean_C=mean, std_C=std)
    with pytest.raises(ValueError, match="mean_C and std_C have 2 and 3 entries, expected 3"):
        masked_patch_loss(torch.zeros(1, 4, 12), images, torch.arange(4)[None], patch=2, mean_C=mean[:2], std_C=std)
