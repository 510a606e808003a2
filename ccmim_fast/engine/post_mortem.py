"""This file explains a step that was not finite: which samples, which masks, where in the model it began."""

# B batch, L patches, T masked ones that the teacher sees

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ccmim_fast.data.stream.batch import make_batch
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import load_crop
from ccmim_fast.engine.compile import uncompiled
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.precision import Precision
from ccmim_fast.optim.update import own_part
from ccmim_kernels import partition_from_mask, teacher_ids


class Evidence(NamedTuple):
    """This tuple is what a rank keeps of each micro-batch of a step."""

    ids: list[np.ndarray]  # [B] int64, on the host
    epochs: list[Tensor]  # [B] int64, on the device
    masks: list[Tensor]  # [B, L] bool, on the device


def write_capture(
    folder: Path, step: int, kept: Evidence, model: CCMIM, plan: Plan, precision: Precision, image_size: tuple[int, int]
) -> Path:
    """Pass the samples of a step through the model once more, with the same masks, and write what was found.

    In eval mode, so that nothing of the model changes. Each rank writes a file of its own,
    `step_<step>_rank_<rank>.pt`, for `torch.load`: step, seed, rank; for each micro-batch ids [B], epochs [B], masks
    [B, L], and figures (see `figures_of`) of each module's output by name; and those of all weights.
    """
    found: dict[str, Any] = {"step": step, "seed": plan.seed, "rank": plan.rank, "micro_batches": []}
    for ids_B, epochs_B, mask_BL in zip(*kept):
        shown = plan.micro_batch(ids_B, epochs_B.cpu().numpy())
        images_BHWC = torch.from_numpy(np.stack([load_crop(plan.source, one, image_size) for one in shown.samples()]))
        batch = make_batch(images_BHWC.to(mask_BL.device), shown, plan.source, mask_BL.device)
        drawn = {name: model.sampling[name] for name in ("seed", "teacher")}
        seen_BT = teacher_ids(mask_BL, batch.ids_B, epoch=batch.epochs_B, **drawn)
        partition = partition_from_mask(mask_BL, model.keep, seen_BT)
        with torch.no_grad(), uncompiled(model), _watched(model) as outputs, precision.autocast(mask_BL.device):
            model(batch.images_BHWC, batch.ids_B, batch.epochs_B, partition=partition)
        told = {"ids": batch.ids_B.cpu(), "epochs": epochs_B.cpu(), "masks": mask_BL.cpu(), "outputs": outputs}
        found["micro_batches"].append(told)
    found["weights"] = {name: figures_of(weight) for name, weight in model.named_parameters()}
    path = folder / f"step_{step:08d}_rank_{plan.rank}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return path


def figures_of(tensor: Tensor) -> dict[str, float]:
    """Return the share of elements that are finite; of those the largest magnitude, mean and standard deviation.

    Of a tensor that is divided among ranks: of this rank's part.
    """
    own = own_part(tensor).float()
    finite = own[own.isfinite()]
    if not len(finite):
        return {"finite": 0.0 if len(own) else 1.0}
    figures = {"largest": finite.abs().max(), "mean": finite.mean(), "std": finite.std(correction=0)}
    return {"finite": len(finite) / own.numel(), **{name: float(value) for name, value in figures.items()}}


@contextmanager
def _watched(model: CCMIM) -> Iterator[dict[str, dict[str, float]]]:
    """Figures of each module's output, in the order in which they first come; blocks run uncompiled meanwhile."""
    outputs: dict[str, dict[str, float]] = {}
    calls: Counter[str] = Counter()

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            calls[name] += 1
            outputs[f"{name}, call {calls[name]}"] = figures_of(output)

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    training = model.training
    model.eval()
    try:
        yield outputs
    finally:
        model.train(training)
        for one in hooks:
            one.remove()
