"""UPerNet's decoder from segmentation_models_pytorch: the only file that imports it, and only when it is built."""

import importlib.util

from torch import nn

from ccmim_fast.errors import MachineError

_PACKAGE = "segmentation_models_pytorch"


def check_installed() -> None:
    """Return if the decoder can be built.

    Raises:
        MachineError: one line with the command that installs what is missing.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        raise MachineError(f"ccmim eval segmentation: needs {_PACKAGE}: pip install 'ccmim_fast[segmentation]'")


def build_decoder(width: int, dim: int) -> nn.Module:
    """Four maps [B, width, h, w], each half as high and wide as the one before -> [B, dim, h, w] of the first's size.

    Its forward takes a list of six of which it leaves out the first two (an image's own and its half resolution).
    """
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return UPerNetDecoder(encoder_channels=[0, 0, *4 * [width]], encoder_depth=5, decoder_channels=dim)
