"""The configuration of one evaluation: frozen, typed, each setting with its unit, range, help and source.

A protocol's figures are a preset of `configs/eval/`; the defaults here are what protocols share. Sources beside those
of `schema.py`: "CAE" is Chen et al. (2022), "DINO" Caron et al. (2021), "DeiT" Touvron et al. (2021), "ViTDet" Li et
al. (2022), "FPN" Lin et al. (2017), "Mask R-CNN" He et al. (2017), and "mmseg" mmsegmentation, in which UPerNet's
published figures on ADE20K were made.
"""

from dataclasses import dataclass, fields
from typing import Literal

from ccmim_fast.config import units as u
from ccmim_fast.config.keys import flatten, nearest
from ccmim_fast.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, WatchConfig
from ccmim_fast.config.setting import like, section, setting
from ccmim_fast.config.validate import check_order, check_resume, check_values
from ccmim_fast.config.values import refuse


@dataclass(frozen=True)
class EvalRunConfig(RunConfig):
    dir: u.Folder = setting("", "output; empty: eval/NAME in the checkpoint's run, else runs/eval/NAME", "ours")
    save_every: u.Epochs = like(RunConfig, "save_every", 1)
    keep: u.Count = like(RunConfig, "keep", 1)
    tensorboard: bool = like(RunConfig, "tensorboard", False, "ours")
    test_every: u.Epochs = setting(10, "epochs between accuracies on test images; the last is always tested", "ours")


@dataclass(frozen=True)
class EvalDataConfig:
    source: Literal["images", "shapes", "coco", "ade20k", "inaturalist", "flowers"] = setting(
        "images", "folders of images, shapes made by code, or a data set as its owners publish it", "ours"
    )
    root: u.Folder = setting("", "train/ and val/ or test/, or a published set; shapes: the cache", "ours", "free")
    test: u.Folder = setting("", "the test images; empty: val/ or test/ in data.root", "ours", "free")
    index: u.File = like(DataConfig, "index")
    image_key: u.Name = like(DataConfig, "image_key")
    on_error: u.OnError = like(DataConfig, "on_error")
    max_bad: u.Share = like(DataConfig, "max_bad")
    loader: u.Loader = like(DataConfig, "loader")
    image_size: tuple[u.Side, u.Side] = like(DataConfig, "image_size", source="MAE")
    max_value: tuple[u.Positive, ...] = like(DataConfig, "max_value", (), "the checkpoint's, else the format's")
    mean: tuple[u.Mean, ...] = like(DataConfig, "mean", (), "the checkpoint's, else ImageNet's")
    std: tuple[u.Positive, ...] = like(DataConfig, "std", (), "the checkpoint's, else ImageNet's")
    crop_scale: tuple[u.Part, u.Part] = like(DataConfig, "crop_scale", (0.08, 1.0))
    crop_rule: u.CropRule = like(DataConfig, "crop_rule", source="MAE, fine-tuning")
    flip: bool = like(DataConfig, "flip", True, "MAE")
    test_crop: u.Share = setting(
        0.875, "share of a test image's shorter side that is shown; 0: 224 of 256, all for images above 224", "MAE"
    )
    workers: u.Threads = like(DataConfig, "workers")
    samples: u.Images = like(DataConfig, "samples")
    test_samples: u.Images = setting(1000, "shapes: number of test images", "ours")
    classes: u.Classes = like(DataConfig, "classes")
    background: u.Background = like(DataConfig, "background")


@dataclass(frozen=True)
class EvalModelConfig:
    arch: u.Name = setting("", "timm's name, where the checkpoint has none", "ours: ViT-B/16 if 768 wide", "shape")
    num_heads: u.HeadsOr0 = setting(0, "heads of attention; 0: the run's, else the architecture's", "ours", "shape")
    pretrained_size: tuple[u.Side, ...] = setting(
        (),
        "height and width of the images of pretraining, where neither checkpoint nor architecture tells",
        "ours",
        "shape",
    )
    pool: Literal["avg", "cls"] = setting("avg", "mean over the patches' tokens, or [CLS]", "paper, section 4.1")
    fc_norm: bool = setting(
        True, "pool=avg: a new norm of the mean, in place of the encoder's of each token", "MAE", "shape"
    )
    resample: u.Resample = setting(
        "plain", "bicubic positions of another grid: antialias as timm, or plain as the protocols' code", "MAE"
    )
    drop_path: u.Decay = like(ModelConfig, "drop_path")
    mask_ratio: u.Decay = setting(
        0.0, "views: share of the patches left out of the images with few; 0: the run's, else 0.75", "MAE"
    )


@dataclass(frozen=True)
class KnnConfig:
    k: tuple[u.Count, ...] = setting((10, 20, 100, 200), "neighbours", "DINO")
    temperature: u.Positive = setting(0.07, "a neighbour's weight is exp(cosine / temperature)", "DINO")


@dataclass(frozen=True)
class LogregConfig:
    c: tuple[u.Positive, ...] = setting((1e-4, 1e-3, 1e-2, 1e-1), "inverse penalties tried on a fifth held out", "ours")


@dataclass(frozen=True)
class HeadConfig:
    rates: tuple[u.Positive, ...] = setting((1.0,), "linear: heads, each with so many times base_lr", "MAE", "shape")
    num_heads: u.HeadsOr0 = setting(0, "attentive: heads of the pooling; 0: the encoder's", "ours", "shape")
    init_std: u.Factor = setting(0.01, "standard deviation of the classifier's initial weights", "MAE, linear probe")


@dataclass(frozen=True)
class AugmentConfig:
    auto: u.Name = setting("", "timm's policy, such as rand-m9-mstd0.5-inc1; empty: none", "MAE, linear probe")
    erase: u.Share = setting(0.0, "probability of random erasing, by pixels of noise", "MAE, linear probe")
    mixup: u.Factor = setting(0.0, "alpha of mixup; 0: none", "MAE, linear probe")
    cutmix: u.Factor = setting(0.0, "alpha of CutMix; 0: none", "MAE, linear probe")
    smoothing: u.Decay = setting(0.0, "smoothing of labels", "MAE, linear probe")
    repeats: u.Count = setting(1, "times that an epoch shows an image, out of so many times fewer", "MAE (DeiT: 3)")


@dataclass(frozen=True)
class SegmentConfig:
    sides: tuple[u.Side, u.Side] = setting((512, 2048), "short and long; an image is as large as fits", "mmseg")
    ratio: tuple[u.Zoom, u.Zoom] = setting((0.5, 2.0), "range of the scale, of segment.sides", "mmseg")
    most: u.Part = setting(0.75, "share of a crop that one class may have, else up to ten others are drawn", "mmseg")
    stride: u.Pixels = setting(341, "from one window (data.image_size) of a test image to the next", "mmseg")
    decoder_dim: u.WidthOr0 = setting(0, "width of UPerNet's maps; 0: the encoder's", "BEiT", "shape")
    auxiliary_dim: u.Channels = setting(256, "width of the auxiliary classifier", "mmseg", "shape")
    auxiliary_weight: u.Factor = setting(0.4, "weight of the auxiliary classifier's loss", "mmseg")
    dropout: u.Decay = setting(0.1, "dropout before the classifiers", "mmseg")


@dataclass(frozen=True)
class DetectConfig:
    pyramid: Literal["fpn", "simple"] = setting("fpn", "of four blocks, or of the last (ViTDet)", "CAE", "shape")
    width: u.Width = setting(256, "channels of the pyramid and of the heads' convolutions", "FPN", "shape")
    proposals: u.whole("boxes", 4, 65536) = setting(
        512, "boxes of an image that train the heads, a quarter objects", "Mask R-CNN"
    )
    resize: Literal["short_side", "jitter"] = setting("short_side", "jitter: scaled, then cut to image_size", "CAE")
    short_sides: tuple[u.whole("pixels", 8, 65536), ...] = setting(
        tuple(range(480, 801, 32)), "sides of which one is drawn; test images have the last", "CAE"
    )
    long_side: u.whole("pixels", 8, 65536) = setting(1333, "largest longer side", "CAE")
    jitter: tuple[u.Scale, u.Scale] = setting((0.1, 2.0), "range of the scale, of what fits into image_size", "ViTDet")
    window: u.PatchesOr0 = setting(0, "side of the windows of attention, in all blocks but four; 0: none", "CAE")


@dataclass(frozen=True)
class EvalOptimConfig:
    name: Literal["lars", "sgd", "adamw"] = setting("adamw", "lars: adapted for weights alone", "MAE", "shape")
    base_lr: u.Rate = like(OptimConfig, "base_lr", 1e-3, "MAE, fine-tuning")
    schedule: Literal["cosine", "poly", "steps"] = setting("cosine", "see optim/update.py", "MAE")
    min_lr: u.Rate = like(OptimConfig, "min_lr")
    milestones: tuple[u.Milestone, ...] = setting((), "steps: shares of the run at which the rate falls to 0.1", "ours")
    momentum: u.Decay = setting(0.9, "momentum of lars and sgd", "MAE, linear probe")
    betas: tuple[u.Decay, u.Decay] = like(OptimConfig, "betas", (0.9, 0.999), "MAE, fine-tuning")
    weight_decay: u.Factor = like(OptimConfig, "weight_decay", 0.0, "MAE, linear probe")
    layer_decay: u.Part = setting(1.0, "rate of a block, as a share of that of the block above", "MAE, linear probe")
    warmup_epochs: u.WarmUp = like(OptimConfig, "warmup_epochs", 10.0, "MAE, linear probe")
    warmup_steps: u.StepsOr0 = setting(0, "warm-up in place of warmup_epochs where not 0", "ours")
    clip_grad: u.Factor = like(OptimConfig, "clip_grad")
    ema: u.Decay = setting(0.0, "decay of averaged weights, tested beside the others; 0: none", "MAE")


@dataclass(frozen=True)
class EvalTrainConfig:
    epochs: u.Epochs = like(TrainConfig, "epochs", 90, "MAE, linear probe")
    steps: u.StepsOr0 = setting(0, "length of the run in place of train.epochs where not 0", "ours")
    batch_size: u.Images = like(TrainConfig, "batch_size", source="MAE, fine-tuning")
    accumulate: u.Count = like(TrainConfig, "accumulate")
    precision: u.Precision = like(TrainConfig, "precision")
    device: u.Device = like(TrainConfig, "device")
    max_steps: u.StepsOr0 = like(TrainConfig, "max_steps")


@dataclass(frozen=True)
class EvalConfig:
    seed: u.Seed = setting(0, "key of initial heads, order, crops and augmentation", "MAE")
    run: EvalRunConfig = section(EvalRunConfig, on_resume="free")
    data: EvalDataConfig = section(EvalDataConfig)
    model: EvalModelConfig = section(EvalModelConfig)
    knn: KnnConfig = section(KnnConfig)
    logreg: LogregConfig = section(LogregConfig)
    head: HeadConfig = section(HeadConfig)
    augment: AugmentConfig = section(AugmentConfig)
    segment: SegmentConfig = section(SegmentConfig)
    detect: DetectConfig = section(DetectConfig)
    optim: EvalOptimConfig = section(EvalOptimConfig)
    train: EvalTrainConfig = section(EvalTrainConfig)
    watch: WatchConfig = section(WatchConfig, on_resume="free")


def validate_evaluation(config: EvalConfig) -> None:
    """Raise ConfigError, one line, if `config` cannot run, as far as is known without checkpoint, images and device."""
    check_values(config)
    check_resume(config.run)
    values = flatten(config)
    for key in ("knn.k", "logreg.c", "head.rates", "detect.short_sides"):
        if not values[key]:
            refuse(key, (), "a list of one number at least", flatten(EvalConfig())[key])
    for key in ("knn.k", "logreg.c", "head.rates", "optim.milestones"):
        if (once := tuple(dict.fromkeys(values[key]))) != values[key]:
            refuse(key, values[key], "a list that names each number once", once)
    if len(config.model.pretrained_size) not in (0, 2):
        refuse("model.pretrained_size", config.model.pretrained_size, "two numbers", config.data.image_size)
    policies = ("rand", "augmix", "original", "v0")
    if config.augment.auto and not config.augment.auto.startswith(policies):
        refuse("augment.auto", config.augment.auto, "a policy of timm", nearest(config.augment.auto, policies))
    check_order(config, "data.crop_scale", "segment.sides", "segment.ratio", "detect.jitter")


def protocol_crop(image_size: tuple[int, int]) -> float:
    """Return what MAE's fine-tuning shows of a test image's shorter side: 224 of 256 pixels, all for larger images."""
    return 0.875 if min(image_size) <= 224 else 1.0


def images_of(data: EvalDataConfig, mean: tuple[float, ...], std: tuple[float, ...], test: bool) -> DataConfig:
    """Return what loaders are built from: the training images, or those to test on."""
    shared = {item.name for item in fields(DataConfig)} & {item.name for item in fields(EvalDataConfig)}
    values = {name: getattr(data, name) for name in shared} | {"mean": mean, "std": std, "channels": len(mean)}
    if test:
        values |= {"index": "", "samples": data.test_samples}
    return DataConfig(**values)
