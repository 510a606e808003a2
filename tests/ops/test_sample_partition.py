"""Dividing strategies equal loops and have exact probabilities, and a mask depends on its key alone."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ccmim_kernels import partition_from_mask, sample_partition
from ccmim_kernels.block_keys import BLOCKS, block_keys
from ccmim_kernels.philox import STREAM_BLOCK, keyed_uniform, philox_4x32, stream_key, to_unit
from ccmim_kernels.sample_partition import _sample_partition
from ccmim_kernels.triton_impl.launch import recorded

STRATEGIES = ["random", "block", "importance", "importance_sampling"]


def divide(logits, ids, keep, grid, **options):
    options = {"seed": 0, "epoch": 0, **options}
    return sample_partition(logits, ids, keep=keep, grid=grid, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("grid", "keep"), [((14, 14), 49), ((8, 8), 16), ((3, 5), 1), ((3, 5), 14), ((1, 2), 1)])
def test_is_a_partition(strategy, grid, keep):
    patches = grid[0] * grid[1]
    part = divide(torch.randn(5, patches), torch.arange(5), keep, grid, strategy=strategy)
    for b in range(5):
        visible, masked = part.ids_visible_BK[b].tolist(), part.ids_masked_BM[b].tolist()
        assert len(visible) == keep
        assert sorted(visible) == visible
        assert sorted(masked) == masked
        assert sorted(visible + masked) == list(range(patches))
        assert [(visible + masked)[r] for r in part.ids_restore_BL[b]] == list(range(patches))
        assert part.mask_BL[b].nonzero()[:, 0].tolist() == masked
    assert part.ids_teacher_BT is part.ids_masked_BM


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_teacher_sees_the_masked_patches_with_the_largest_noise_of_its_stream(strategy):
    """The rest of the partition is as without a teacher; the draw by loops over samples and patches."""
    logits, ids = torch.randn(4, 30), torch.tensor([0, 7, 2**33 + 5, 2**32 - 1])
    epochs = torch.tensor([0, 1, 2**32 - 1, 3])
    options = {"strategy": strategy, "seed": 2**31 + 3, "epoch": epochs}
    whole = divide(logits, ids, 9, (5, 6), **options)
    for teacher in (1, 7, 20, 21):
        part = divide(logits, ids, 9, (5, 6), teacher=teacher, **options)
        assert all(torch.equal(a, b) for a, b in zip(part[:5], whole[:5], strict=True))
        assert part.ids_teacher_BT.dtype == torch.int64
        for b in range(4):
            noise = {}
            for patch in part.ids_masked_BM[b].tolist():
                counters = (patch, int(ids[b]) & 0xFFFFFFFF, int(ids[b]) >> 32, int(epochs[b]))
                noise[patch] = philox_4x32(stream_key(2**31 + 3, 6), *map(torch.tensor, counters))[0].item()
            assert part.ids_teacher_BT[b].tolist() == sorted(sorted(noise, key=lambda i: -noise[i])[:teacher])


@pytest.mark.parametrize("strategy", ["random", "importance"])
def test_every_masked_patch_is_as_likely_to_be_seen_by_the_teacher(strategy):
    """Chi-square over all 10 sets of 2 of 5 masked patches: the 99.9 % quantile for 9 degrees of freedom is 27.88.

    With random masks too: the noise that masked a patch says nothing of whether the teacher sees it.
    """
    draws = 10_000
    logits = torch.arange(8.0).expand(draws, 8)
    part = divide(logits, torch.arange(draws), 3, (2, 4), strategy=strategy, teacher=2)
    places = (part.ids_masked_BM[:, :, None] == part.ids_teacher_BT[:, None]).any(2)
    if strategy == "random":  # the masked patches from the smallest noise to the largest
        noise = keyed_uniform(0, 0, torch.arange(draws), 8).gather(1, part.ids_masked_BM)
        places = places.gather(1, noise.argsort(1))
    seen = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for row in places:
        seen[tuple(row.nonzero()[:, 0].tolist())] += 1
    assert sum((count - draws / 10) ** 2 / (draws / 10) for count in seen.values()) < 27.88


@pytest.mark.parametrize("more", [{}, {"important": (0, 30), "hints": (0, 9), "temperature": (4.0, 1.0), "epochs": 8}])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mask_does_not_depend_on_the_batch(strategy, more):
    logits, ids = torch.randn(12, 49), torch.arange(12) * 1000
    options = {"strategy": strategy, "epoch": 3, "seed": 5, **more}
    whole = divide(logits, ids, 12, (7, 7), **options).mask_BL
    order = torch.randperm(12)
    again = divide(logits[order], ids[order], 12, (7, 7), **options).mask_BL
    assert torch.equal(again, whole[order])
    single = [divide(logits[i : i + 1], ids[i : i + 1], 12, (7, 7), **options) for i in range(12)]
    assert torch.equal(torch.cat([s.mask_BL for s in single]), whole)


@pytest.mark.parametrize("strategy", ["random", "block", "importance_sampling"])
def test_seed_and_epoch_change_the_mask(strategy):
    logits, ids = torch.zeros(8, 64), torch.arange(8)
    base = divide(logits, ids, 16, (8, 8), strategy=strategy).mask_BL
    assert not torch.equal(divide(logits, ids, 16, (8, 8), strategy=strategy, epoch=1).mask_BL, base)
    assert not torch.equal(divide(logits, ids, 16, (8, 8), strategy=strategy, seed=1).mask_BL, base)


def test_importance_masks_the_largest_and_ties_go_by_index():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0, 2.0]])
    part = divide(logits, torch.tensor([0]), 3, (2, 3), strategy="importance")
    assert part.ids_masked_BM.tolist() == [[1, 2, 3]]


def test_logits_matter_only_up_to_a_constant():
    logits = torch.randn(4, 16)
    a = divide(logits, torch.arange(4), 4, (4, 4))
    b = divide(logits + 8, torch.arange(4), 4, (4, 4))
    assert torch.equal(a.mask_BL, b.mask_BL)


def successive_sampling(weights, masked):
    """Compute the exact probability of each masked set: draw `masked` items one after the other without replacement."""
    total = {}
    for order in itertools.permutations(range(len(weights)), masked):
        left, probability = sum(weights), 1.0
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        total[frozenset(order)] = total.get(frozenset(order), 0.0) + probability
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gumbel_top_k_is_successive_sampling(temperature):
    """Chi-square is over all 20 masked sets of 3 out of 6; the 99.9 % quantile for 19 degrees of freedom is 43.82."""
    scores = torch.tensor([0.30, 0.05, 0.20, 0.10, 0.25, 0.10])
    draws = 20_000
    part = divide(scores.log().expand(draws, 6), torch.arange(draws), 3, (2, 3), temperature=temperature)
    expected = successive_sampling([s ** (1 / temperature) for s in scores.tolist()], 3)
    seen = dict.fromkeys(expected, 0)
    for row in part.ids_masked_BM.tolist():
        seen[frozenset(row)] += 1
    statistic = sum((seen[k] - draws * p) ** 2 / (draws * p) for k, p in expected.items())
    assert len(expected) == 20
    assert statistic < 43.82


def test_uniform_noise_is_the_authors_formula():
    logits, ids = torch.randn(6, 16, dtype=torch.float64), torch.arange(6)
    part = divide(logits, ids, 4, (4, 4), noise="uniform", seed=9, epoch=2)
    noise = keyed_uniform(9, 2, ids, 16)
    for b in range(6):
        # Scores divided by softmax(noise): the same order as log s - u.
        ratio = (logits[b].softmax(0) / noise[b].softmax(0)).tolist()
        largest = sorted(range(16), key=lambda i: -ratio[i])[:12]
        assert sorted(largest) == part.ids_masked_BM[b].tolist()


def rectangles(sample, seed, epoch, masked, grid, block_min):
    """Draw the blocks of one image one after the other, as the docstring of `block_keys` says."""
    rows, columns = grid
    smallest = min(block_min, masked)
    for r in range(BLOCKS):
        words = philox_4x32(
            stream_key(seed, STREAM_BLOCK), *(torch.tensor(c) for c in (r, sample & 0xFFFFFFFF, sample >> 32, epoch))
        )
        area_u, aspect_u, row_u, column_u = (to_unit(w).item() for w in words)
        area = smallest + area_u * (masked - smallest)
        aspect = math.exp((2 * aspect_u - 1) * math.log(1 / 0.3))
        height = min(max(round(math.sqrt(area * aspect)), math.ceil(area / columns)), rows)
        width = min(math.ceil(area / height), columns)
        yield math.floor(row_u * (rows - height + 1)), math.floor(column_u * (columns - width + 1)), height, width


@pytest.mark.parametrize(("grid", "keep"), [((14, 14), 49), ((8, 8), 16), ((4, 12), 30)])
def test_block_masking_against_loops(grid, keep):
    rows, columns = grid
    masked = rows * columns - keep
    part = divide(None, torch.arange(20), keep, grid, strategy="block", seed=3, epoch=1, block_min=16)
    for b in range(20):
        taken = []
        for top, left, height, width in rectangles(b, 3, 1, masked, grid, 16):
            assert height * width >= min(16, masked)
            inside = [y * columns + x for y in range(top, top + height) for x in range(left, left + width)]
            taken += [i for i in sorted(inside) if i not in taken]
        taken += [i for i in range(rows * columns) if i not in taken]
        assert sorted(taken[:masked]) == part.ids_masked_BM[b].tolist()


def test_block_keys_cover_without_the_filler():
    """At MAE's size the rectangles alone reach the count in practically every image."""
    keys = block_keys(torch.arange(500), 0, 0, 147, (14, 14), 16)
    assert ((keys > -BLOCKS).sum(1) >= 147).all()


def test_partition_from_mask_round_trip():
    mask = torch.rand(3, 20).argsort(1) < 15
    part = partition_from_mask(mask, keep=5)
    assert torch.equal(part.mask_BL, mask)
    assert [sorted(r) for r in part.ids_visible_BK.tolist()] == [(~m).nonzero()[:, 0].tolist() for m in mask]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep=0 must be in 1\.\.15"),
        ({"keep": 16}, r"keep=16 must be in 1\.\.15"),
        ({"teacher": 0}, r"teacher=0 must be in 1\.\.12, the masked patches, or None"),
        ({"teacher": 13}, r"teacher=13 must be in 1\.\.12, the masked patches, or None"),
        ({"important": 13}, r"important=13 must be in 0\.\.12, the masked patches"),
        ({"important": (5, -1)}, r"important=-1 must be in 0\.\.12, the masked patches"),
        ({"hints": 5}, r"hints=5 must be in 0\.\.4, of 12 patches by importance"),
        ({"important": (5, 2), "hints": 3}, r"hints=3 must be in 0\.\.2, of 2 patches by importance"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"strategy": "best"}, "strategy='best' must be one of random, block"),
        ({"noise": "normal"}, "noise='normal' must be one of gumbel, uniform"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"temperature": (1.0, -2.0)}, "temperature=-2.0 must be greater than 0"),
        ({"logits": None}, "strategy=importance_sampling needs logits"),
        ({"logits": torch.zeros(2, 9)}, r"logits are \[2, 9\], expected \[2, 16\]"),
    ],
)
def test_errors_name_value_and_limit(options, message):
    options = {"logits": torch.zeros(2, 16), "keep": 4, **options}
    with pytest.raises(ValueError, match=message):
        divide(options.pop("logits"), torch.arange(2), options.pop("keep"), (4, 4), **options)


def assert_same(ours, reference):
    for name, a, b in zip(reference._fields, ours, reference):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


SIZES = [((14, 14), 49), ((3, 5), 1), ((3, 5), 14), ((1, 2), 1), ((16, 16), 64), ((32, 32), 256), ((37, 37), 300)]


@pytest.mark.fault(
    "Philox: another counter word",
    "tl.philox(key, counter, id_low, id_high, epoch + zero)",
    "tl.philox(key, counter, id_high, id_low, epoch + zero)",
)
@pytest.mark.fault(
    "uniform noise added, not subtracted", "gumbel - uniform_weight * uniform", "gumbel + uniform_weight * uniform"
)
@pytest.mark.fault("half of the keys' bits ignored", "for step in range(32):", "for step in range(16):")
@pytest.mark.fault(
    "blocks: height rounded down", "tl.floor(tl.sqrt(area * aspect) + 0.5)", "tl.floor(tl.sqrt(area * aspect))"
)
@pytest.mark.fault(
    "scores read beyond the last patch, and not used",
    "mask=patch < L * has_logits, other=0.0).to",
    "mask=patch < BLOCK_L * has_logits, other=0.0).to",
)
@pytest.mark.fault("the teacher's patches by the masks' noise", "seed * 0 + _STREAM_TEACHER", "seed * 0")
@pytest.mark.fault(
    "visible patches for the teacher", "tl.float32), masked, count)", "tl.float32), patch < 1 << 20, count)"
)
@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("grid", "keep"), SIZES)
def test_kernel_gives_the_same_partition(grid, keep, strategy, noise, device):
    """They agree bit for bit, over the whole range of seeds, epochs and sample ids."""
    patches = grid[0] * grid[1]
    teacher = max(1, (patches - keep) // 3)
    ids = torch.tensor([0, 5, 2**33 + 7, 2**31, 2**32 - 1, 2**62], device=device)
    logits = 3 * torch.randn(len(ids), patches, device=device)
    options = {"seed": 3_000_000_000, "epoch": 2**31 + 4, "strategy": strategy, "noise": noise, "temperature": 0.7}
    options["teacher"] = teacher
    assert_same(
        divide(logits, ids, keep, grid, kernels="triton", **options),
        divide(logits, ids, keep, grid, kernels="reference", **options),
    )


@pytest.mark.fault(
    "ties by the highest index", "tl.cumsum(equal, 0) <= room", "tl.cumsum(equal, 0) > tl.sum(equal) - room"
)
@pytest.mark.fault("-0.0 is less than 0.0", "tl.where(keys == 0.0, 0.0, keys).to(tl.int32", "keys.to(tl.int32")
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("keep", [1, 16, 63])
def test_kernel_on_extreme_scores(keep, temperature, device):
    rows = torch.zeros(8, 64, device=device)
    rows[1, 7] = 1e4  # one dominates
    rows[2, 7] = -1e4
    rows[3] = torch.linspace(-1e4, 1e4, 64)
    rows[4] = 1e-45  # denormal
    rows[5, ::2] = -0.0  # equal to 0.0, with other bits
    rows[6, ::3] = float("inf")
    rows[6, 1::3] = float("-inf")
    rows[7] = torch.finfo(torch.float32).max
    for strategy in ("importance", "importance_sampling"):
        options = {"strategy": strategy, "temperature": temperature}
        ids = torch.arange(8, device=device)
        ours = divide(rows, ids, keep, (8, 8), kernels="triton", **options)
        assert_same(ours, divide(rows, ids, keep, (8, 8), kernels="reference", **options))
        assert 7 in ours.ids_masked_BM[1].tolist()
        assert 7 in ours.ids_visible_BK[2].tolist()
        assert not ours.nan_B.any()


@pytest.mark.fault("NaN by its bits", "tl.where(keys != keys, 4294967295, ordered)", "ordered")
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_nan_scores_have_an_order_and_raise_the_flag(kernels, device):
    """NaN, of either sign, is the largest score; among several the index decides; the row is flagged, others not."""
    nan = float("nan")
    logits = torch.tensor([[1.0, nan, 3.0, nan, 0.0, nan], [5.0, 0, 1, 2, 3, 4], [nan] * 6], device=device)
    logits[0, 3] = -logits[0, 3]
    ids = torch.arange(3, device=device)
    part = divide(logits, ids, 4, (2, 3), strategy="importance", kernels=kernels)
    assert part.ids_masked_BM.tolist() == [[1, 3], [0, 5], [0, 1]]
    assert part.nan_B.tolist() == [True, False, True]
    sampled = divide(logits, ids, 1, (2, 3), kernels=kernels)
    assert sampled.nan_B.tolist() == [True, False, True]
    assert {1, 3, 5} <= set(sampled.ids_masked_BM[0].tolist())


def test_kernel_samples_with_the_right_frequencies(device):
    """The kernel's own draws pass the reference's chi-square test: 99.9 % quantile for 5 degrees of freedom."""
    scores, draws = torch.tensor([0.4, 0.1, 0.3, 0.2], device=device), 600 if device.type == "cuda" else 150
    ids = torch.arange(draws, device=device)
    part = divide(scores.log().expand(draws, 4), ids, 2, (2, 2), temperature=2.0, seed=8, kernels="triton")
    expected = successive_sampling([s**0.5 for s in scores.tolist()], 2)
    seen = dict.fromkeys(expected, 0)
    for row in part.ids_masked_BM.tolist():
        seen[frozenset(row)] += 1
    assert len(expected) == 6
    assert sum((seen[k] - draws * p) ** 2 / (draws * p) for k, p in expected.items()) < 20.52


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_widened_first(dtype, device):
    logits, ids = torch.randn(4, 64, device=device, dtype=dtype), torch.arange(4, device=device)
    wide = divide(logits.float(), ids, 16, (8, 8))
    for kernels in ("triton", "reference"):
        assert_same(divide(logits, ids, 16, (8, 8), kernels=kernels), wide)


def test_kernel_takes_strided_scores_and_ids(device):
    logits, ids = torch.randn(64, 8, device=device).T, torch.arange(16, device=device)[::2]
    assert_same(divide(logits, ids, 16, (8, 8), kernels="triton"), divide(logits, ids, 16, (8, 8)))


@pytest.mark.parametrize("options", [{}, {"teacher": 5}, {"important": (0, 48), "hints": (0, 7)}])
def test_kernel_is_one_launch(options, device):
    options = {**options, "kernels": "triton"}
    with recorded(run=True) as launches:
        divide(torch.randn(4, 64, device=device), torch.arange(4, device=device), 16, (8, 8), **options)
    assert [launch.kernel.__name__ for launch in launches] == ["ccmim_sample_partition_kernel"]


def test_too_many_patches_is_refused_by_name(device):
    with pytest.raises(ValueError, match="patches=2116 must be at most 2048 for kernels=triton; use kernels=reference"):
        divide(None, torch.arange(2, device=device), 16, (46, 46), strategy="random", kernels="triton")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck(strategy, device):
    logits = torch.randn(3, 15, device=device) if strategy.startswith("importance") else None
    arguments = (
        logits,
        torch.arange(3, device=device),
        3,
        5,
        4,
        0,
        torch.ones(3, dtype=torch.int64, device=device),
        strategy,
        "gumbel",
        16,
    )
    scored = strategy.startswith("importance")
    division = [1.0, 2.0], [3, 11], [1, 2], 5
    torch.library.opcheck(_sample_partition, (*arguments, 4 if scored else 11, *division))


def test_ids_of_one_strided_row_and_of_32_bits(device):
    expected = divide(None, torch.tensor([8], device=device), 16, (8, 8), strategy="random")
    for ids in (torch.arange(8, 16, device=device)[::8], torch.tensor([8], device=device, dtype=torch.int32)):
        assert_same(divide(None, ids, 16, (8, 8), strategy="random", kernels="triton"), expected)


def test_random_takes_no_notice_of_the_temperature(device):
    ids = torch.arange(4, device=device)
    expected = divide(None, ids, 16, (8, 8), strategy="random")
    assert_same(divide(None, ids, 16, (8, 8), strategy="random", temperature=1e-40, kernels="triton"), expected)
    assert not expected.nan_B.any()


@pytest.mark.fault("one epoch for all images", "tl.load(epochs_ptr + image)", "tl.load(epochs_ptr)")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_epoch_may_be_a_tensor(strategy, kernels, device):
    logits, ids = torch.randn(3, 64, device=device), torch.arange(3, device=device)
    for epoch in (0, 2**32 - 1):
        given = torch.tensor(epoch, device=device)
        options = {"strategy": strategy, "kernels": kernels}
        expected = divide(logits, ids, 16, (8, 8), epoch=epoch, **options)
        assert_same(divide(logits, ids, 16, (8, 8), epoch=given, **options), expected)
    given = torch.tensor([7, 0, 2**32 - 1], device=device)
    found = divide(logits, ids, 16, (8, 8), epoch=given, **options)
    each = [divide(logits[i : i + 1], ids[i : i + 1], 16, (8, 8), epoch=int(given[i]), **options) for i in range(3)]
    assert_same(found, type(found)(*(torch.cat(parts) for parts in zip(*each, strict=True))))
    with pytest.raises(ValueError, match=r"epoch is \[2\], expected \[\] or \[3\]"):
        divide(logits, ids, 16, (8, 8), epoch=given[:2], **options)


def philox_words(seed, epoch, sample, patch):
    """Philox-4x32-10 as Salmon et al. write it, in Python's whole numbers."""
    a, b, c, d = patch, sample & 0xFFFFFFFF, sample >> 32, epoch
    key, other = seed, 0
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ key, right & 0xFFFFFFFF, (left >> 32) ^ d ^ other, left & 0xFFFFFFFF
        key, other = (key + 0x9E3779B9) & 0xFFFFFFFF, (other + 0xBB67AE85) & 0xFFFFFFFF
    return [(word + 0.5) / 2**32 for word in (a, b, c, d)]


def at_epoch(pair, epoch, epochs):
    """The exact value on the straight way from the first epoch to the last, and on it afterwards."""
    first, last = map(Fraction, pair)
    return first + (last - first) * Fraction(min(epoch, epochs - 1), epochs - 1)


def masked_by_loops(scores, sample, epoch, *, seed, masked, strategy, temperature, important, hints, epochs):
    """The masked set of one image by the rule's words, one patch after the other; scores in float32."""
    count, revealed = (math.floor(at_epoch(pair, epoch, epochs) + Fraction(1, 2)) for pair in (important, hints))
    inverse = np.float32(float(1 / at_epoch(temperature, epoch, epochs)))
    words = [philox_words(seed, epoch, sample, patch) for patch in range(len(scores))]
    keys = [score * inverse for score in scores]
    if strategy == "importance_sampling":
        keys = [key + np.float32(-np.log(-np.log(word[0]))) for key, word in zip(keys, words)]
    order = sorted(range(len(keys)), key=lambda i: -keys[i])
    shown = sorted(order[:count], key=lambda i: -words[i][2])[:revealed]
    found = [i for i in order if i not in shown][:count]
    others = [i for i in order if i not in shown and i not in found]
    return sorted(found + sorted(others, key=lambda i: -words[i][1])[: masked - count])


MIXED = {
    "a part by importance": {"important": (10, 10)},
    "none by importance, then half": {"important": (0, 11)},
    "half by importance, then none": {"important": (11, 0)},
    "hints": {"hints": (4, 4)},
    "as many hints as are visible": {"hints": (9, 9)},
    "a part with hints, both growing": {"important": (3, 20), "hints": (0, 8)},
    "the temperature too": {"temperature": (4.0, 0.5), "important": (21, 7), "hints": (6, 2)},
}


@pytest.mark.fault("the masks' noise for the others", "_, noise, reveal, _ = draw", "noise, _, reveal, _ = draw")
@pytest.mark.fault("one noise for hints and others", "unit(reveal)", "unit(noise)")
@pytest.mark.fault("no others in the hints' places", "valid, important + hints)", "valid, important)")
@pytest.mark.fault("schedules that are rounded down", "done + span // 2) // span)", "done) // span)")
@pytest.mark.fault("schedules that go on", "tl.minimum(epoch, span)", "epoch")
@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("strategy", ["importance", "importance_sampling"])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_hints_and_shares_against_loops(case, strategy, kernels, device):
    """Exact sets, over the range of seeds, samples and epochs: before, in and after the schedule."""
    some = slice(0 if kernels == "reference" else 1, None, 1 if kernels == "reference" else 2)
    ids, epochs = [0, 7, 2**33 + 5, 2**31, 9, 1][some], [0, 1, 2, 4, 6, 2**32 - 1][some]
    logits = torch.randn(len(ids), 30, generator=torch.Generator().manual_seed(0))
    how = {"temperature": (1.0, 1.0), "important": (21, 21), "hints": (0, 0), "epochs": 7, **MIXED[case]}
    how |= {"seed": 3_000_000_000, "strategy": strategy}
    keyed, epoch = (torch.tensor(numbers, device=device) for numbers in (ids, epochs))
    part = divide(logits.to(device), keyed, 9, (5, 6), epoch=epoch, kernels=kernels, **how)
    for b in range(len(ids)):
        expected = masked_by_loops(logits[b].numpy(), ids[b], epochs[b], masked=21, **how)
        assert part.ids_masked_BM[b].tolist() == expected


@pytest.mark.parametrize("strategy", ["importance", "importance_sampling"])
def test_defaults_are_all_by_importance_without_hints(strategy, device):
    logits, ids = torch.randn(5, 64, device=device), torch.arange(5, device=device)
    options = {"strategy": strategy, "temperature": 0.7, "seed": 3, "epoch": 2, "kernels": "reference"}
    expected = divide(logits, ids, 16, (8, 8), **options)
    for kernels in ("reference", "triton"):
        more = {"important": 48, "hints": 0, "epochs": 9, "kernels": kernels}
        assert_same(divide(logits, ids, 16, (8, 8), **{**options, **more}), expected)
        more |= {"temperature": (0.7, 0.7), "important": (48, 48), "hints": (0, 0)}
        assert_same(divide(logits, ids, 16, (8, 8), **{**options, **more}), expected)


@pytest.mark.fault("no growth", "grown = 1 + (zero + growth)", "grown = 1 + (zero * growth)")
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_scheduled_temperature_is_the_constant_of_each_epoch(kernels, device):
    """From 4 to 1 in five epochs; T = 3.25 and so on between, and 1 afterwards. Noise of one epoch is held by ids."""
    logits, ids = 3 * torch.randn(6, 64, device=device), torch.arange(6, device=device)
    for epoch, temperature in enumerate([4.0, 3.25, 2.5, 1.75, 1.0, 1.0]):
        options = {"epoch": epoch, "kernels": kernels}
        found = divide(logits, ids, 16, (8, 8), temperature=(4.0, 1.0), epochs=5, **options)
        assert_same(found, divide(logits, ids, 16, (8, 8), temperature=temperature, **options))


@pytest.mark.parametrize("strategy", ["random", "block"])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_strategies_without_scores_take_no_notice(strategy, kernels, device):
    ids, options = torch.arange(4, device=device), {"strategy": strategy, "kernels": kernels}
    more = {"important": (0, 30), "hints": (0, 9), "temperature": (1e-40, 3.0), "epochs": 3}
    assert_same(divide(None, ids, 16, (8, 8), **options, **more), divide(None, ids, 16, (8, 8), **options))


def test_hints_and_others_are_uniform():
    """Chi-square over one hint of two and two others of four: 12 outcomes; the 99.9 % quantile for 11 is 31.26."""
    draws, seen = 6000, {}
    logits = torch.arange(7.0).flip(0).expand(draws, 7)
    part = divide(logits, torch.arange(draws), 3, (1, 7), strategy="importance", important=2, hints=1)
    for row in part.ids_masked_BM.tolist():
        assert len({0, 1} & set(row)) == 1  # the other one is the hint
        assert 2 in row  # in its place
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert len(seen) == 12
    assert sum((count - draws / 12) ** 2 / (draws / 12) for count in seen.values()) < 31.26


def test_sampling_with_hints_and_others_has_exact_probabilities():
    """Chi-square over all 20 masked sets of 3 of 6; the 99.9 % quantile for 19 degrees of freedom is 43.82.

    Two are drawn one after the other, one of these is shown and a third drawn in its place; the last is any other.
    """
    scores, draws, expected = [0.30, 0.05, 0.20, 0.10, 0.25, 0.10], 20_000, {}
    for order in itertools.permutations(range(6), 3):
        left, probability = 1.0, 1.0
        for item in order:
            probability *= scores[item] / left
            left -= scores[item]
        for shown in order[:2]:
            for other in set(range(6)) - set(order):
                masked = frozenset({*order, other} - {shown})
                expected[masked] = expected.get(masked, 0.0) + probability / 2 / 3
    logits = torch.tensor(scores).log().expand(draws, 6)
    part = divide(logits, torch.arange(draws), 3, (2, 3), important=2, hints=1, seed=1)
    seen = dict.fromkeys(expected, 0)
    for row in part.ids_masked_BM.tolist():
        seen[frozenset(row)] += 1
    assert math.isclose(sum(expected.values()), 1)
    assert len(expected) == 20
    assert sum((seen[k] - draws * p) ** 2 / (draws * p) for k, p in expected.items()) < 43.82


@pytest.mark.parametrize(
    ("grid", "keep", "strategy"),
    [
        ((3, 5), 1, "importance"),
        ((3, 5), 14, "importance_sampling"),
        ((1, 2), 1, "importance_sampling"),
        ((14, 14), 49, "importance_sampling"),
        ((37, 37), 300, "importance_sampling"),
    ],
)
def test_kernel_mixes_alike(grid, keep, strategy, device):
    """Bit for bit, of scores that are equal, infinite or NaN too; every count from the least to the most."""
    patches = grid[0] * grid[1]
    logits = 3 * torch.randn(4, patches, device=device)
    logits[0, ::2], logits[2, 1::2], logits[3, ::3] = -torch.inf, torch.inf, torch.nan
    most, ids = patches - keep, torch.arange(4, device=device)
    options = {"strategy": strategy, "epoch": ids, "epochs": 4, "temperature": (3.0, 0.7), "teacher": max(1, most // 2)}
    for important, hints in (((0, most), (0, min(most, keep))), (most // 2, min(most // 2, keep) // 2)):
        more = {"important": important, "hints": hints, **options}
        reference = divide(logits, ids, keep, grid, kernels="reference", **more)
        assert_same(divide(logits, ids, keep, grid, kernels="triton", **more), reference)
        assert reference.mask_BL.sum(1).eq(most).all()
        assert reference.nan_B.tolist() == [False, False, False, True]
