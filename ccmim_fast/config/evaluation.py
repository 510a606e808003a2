"""The configuration of one evaluation: frozen, typed, each field with its unit and source.

A protocol's figures are a preset of `configs/eval/`; the defaults here are what protocols share. "MAE" is He et al.
(2021) and its repository, "CAE" is Chen et al. (2022).
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from ccmim_fast.config.keys import flatten, nearest, settings
from ccmim_fast.config.schema import DataConfig, WatchConfig
from ccmim_fast.config.validate import COUNT, COUNT_OR_0, check_values
from ccmim_fast.errors import ConfigError


@dataclass(frozen=True)
class EvalRunConfig:
    # output folder; empty: eval/NAME in the folder of the checkpoint's run, or runs/eval/NAME for another checkpoint.
    # Refused if not empty, unless `resume` or `overwrite` is set
    dir: str = ""
    resume: Literal["never", "auto"] = "never"  # auto: go on from the newest complete checkpoint in `dir`
    overwrite: bool = False  # empty `dir` first
    allow_change: bool = False  # go on with settings that make it another run: batch, rate, epochs and the like
    save_every: int = 1  # epochs between checkpoints; the last epoch is always saved
    keep: int = 1  # newest checkpoints kept
    keep_every: int = 0  # epochs; every n-th is saved too, and its checkpoint kept for good besides those; 0: none
    log_every: int = 20  # optimizer steps between log lines
    test_every: int = 10  # epochs between accuracies on the test images; the last epoch is always tested
    tensorboard: bool = False  # event files beside metrics.jsonl


@dataclass(frozen=True)
class EvalDataConfig:
    # Folders of images, or a data set as its owners publish it; `shapes` are made by code, those to test on from
    # another seed. Each evaluation says which it reads.
    source: Literal["images", "shapes", "coco", "ade20k", "inaturalist", "flowers"] = "images"
    root: str = ""  # folder with train/ and val/ (or test/), of training images, or of a published set; `shapes`: cache
    test: str = ""  # folder of the test images; empty: val/ or test/ in `root`
    index: str = ""  # as in pretraining: file that says where each training image is
    on_error: Literal["skip", "error"] = "skip"  # an image that cannot be decoded
    max_bad: float = 0.01  # share of the images that may be unusable; more stop the run
    loader: Literal["auto", "dali", "torch"] = "auto"  # auto: DALI where it is installed, else PIL + torch
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; MAE
    mean: tuple[float, ...] = ()  # per channel on a 0..1 scale; empty: the checkpoint's, else ImageNet's
    std: tuple[float, ...] = ()
    crop_scale: tuple[float, float] = (0.08, 1.0)  # random resized crop, share of the image's area; MAE
    flip: bool = True  # horizontal flip of training images, p = 0.5; MAE
    test_crop: float = 0.875  # share of the shorter side that a test image shows: 224 of 256; MAE
    workers: int = 0  # decoding threads of a rank, in fine-tuning and detection processes; 0: its share of the cores
    samples: int = 4000  # `shapes`: number of training images
    test_samples: int = 1000  # `shapes`: number of test images
    classes: int = 6  # `shapes`: number of shape classes, 2..6
    background: Literal["plain", "textured"] = "plain"  # `shapes`: what stands behind the object


@dataclass(frozen=True)
class EvalModelConfig:
    arch: str = ""  # timm's name, where the checkpoint does not tell; else vit_base_patch16_224 if 768 wide
    num_heads: int = 0  # of attention; 0: the run's, else the architecture's own
    pool: Literal["avg", "cls"] = "avg"  # mean over the patches' tokens (paper, appendix C), or [CLS]
    drop_path: float = 0.0  # stochastic depth rate, fine-tuning


@dataclass(frozen=True)
class KnnConfig:
    k: tuple[int, ...] = (10, 20, 100, 200)  # neighbours; DINO
    temperature: float = 0.07  # a neighbour's weight is exp(cosine / temperature); DINO


@dataclass(frozen=True)
class LogregConfig:
    c: tuple[float, ...] = (
        1e-4,
        1e-3,
        1e-2,
        1e-1,
    )  # inverse penalties tried on a fifth held out


@dataclass(frozen=True)
class HeadConfig:
    rates: tuple[float, ...] = (1.0,)  # linear: times `optim.base_lr`, a head of its own for each, trained at once
    num_heads: int = 0  # attentive: of the pooling attention; 0: the encoder's
    init_std: float = 0.01  # of the classifier's weights; MAE, linear probe


@dataclass(frozen=True)
class AugmentConfig:
    auto: str = ""  # timm's policy, such as rand-m9-mstd0.5-inc1; empty: none
    erase: float = 0.0  # probability of random erasing, by pixels of noise
    mixup: float = 0.0  # alpha; 0: none
    cutmix: float = 0.0  # alpha; 0: none
    smoothing: float = 0.0  # of labels
    repeats: int = 1  # times that an epoch shows an image, out of so many times fewer images; DeiT


@dataclass(frozen=True)
class SegmentConfig:
    """Segmentation. "mmseg" is mmsegmentation, in which UPerNet's published figures on ADE20K were made."""

    sides: tuple[int, int] = (512, 2048)  # pixels, short and long; images are as large as fits into them; mmseg
    ratio: tuple[float, float] = (0.5, 2.0)  # times `sides`, drawn for each training image; mmseg
    most: float = 0.75  # share of a crop that one class may have, else another is drawn, up to ten times; mmseg
    stride: int = 341  # pixels from one window of a test image to the next; a window is `data.image_size`; mmseg
    decoder_dim: int = 0  # width of UPerNet's maps; 0: the encoder's; BEiT
    auxiliary_dim: int = 256  # width of the auxiliary classifier; mmseg
    auxiliary_weight: float = 0.4  # of its loss; mmseg
    dropout: float = 0.1  # before the classifiers; mmseg


@dataclass(frozen=True)
class DetectConfig:
    pyramid: Literal["fpn", "simple"] = "fpn"  # over the outputs of four blocks (CAE), or the last one's (ViTDet)
    width: int = 256  # channels of the pyramid and of the heads' convolutions; FPN (Lin et al., 2017)
    proposals: int = 512  # of an image, a quarter of them objects, that the heads are trained on; Mask R-CNN
    resize: Literal["short_side", "jitter"] = "short_side"  # jitter: scaled, then cut to `data.image_size`
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))  # pixels, one drawn; images to test on have the last; CAE
    long_side: int = 1333  # pixels that the longer side may have
    jitter: tuple[float, float] = (0.1, 2.0)  # range of the scale, of what fits into `data.image_size`; ViTDet
    window: int = 0  # patches: side of the windows that all blocks but four attend within; 0: all attend to the image


@dataclass(frozen=True)
class EvalOptimConfig:
    name: Literal["lars", "sgd", "adamw"] = "adamw"  # LARS as in MAE: adapted for weights, plain for biases
    base_lr: float = 1e-3  # per 256 images
    schedule: Literal["cosine", "poly", "steps"] = "cosine"  # see optim/update.py
    min_lr: float = 0.0  # end of the cosine, or of poly
    milestones: tuple[float, ...] = ()  # steps: shares of the run at which the rate falls to a tenth
    momentum: float = 0.9  # lars, sgd
    trust: float = 0.001  # lars: coefficient; MAE
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    weight_decay: float = 0.0
    layer_decay: float = 1.0  # the rate of each block is so many times that of the one above it
    warmup_epochs: float = 10.0  # linear warm-up
    warmup_steps: int = 0  # in place of it where not 0
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping
    ema: float = 0.0  # decay of averaged weights, tested beside the others; 0: none


@dataclass(frozen=True)
class EvalTrainConfig:
    epochs: int = 90
    steps: int = 0  # optimizer steps in place of epochs where not 0
    batch_size: int = 1024  # images per optimizer step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per optimizer step
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # auto: by device, see models/precision.py
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_steps: int = 0  # stop after so many optimizer steps; 0: all epochs


@dataclass(frozen=True)
class EvalConfig:
    seed: int = 0  # 0 .. 2**32 - 1; keys initial heads, order, crops and augmentation
    run: EvalRunConfig = field(default_factory=EvalRunConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    model: EvalModelConfig = field(default_factory=EvalModelConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    logreg: LogregConfig = field(default_factory=LogregConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    optim: EvalOptimConfig = field(default_factory=EvalOptimConfig)
    train: EvalTrainConfig = field(default_factory=EvalTrainConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)


RANGES = {
    "seed": "[0, 4294967295]",
    "run.save_every": COUNT,
    "run.keep": COUNT,
    "run.keep_every": COUNT_OR_0,
    "run.log_every": COUNT,
    "run.test_every": COUNT,
    "data.max_bad": "[0, 1]",
    "data.image_size": "[2, 65536]",
    "data.mean": "[0, 1]",
    "data.std": "(0, 1000]",
    "data.crop_scale": "(0, 1]",
    "data.test_crop": "(0, 1]",
    "data.workers": "[0, 4096]",
    "data.samples": COUNT,
    "data.test_samples": COUNT,
    "data.classes": "[2, 6]",
    "model.num_heads": "[0, 65536]",
    "model.drop_path": "[0, 1)",
    "knn.k": COUNT,
    "knn.temperature": "(0, inf)",
    "logreg.c": "(0, inf)",
    "head.rates": "(0, inf)",
    "head.num_heads": "[0, 65536]",
    "head.init_std": "[0, inf)",
    "augment.erase": "[0, 1]",
    "augment.mixup": "[0, inf)",
    "augment.cutmix": "[0, inf)",
    "augment.smoothing": "[0, 1)",
    "augment.repeats": COUNT,
    "segment.sides": "[2, 65536]",
    "segment.ratio": "(0, 100]",
    "segment.most": "(0, 1]",
    "segment.stride": COUNT,
    "segment.decoder_dim": "[0, 65536]",
    "segment.auxiliary_dim": "[1, 65536]",
    "segment.auxiliary_weight": "[0, inf)",
    "segment.dropout": "[0, 1)",
    "detect.width": "[4, 65536]",
    "detect.proposals": "[4, 65536]",
    "detect.short_sides": "[8, 65536]",
    "detect.long_side": "[8, 65536]",
    "detect.jitter": "[0.1, 10]",
    "detect.window": "[0, 65536]",
    "optim.base_lr": "[0, inf)",
    "optim.min_lr": "[0, inf)",
    "optim.milestones": "(0, 1)",
    "optim.momentum": "[0, 1)",
    "optim.trust": "(0, inf)",
    "optim.betas": "[0, 1)",
    "optim.weight_decay": "[0, inf)",
    "optim.layer_decay": "(0, 1]",
    "optim.warmup_epochs": "[0, inf)",
    "optim.warmup_steps": COUNT_OR_0,
    "optim.clip_grad": "[0, inf)",
    "optim.ema": "[0, 1)",
    "train.epochs": COUNT,
    "train.steps": COUNT_OR_0,
    "train.batch_size": COUNT,
    "train.accumulate": COUNT,
    "train.max_steps": COUNT_OR_0,
    "watch.bad_steps": COUNT,
    "watch.spike": "[0, inf)",
    "watch.timeout": "(0, 100000)",
}


def validate_evaluation(config: EvalConfig) -> None:
    """Returns if `config` can run, as far as can be known without checkpoint, images and device.

    Raises:
        ConfigError: one line; of several mistakes the first.
    """
    known = settings(EvalConfig)
    # Without values there is no range to be in; the defaults stand for them.
    values = {key: value or known[key].default for key, value in flatten(config).items()}
    for key in ("knn.k", "logreg.c", "head.rates", "detect.short_sides"):
        if flatten(config)[key] == ():
            raise ConfigError(f"{key}=[]: must hold a number at least; nearest valid is {known[key].default}")
    ranges = {key: interval for key, interval in RANGES.items() if values[key] != ()}
    check_values({key: flatten(config)[key] for key in values}, known, ranges)
    if config.augment.auto and not config.augment.auto.startswith(policies := ("rand", "augmix", "original", "v0")):
        near = nearest(config.augment.auto, policies)
        raise ConfigError(f"augment.auto={config.augment.auto!r:.60}: no policy of timm; nearest valid is {near}")
    for key in ("data.crop_scale", "detect.jitter"):
        low, high = flatten(config)[key]
        if low > high:
            raise ConfigError(f"{key}=[{low}, {high}]: must be from small to large; nearest valid is [{high}, {low}]")


def images_of(data: EvalDataConfig, mean: tuple[float, ...], std: tuple[float, ...], test: bool) -> DataConfig:
    """What loaders are built from: the training images, or those to test on."""
    shared = {item.name for item in fields(DataConfig)} & {item.name for item in fields(EvalDataConfig)}
    values = {name: getattr(data, name) for name in shared} | {"mean": mean, "std": std, "channels": len(mean)}
    if test:
        values |= {"index": "", "samples": data.test_samples}
    return DataConfig(**values)
