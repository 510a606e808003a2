"""The memory that the header of a preset states is what torch's allocator gives its step on the null device."""

from functools import cache
from pathlib import Path

import pytest
from memory import Memory, stated
from nullgpu.null_device import end_of, run

from ccmim_fast.config.load import load_config, presets

SCRIPT = Path(__file__).parent / "measure_memory.py"
GTX_1080_TI = 11.7  # GB that torch reports of the card's 11 GiB
OLD = "ccmim_vit_base_1080ti"
NEW = tuple(name for name in presets() if name != OLD)


@cache
def measured(group: tuple[str, ...], *settings: str):
    """The memory of presets with more settings: one process for all of them."""
    capability, memory_gb = (61, GTX_1080_TI) if group == (OLD,) else (90, 80)
    given = dict.fromkeys(group, settings)
    return run(SCRIPT, capability=capability, memory_gb=memory_gb, timeout=1200, given=given)


def memory_of(preset: str, *settings: str) -> Memory:
    result = measured((OLD,) if preset == OLD else NEW, *settings)
    assert preset in result.told, end_of(result)
    return Memory(*result.told[preset])


def check(preset: str) -> None:
    layout, memory = stated(preset), memory_of(preset)
    found = [memory.peak / 1e9, memory.at_rest / 1e9, (memory.peak - memory.at_rest) / layout.images / 1e6]
    assert found == pytest.approx([layout.peak_gb, layout.at_rest_gb, layout.mb_per_image], rel=0.05)


@pytest.mark.parametrize("preset", presets())
def test_the_header_tells_of_the_preset_as_it_is(preset):
    train, layout = load_config([f"--config={preset}"], "test").train, stated(preset)
    assert layout.images * layout.gpus * train.accumulate == train.batch_size


def test_the_memory_of_a_1080_ti_is_that_of_the_header():
    check(OLD)


def test_what_the_allocator_holds_leaves_a_1080_ti_room_for_maps_and_context():
    maps_gb = load_config([f"--config={OLD}"], "test").score.device_gb
    assert memory_of(OLD).reserved / 1e9 + maps_gb + 1 < GTX_1080_TI  # a GB for the context and libraries


@pytest.mark.slow
@pytest.mark.parametrize("preset", NEW)
def test_the_memory_is_that_of_the_header(preset):
    check(preset)


@pytest.mark.slow
def test_our_kernels_take_no_more():
    plain, ours = memory_of(OLD), memory_of(OLD, "--train.kernels=triton")
    assert 0.95 * plain.peak < ours.peak <= plain.peak
