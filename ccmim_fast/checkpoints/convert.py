"""Conversion renames weights: to and from MAE's flat layout (also that of the authors' ccMIM), and to timm's."""

from torch import Tensor

# Flat name (or its first part) -> ours. A name that is missing here is the encoder's.
_FLAT = {"mask_token": "decoder.mask_token", "projector": "projector", "predictor": "predictor"}
_FLAT |= {f"decoder_{part}": f"decoder.{part}" for part in ("embed", "pos_embed", "blocks", "norm", "pred")}


def from_flat(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a flat (MAE, authors' ccMIM) state dict to this project's names; unknown names go to the encoder."""
    ours = {}
    for name, value in flat.items():
        first, dot, rest = name.partition(".")
        ours[f"{_FLAT.get(first, f'encoder.{first}')}{dot}{rest}"] = value
    return ours


def to_flat(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert `from_flat`."""
    flat = {}
    for name, value in ours.items():
        first, target = next((pair for pair in _FLAT.items() if f"{name}.".startswith(f"{pair[1]}.")), ("", "encoder."))
        flat[first + name.removeprefix(target)] = value
    return flat


def to_timm(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's weights under timm's names, for `timm.create_model(arch, num_classes=0)`."""
    return {name.removeprefix("encoder."): value for name, value in ours.items() if name.startswith("encoder.")}
