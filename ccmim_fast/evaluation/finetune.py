"""Fine-tuning: all weights, with timm's augmentation, mixup, layer-wise rates and stochastic depth."""

# B batch, H height, W width, C channels

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.stream.prefetch import load_with_fallback
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.classification import classifier
from ccmim_fast.evaluation.encoders import build_encoder
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.processes import prepared
from ccmim_fast.evaluation.supervised import Training, seed_generators

_ATTEMPTS = 10


def run(job: Job) -> dict[str, float]:
    """Train all weights; accuracies of the end."""
    config, here = job.config, job.here
    _check(job)
    vit = build_encoder(
        job.weights,
        config.data.image_size,
        config.model.num_heads,
        num_classes=job.test.classes,
        pool=config.model.pool,
        drop_path=config.model.drop_path,
    ).to(here.device)
    nn.init.trunc_normal_(vit.head.weight, std=config.head.init_std)
    mean_C, std_C = (torch.tensor(values, device=here.device) for values in (job.weights.mean, job.weights.std))

    def inputs(images: Tensor) -> Tensor:
        """Training images are prepared by timm; those to test on are uint8 [B, H, W, C]."""
        return images if images.is_floating_point() else ((images / 255 - mean_C) / std_C).permute(0, 3, 1, 2)

    return Training(job, classifier(job, vit, inputs, build_optimizer(vit, config.optim), Batches(job).stream)).run()


def _check(job: Job) -> None:
    optim, train, mixes = job.config.optim, job.config.train, job.config.augment.mixup or job.config.augment.cutmix
    if optim.name != "adamw":
        raise ConfigError(f"optim.name={optim.name}: fine-tuning has adamw; nearest valid is adamw")
    if len(job.weights.mean) != 3:
        raise ConfigError(f"data.mean: {len(job.weights.mean)} channels; timm's augmentation needs 3")
    parts = train.accumulate * job.here.world_size
    if mixes and train.batch_size // parts % 2:
        near = (train.batch_size // parts + 1) * parts
        raise ConfigError(f"train.batch_size={train.batch_size}: mixup needs pairs; nearest valid is {near}")


def build_optimizer(vit: nn.Module, optim: EvalOptimConfig) -> torch.optim.Optimizer:
    """AdamW whose rate falls by `layer_decay` from block to block downwards; no decay of vectors and tokens."""
    groups = param_groups_layer_decay(
        vit, optim.weight_decay, no_weight_decay_list=vit.no_weight_decay(), layer_decay=optim.layer_decay
    )
    return torch.optim.AdamW(groups, lr=optim.base_lr, betas=optim.betas)


class Augmented(Dataset):
    """One sample at a time, as the plan shows it: a micro-batch of one -> (normalised [C, H, W], label).

    timm draws from the global generators of `random`, NumPy and torch: they are set by (seed, epoch, repeat, sample
    id), so what comes does not depend on the process that makes it.
    """

    def __init__(self, plan: Plan, bad_samples: BadSamples, transform: Callable[[Image.Image], Tensor], seed: int):
        self._plan, self._bad_samples, self._transform, self._seed = plan, bad_samples, transform, seed

    def __getitem__(self, sample: MicroBatch) -> tuple[Tensor, int]:
        shown, image_CHW = load_with_fallback(self._load, sample, self._plan, self._bad_samples)
        return image_CHW, int(self._plan.source.labels_N[shown.ids_B.item()])

    def _load(self, sample: MicroBatch) -> Tensor:
        index, epoch = sample.ids_B.item(), sample.epochs_B.item()
        image = Image.fromarray(self._plan.source.decode(index))
        for attempt in range(_ATTEMPTS):
            seed_generators(self._seed, epoch, index, attempt)
            try:
                return self._transform(image)
            except ValueError as error:
                # rand-m9-mstd0.5 posterizes 0.15 % of the images to no bit at all, which Pillow 13 refuses: they are
                # augmented anew.
                if "bits" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


class Batches:
    """Training batches of one rank: (float [B, C, H, W], labels [B] or, mixed, shares of classes [B, classes])."""

    def __init__(self, job: Job):
        self._config, self._here, config = job.config, job.here, job.config
        data, augment, source = job.train.data, config.augment, job.train.source
        self._plan = Plan(
            source,
            config.seed,
            config.train.batch_size,
            config.train.accumulate,
            job.here.rank,
            job.here.world_size,
            repeats=augment.repeats,
        )
        bad_samples = BadSamples.of(source, data.on_error, data.max_bad)
        transform = create_transform(
            (len(data.mean), *data.image_size),
            is_training=True,
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
        self._samples = Augmented(self._plan, bad_samples, transform, config.seed)
        self._mix = None
        if augment.mixup or augment.cutmix:
            self._mix = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=job.test.classes
            )
        self._classes = job.test.classes

    def stream(self, cursor: int) -> Iterator[tuple[Tensor, Tensor]]:
        """From a place of the stream on, without end; decoded by other processes where there is more than one core."""
        keys = (batch.samples() for batch in self._plan.micro_batches(cursor))
        batches = prepared(self._samples, keys, default_collate, self._config.data.workers, self._here.device)
        accumulate = self._config.train.accumulate
        place = cursor // self._plan.global_batch * accumulate
        device, smoothing = self._here.device, self._config.augment.smoothing
        for number, (images_BCHW, labels_B) in enumerate(batches, place):
            images_BCHW = images_BCHW.to(device, non_blocking=True)
            labels_B = labels_B.to(device, non_blocking=True)
            if self._mix is not None:
                seed_generators(self._config.seed, number, self._here.rank)
                yield self._mix(images_BCHW, labels_B)
            else:
                shares_BC = nn.functional.one_hot(labels_B, self._classes).float()
                yield images_BCHW, shares_BC * (1 - smoothing) + smoothing / self._classes
