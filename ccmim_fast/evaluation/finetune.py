"""Fine-tuning: all weights, with timm's augmentation, mixup, layer-wise rates and stochastic depth."""

# B batch, H height, W width, C channels

import itertools

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torchvision.transforms import Compose

from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.images import round_pixels_
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.evaluation.loader import SampleLoader
from ccmim_fast.evaluation.supervised import Classifier, seed_generators

_ATTEMPTS = 10


def prepare(job: Job) -> Work:
    """Prepare the training of all weights, to the accuracies of the end."""
    config, here, mixes = job.config, job.here, job.config.augment.mixup or job.config.augment.cutmix
    auto, channels = config.augment.auto, len(job.weights.mean)
    if auto and channels != 3:
        raise ConfigError(
            f"augment.auto={auto}: timm's policies are of 3 channels, not {channels}; set augment.auto=''"
        )
    if config.data.crop_rule != "torchvision":
        raise ConfigError(f"data.crop_rule={config.data.crop_rule}: timm's augmentation has torchvision's; use that")
    batch, parts = config.train.batch_size, config.train.accumulate * here.world_size
    if mixes and batch // parts % 2:
        near = (batch // parts + 1) * parts
        raise ConfigError(f"train.batch_size={batch}: mixup needs pairs; nearest valid is {near}")
    model = config.model
    pooling = {"pool": model.pool, "fc_norm": model.fc_norm}
    vit = job.build_encoder(num_classes=job.test.classes, drop_path=model.drop_path, **pooling).to(here.device)
    for head in (vit.head, getattr(vit, "head_dist", vit.head)):
        nn.init.trunc_normal_(head.weight, std=config.head.init_std)
    round_pixels_((job.train, job.test), here)
    mean_C, std_C = (torch.tensor(values, device=here.device) for values in (job.weights.mean, job.weights.std))

    def inputs(images: Tensor) -> Tensor:
        """Training images are prepared by timm; those to test on are uint8 [B, H, W, C]."""
        return images if images.is_floating_point() else ((images / 255 - mean_C) / std_C).permute(0, 3, 1, 2)

    return Classifier(job, vit, inputs, build_optimizer(vit, config.optim), AugmentedLoader(job)).run


def build_optimizer(vit: nn.Module, optim: EvalOptimConfig, *new: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW whose rate falls by `layer_decay` from block to block downwards; no decay of vectors and tokens.

    The head of `vit` and its last norm have the whole rate, as in MAE; so have the modules `new`, which stand in their
    place.
    """
    groups = param_groups_layer_decay(
        vit, optim.weight_decay, no_weight_decay_list=vit.no_weight_decay(), layer_decay=optim.layer_decay
    )
    for group in groups if new else ():
        # timm gives the last layer there is, a block here, the whole rate.
        group["lr_scale"] *= optim.layer_decay
    # timm lowers the rate of the last norm by the last block's, and gives learned rotary frequencies that of the head:
    # they are positions, with the rate of the first layer.
    moved = [(list(vit.norm.parameters()), 1.0)]
    if hasattr(getattr(vit, "rope", None), "freqs"):
        moved.append(([vit.rope.freqs], min(group["lr_scale"] for group in groups)))
    for parameters, scale in moved:
        for group in groups:
            group["params"] = [p for p in group["params"] if not any(p is one for one in parameters)]
        groups.append({"params": parameters, "lr_scale": scale, "weight_decay": 0.0})
    for part in new:
        groups += param_groups_weight_decay(part, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.base_lr, betas=optim.betas)


class AugmentedLoader(SampleLoader):
    """This loader gives a rank (float images [B, C, H, W], labels [B] or, mixed, shares of classes [B, classes])."""

    def __init__(self, job: Job):
        data, augment = job.train.data, job.config.augment
        super().__init__(job, augment.repeats)
        geometry, policy, last = create_transform(
            (len(data.mean), *data.image_size),
            is_training=True,
            separate=True,
            scale=data.crop_scale,
            hflip=0.5 if data.flip else 0.0,
            color_jitter=None,
            auto_augment=augment.auto or None,
            interpolation="bicubic",
            mean=data.mean,
            std=data.std,
            re_prob=augment.erase,
            re_mode="pixel",
        )
        # Of another number of channels Pillow has no images, nor a policy: timm's transforms work on tensors, too.
        pillow = len(data.mean) == 3
        self._as_image = Image.fromarray if pillow else _as_tensor
        between = policy.transforms if pillow else [_scaled]
        self._transform = Compose([*geometry.transforms, *between, *last.transforms])
        self._classes, self._smoothing, self._mix = job.test.classes, augment.smoothing, None
        if augment.mixup or augment.cutmix:
            self._mix = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=self._classes
            )

    def make(self, read: np.ndarray, index: int, epoch: int) -> tuple[Tensor, int]:
        """Return a normalised image [C, H, W] and its label; timm draws from the global generators, so they are set."""
        image = self._as_image(read)
        for attempt in itertools.count():
            seed_generators(self.config.seed, epoch, index, attempt)
            try:
                return self._transform(image), int(self.plan.source.labels_N[index])
            except ValueError as error:
                # rand-m9-mstd0.5 posterizes 0.15 % of the images to no bit at all, which Pillow 13 refuses: they are
                # augmented anew.
                if "bits" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise

    def place(self, batch: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Tensor]:
        """See `SampleLoader`; mixing draws from the global generators too."""
        images_BCHW, labels_B = (part.to(self.here.device, non_blocking=True) for part in batch)
        if self._mix is None:
            shares_BC = nn.functional.one_hot(labels_B, self._classes).float()
            return images_BCHW, shares_BC * (1 - self._smoothing) + self._smoothing / self._classes
        seed_generators(self.config.seed, number, self.here.rank)
        return self._mix(images_BCHW, labels_B)


def _as_tensor(read_HWC: np.ndarray) -> Tensor:
    return torch.tensor(read_HWC).permute(2, 0, 1)


def _scaled(image_CHW: Tensor) -> Tensor:
    """Return what Pillow's images become, 0..1."""
    return image_CHW / 255
