"""Weights in and out: MAE's flat key layout (also the authors' ccMIM), and timm's.

Published pretraining checkpoints keep encoder, decoder and projector in one flat dictionary; ours are the same tensors
under `encoder.`, `decoder.` and `projector.`, so conversion is renaming.
"""

import argparse

import torch
from torch import Tensor

from ccmim_fast.errors import CheckpointError
from ccmim_fast.models.ccmim import CCMIM

# Flat name (or its first part) -> ours. What is not named here is the encoder's.
_FLAT = {
    "decoder_embed": "decoder.embed",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.pred",
    "projector": "projector",
    "predictor": "predictor",
}


def from_flat(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """A flat (MAE, authors' ccMIM) state dict under this project's names; unknown names go to the encoder."""
    ours = {}
    for name, value in flat.items():
        first, _, rest = name.partition(".")
        target = _FLAT.get(first, f"encoder.{first}")
        ours[f"{target}.{rest}" if rest else target] = value
    return ours


def to_flat(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_flat`."""
    back = {target: first for first, target in _FLAT.items()}
    flat = {}
    for name, value in ours.items():
        if name.startswith("encoder."):
            flat[name.removeprefix("encoder.")] = value
            continue
        target = next(t for t in back if name == t or name.startswith(f"{t}."))
        flat[back[target] + name.removeprefix(target)] = value
    return flat


def load_flat(model: CCMIM, flat: dict[str, Tensor]) -> None:
    """Load a flat pretraining checkpoint strictly: every name and shape must match.

    Args:
        flat: the checkpoint's state dict; where it lies under a key `model`, that is taken.

    Raises:
        CheckpointError: names or shapes that do not match.
    """
    flat = flat.get("model", flat)
    try:
        model.load_state_dict(from_flat(flat), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint does not fit the model: {reason[:300]}") from None


def to_timm(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights under timm's names, for `timm.create_model(arch, num_classes=0)`."""
    return {name.removeprefix("encoder."): value for name, value in ours.items() if name.startswith("encoder.")}


def read_flat_file(path: str) -> dict[str, Tensor]:
    """Read a published `.pth` file; only tensors and plain containers are accepted, code in it never runs.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain containers.
    """
    try:
        # MAE's training checkpoints carry their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on damaged input
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read as weights: {reason[:200]}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return loaded
