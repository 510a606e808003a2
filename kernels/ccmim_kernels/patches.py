"""An image is cut into patches in MAE's order: patches row by row, and (row, column, channel) inside a patch."""

# B batch, H height, W width, C channels, L patches, P patch * patch * C

from torch import Tensor


def patchify(images_BHWC: Tensor, patch: int) -> Tensor:
    """Return the patches of images, [B, H, W, C] -> [B, L, patch * patch * C], any dtype.

    Raises:
        ValueError: H or W is no multiple of `patch`.
    """
    B, H, W, C = images_BHWC.shape
    if H % patch or W % patch:
        raise ValueError(f"image {H}x{W} is no multiple of patch={patch}")
    grid = images_BHWC.reshape(B, H // patch, patch, W // patch, patch, C)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(B, -1, patch * patch * C)


def unpatchify(patches_BLP: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Invert `patchify`: [B, L, patch * patch * C] -> [B, height, width, C]."""
    B, _, P = patches_BLP.shape
    C = P // patch**2
    grid = patches_BLP.reshape(B, height // patch, width // patch, patch, patch, C)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(B, height, width, C)
