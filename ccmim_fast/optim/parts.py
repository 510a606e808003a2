"""Tensors that are divided among ranks."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP has divided, in the same memory; any other tensor itself. No gradient."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
