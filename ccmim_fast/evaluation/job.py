"""What an evaluation works on."""

from pathlib import Path
from typing import NamedTuple

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.evaluation.encoders import Encoder, build_encoder
from ccmim_fast.evaluation.images import Images
from ccmim_fast.ranks.session import Session


class Job(NamedTuple):
    """An encoder's weights, images to train on and to test on, and where to write."""

    config: EvalConfig
    here: Session
    folder: Path
    weights: Weights
    train: Images
    test: Images

    def frozen_encoder(self) -> Encoder:
        """In evaluation mode, on the device, without gradient."""
        vit = build_encoder(self.weights, self.config.data.image_size, self.config.model.num_heads)
        encoder = Encoder(vit, self.weights.mean, self.weights.std).to(self.here.device)
        return encoder.eval().requires_grad_(False)
