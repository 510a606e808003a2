"""What the teacher is computed in: whether a device and a run can have 8 bits, and whether they are faster there."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ccmim_fast.autotune.decide import Decision, milliseconds, timed, winner
from ccmim_fast.config.schema import Config
from ccmim_fast.engine.compile import choose_compile
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.int8 import LEAST_ROWS, Int8Layers, has_int8
from ccmim_fast.models.tokens import encode, rotary_tables, with_prefix
from ccmim_fast.profile.meter import seconds_of
from ccmim_fast.ranks.fsdp import is_sharded

LEAST_COSINE = 0.999  # of an image's [CLS] in 8 bits and in full; seen of ViT-B: 0.9997, and with bf16 0.99998
_CHECKED, _TIMED = 2, 32  # images, at most; from some thousand rows on a product's rate is the same
_SECONDS = 4.0  # after which no round begins


def check_int8(config: Config, device: torch.device, divided: bool) -> None:
    """Return if `teacher.precision` is not int8, or can run on `device`; else raise ConfigError."""
    if config.teacher.precision == "int8" and (why := _without_int8(config, device, divided)):
        raise ConfigError(f"teacher.precision=int8: {why}; use teacher.precision=same")


def _without_int8(config: Config, device: torch.device, divided: bool) -> str:
    if device.type != "cpu":
        return f"needs a CPU, got {device.type}"
    if not has_int8():
        return "needs products of 8-bit integers (AVX-512 VNNI), which this CPU, or oneDNN, which this torch has not"
    if choose_compile(config.train.compile, device) != "off":
        return f"cannot be compiled, as train.compile={config.train.compile} does"
    return "needs whole weights, and train.parallel=fsdp divides them" if divided else ""


def choose_teacher(step: TrainStep, images: int) -> Decision | None:
    """Hold the teacher in 8 bits against `same`, on made images and the weights as they are; None: there is no choice.

    [CLS] must be the same, see `LEAST_COSINE`; a block is timed, of `images` images. No other rank is waited for.
    """
    config, model = step.config, step.model
    settled = config.teacher.precision != "auto" or model.projector is None
    if (
        settled
        or images * (1 + model.sampling["teacher"]) < LEAST_ROWS
        or _without_int8(config, step.device, is_sharded(model))
    ):
        return None
    model.eval()  # no stochastic depth
    try:
        with torch.no_grad(), step.precision.autocast(step.device):
            cosine = _cosine(step)
            if not cosine >= LEAST_COSINE:  # written so that NaN fails
                return Decision("same", {}, {"int8": f"[CLS] has cosine {cosine:.5f}, {LEAST_COSINE} is needed"})
            block = _block(step, min(images, _TIMED))
            forms = {"same": block, "int8": lambda: _in_int8(block)}
            for form in forms.values():
                form()  # the first call fills caches
            samples = {name: lambda form=form: seconds_of(form, step.device) for name, form in forms.items()}
            times = timed(samples, time.perf_counter() + _SECONDS)
    finally:
        model.train()
    return Decision(winner(times) if times else "same", milliseconds(times), {})


def _cosine(step: TrainStep) -> float:
    """Return the smallest cosine of an image's [CLS] in 8 bits and in full, as a float."""
    vit, (tokens, ids) = step.model.encoder, _masked(step, _CHECKED)
    full, ours = (
        form(lambda: encode(vit, tokens, ids, cls_only=True)[0][:, 0].double())
        for form in (lambda run: run(), lambda run: _in_int8(run, least_rows=1))
    )
    return F.cosine_similarity(full, ours, dim=1).min().item()


def _block(step: TrainStep, images: int) -> Callable[[], object]:
    vit, (tokens, ids) = step.model.encoder, _masked(step, images)
    return lambda: vit.blocks[0](tokens, **rotary_tables(vit, ids)[0])


def _in_int8(run: Callable[[], torch.Tensor], **options: int) -> torch.Tensor:
    with Int8Layers(**options):
        return run()


def _masked(step: TrainStep, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make embedded tokens of as many patches as the teacher sees, [CLS] first, and their ids [images, patches]."""
    model, data = step.model, step.config.data
    seen = model.sampling["teacher"]
    draw = torch.Generator().manual_seed(0)
    images_BHWC = torch.randint(0, 256, (images, *data.image_size, data.channels), dtype=torch.uint8, generator=draw)
    tokens = with_prefix(model.encoder, model.embed(images_BHWC)[:, :seen])
    return tokens, torch.arange(seen).expand(images, -1)
