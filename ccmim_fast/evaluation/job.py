"""A job is what an evaluation works on: an encoder, labelled images to train on, and others to test on."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ccmim_fast.checkpoints.published import Weights
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import Encoder, build_encoder
from ccmim_fast.evaluation.images import Images
from ccmim_fast.ranks.session import Session
from ccmim_fast.runs.folder import RunFolder

Work = Callable[[], dict[str, float]]  # what is left to do when all is checked; gives the figures, shares of 1


class Job(NamedTuple):
    """This tuple holds an encoder's weights, images to train on and to test on, and where to write."""

    config: EvalConfig
    here: Session
    folder: RunFolder
    weights: Weights
    train: Images
    test: Images

    def build_encoder(self, **options: Any) -> nn.Module:
        """Build timm's module for the settings' images, on the CPU; for the options see `encoders.build_encoder`."""
        size, model = self.config.data.image_size, self.config.model
        return build_encoder(self.weights, size, model.num_heads, resample=model.resample, **options)

    def frozen_encoder(self, pools: bool = True) -> Encoder:
        """Return the encoder, on the device, without gradient; `pools`: see `model.pool` and `model.fc_norm`.

        Raises ConfigError if it has no [CLS] for `model.pool`.
        """
        model = self.config.model
        pool, fc_norm = (model.pool, model.fc_norm) if pools else ("", False)
        vit = self.build_encoder(pool="avg" if pool == "avg" and fc_norm else "")
        encoder = Encoder(vit, self.weights.mean, self.weights.std).to(self.here.device)
        if pool == "cls" and (not encoder.prefix or (hasattr(vit, "cls_token") and vit.cls_token is None)):
            raise ConfigError(f"model.pool=cls: {self.weights.arch} has no [CLS] token; nearest valid is avg")
        return encoder.eval().requires_grad_(False)

    def batches(self, images: Images, size: int) -> Iterator[Batch]:
        """Yield this rank's share, every `world_size`-th image once, `size` at a time, without augmentation.

        Images that fail are left out, and recorded in `images.bad`.
        """
        data, here = self.config.data, self.here
        shown = images.source, data.image_size, size, here.device, data.workers
        part = here.rank, here.world_size
        return evaluation_batches(*shown, central=data.test_crop, part=part, bad_samples=images.bad)
