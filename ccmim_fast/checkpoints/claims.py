"""What names and shapes of weights claim is held against the numbers that they hold, before a model is built of it."""

from collections import Counter

from torch import Tensor

from ccmim_fast.errors import CheckpointError

MOST_BLOCKS = 512  # ten times the deepest ViT of timm
_LEAST = 4  # times the width squared: numbers in a block, those of its attention
_MOST_CHANNELS = 4096  # of an image
# Tensors whose shapes tell sizes of the model, by our names, and how many dimensions they have.
_TELLING = {
    "encoder.patch_embed.proj.weight": 4,
    "encoder.pos_embed": 3,
    "encoder.cls_token": 3,
    "encoder.reg_token": 3,
    "decoder.embed.weight": 2,
    "projector.3.weight": 2,
}


def check_claims(tensors: dict[str, Tensor], place: str) -> None:
    """Raise CheckpointError where weights under our names claim a model that they are too few numbers for.

    A model of them takes no more than a few times the memory of the weights: blocks are numbered without a gap, each
    holds the numbers of an attention as wide as the model, and no more are counted than lie in the file.
    """
    for name, dims in _TELLING.items():
        if name in tensors and (tensors[name].ndim != dims or not _numbers(tensors[name])):
            shape = list(tensors[name].shape)
            raise CheckpointError(f"{place}: {name} is of shape {shape}; it must have {dims} dimensions, none of 0")
    kernel = tensors.get("encoder.patch_embed.proj.weight")
    if kernel is not None and kernel.shape[2] != kernel.shape[3]:
        reason = f"patches of {kernel.shape[2]} x {kernel.shape[3]} pixels"
        raise CheckpointError(f"{place}: {reason}; here they are square: take a ViT of square ones")
    held = Counter()
    for name, tensor in tensors.items():
        held[".".join(name.split(".")[: 3 if ".blocks." in name else 1])] += _numbers(tensor)
    for part, width in _widths(tensors).items():
        blocks = {name.rpartition(".")[2] for name in held if name.startswith(f"{part}.blocks.")}
        if len(blocks) > MOST_BLOCKS or blocks != {str(number) for number in range(len(blocks))}:
            odd = max(blocks, key=lambda number: (len(number), number))
            raise CheckpointError(
                f"{place}: {len(blocks)} blocks in its {part}, {odd!r:.40} among them; "
                f"expected 0, 1, ... without a gap, {MOST_BLOCKS} at most"
            )
        for number in range(len(blocks)):
            _check_enough(f"{part}.blocks.{number}", held, _LEAST * width**2, place)
    if "predictor" in held and "projector.3.weight" in tensors:
        _check_enough("predictor", held, len(tensors["projector.3.weight"]) ** 2, place)


def check_size(image_size: tuple[int, ...], channels: int, tensors: dict[str, Tensor], place: str) -> None:
    """Raise CheckpointError where a file tells a size in pixels, or a number of channels, that its weights are not of.

    `image_size` is height and width, or empty.
    """
    kernel, positions = (tensors.get(f"encoder.{name}") for name in ("patch_embed.proj.weight", "pos_embed"))
    patches = 0
    if image_size and kernel is not None:
        rows, columns = (side // kernel.shape[-1] for side in image_size)
        patches = rows * columns if min(rows, columns) > 0 else -1
    if patches < 0 or channels > _MOST_CHANNELS or (positions is not None and patches > positions.shape[1]):
        raise CheckpointError(
            f"{place}: tells {channels} channels and images of {list(image_size)}; its weights do not"
        )


def _widths(tensors: dict[str, Tensor]) -> dict[str, int]:
    telling = {"encoder": "encoder.patch_embed.proj.weight", "decoder": "decoder.embed.weight"}
    return {part: len(tensors[name]) for part, name in telling.items() if name in tensors}


def _check_enough(part: str, held: Counter, least: int, place: str) -> None:
    if held[part] < least:
        raise CheckpointError(
            f"{place}: {part} holds {held[part]} numbers, fewer than the {least} that its width needs"
        )


def _numbers(tensor: Tensor) -> int:
    """Return how many numbers there are in memory: an expanded tensor has fewer than its shape says."""
    if tensor.is_sparse or tensor.is_meta:
        return 0
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
