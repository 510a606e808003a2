"""The configuration of one pretraining run: frozen, typed, each setting with its unit, range, help and source.

The defaults are ViT-B/16 as the paper trains it; the YAML files under `configs/` hold differences from them only.
Sources: "paper" is ccMIM (ICLR 2023), "MAE" He et al. (2021) and their repository, "MaskFeat" Wei et al. (2021), "BEiT"
Bao et al. (2021), "AttMask" Kakogeorgiou et al. (2022) and "HPM" Wang et al. (2023) of options that are off by default,
"ours" a choice of this project.
"""

from dataclasses import dataclass
from typing import Literal

from ccmim_fast.config import units as u
from ccmim_fast.config.setting import labels, section, setting
from ccmim_fast.registry import CONTRASTS, IMAGE_SOURCES, SCORE_SOURCES, TARGETS


@dataclass(frozen=True)
class RunConfig:
    dir: u.Folder = setting("runs/pretrain", "output; refused if it holds a run, unless resumed or overwritten", "ours")
    resume: u.File = setting("never", "never, auto (the newest complete checkpoint in run.dir) or a checkpoint", "ours")
    overwrite: bool = setting(False, "empty run.dir first", "ours")
    allow_change: bool = setting(False, "go on with settings that make it another run, such as another batch", "ours")
    save_every: u.Epochs = setting(10, "epochs between checkpoints; the last epoch is always saved", "ours")
    keep: u.Count = setting(3, "newest checkpoints kept", "ours")
    keep_every: u.EpochsOr0 = setting(0, "every n-th epoch is saved too, and kept for good; 0: none", "ours")
    log_every: u.Steps = setting(20, "optimizer steps between log lines", "MAE")
    tensorboard: bool = setting(True, "event files beside metrics.jsonl", "MAE")


@dataclass(frozen=True)
class DataConfig:
    source: Literal[tuple(IMAGE_SOURCES)] = setting("images", "shapes and photos are made by code", "paper")
    root: u.Folder = setting("", "images, tars or tables: docs/data.md; of made sources the cache", "ours", "free")
    index: u.File = setting("", "places of the images; empty: beside the tars or in the user's cache", "ours", "free")
    image_key: u.Name = setting("", "which member of a sample is its image, as jpg or jpg;png: docs/data.md", "ours")
    on_error: u.OnError = setting("skip", "an image that cannot be decoded: show another, or stop", "ours", "free")
    max_bad: u.Share = setting(0.01, "share of the images that may be unusable; more stop the run", "ours", "free")
    window: u.ImagesOr0 = setting(0, "images shuffled among each other, where distant reads are slow; 0: all", "ours")
    loader: u.Loader = setting("auto", "auto: DALI where it is installed, else PIL + torch", "ours", "free")
    image_size: tuple[u.Side, u.Side] = setting((224, 224), "height, width", "paper", "shape")
    channels: u.Channels = setting(3, "channels of an image", "ImageNet", "shape")
    max_value: tuple[u.Positive, ...] = setting(
        (), "number that is white, one or one per channel; empty: the format's, 255, 65535, 1 of floats", "ours"
    )
    mean: tuple[u.Mean, ...] = setting((0.485, 0.456, 0.406), "per channel, white is 1", "ImageNet, as in MAE")
    std: tuple[u.Positive, ...] = setting((0.229, 0.224, 0.225), "per channel, white is 1", "ImageNet, as in MAE")
    crop_scale: tuple[u.Part, u.Part] = setting((0.2, 1.0), "random resized crop, share of the image's area", "MAE")
    crop_ratio: tuple[u.Positive, u.Positive] = setting((0.75, 4 / 3), "width / height of the crop", "MAE")
    crop_rule: u.CropRule = setting(
        "torchvision", "a crop beyond the image is drawn again, or (mae) cut to the image, as MAE's linear probe", "MAE"
    )
    flip: bool = setting(False, "horizontal flip of training images, p = 0.5", "paper, appendix C: the crop only")
    workers: u.Threads = setting(0, "decoding threads of a rank; 0: its share of the cores", "ours", "free")
    samples: u.Images = setting(4000, "made sources: number of images", "ours")
    classes: u.Classes = setting(6, "shapes: number of shape classes", "ours")
    background: u.Background = setting("plain", "shapes: surface behind the object", "ours")


@dataclass(frozen=True)
class ModelConfig:
    arch: u.Name = setting("vit_base_patch16_224", "timm's name of a ViT: docs/architectures.md", "paper", "shape")
    patch_size: u.whole("pixels", 0, 32) = setting(0, "side of a patch; 0: the architecture's own", "paper", "shape")
    embed_dim: u.WidthOr0 = setting(0, "width of the encoder; 0: the architecture's own", "paper", "shape")
    depth: u.BlocksOr0 = setting(0, "blocks of the encoder; 0: the architecture's own", "paper", "shape")
    num_heads: u.HeadsOr0 = setting(0, "heads of attention; 0: the architecture's own", "paper", "shape")
    drop_path: u.Decay = setting(0.0, "stochastic depth rate", "MAE")
    positions: Literal["sincos", "learned", "rope"] = setting(
        "sincos", "fixed sines and cosines, or learned, added to patches; or rotary alone", "MAE", "shape"
    )
    registers: u.whole("tokens", 0, 64) = setting(0, "register tokens; 0: the architecture's own", "paper", "shape")
    layer_scale: u.Factor = setting(0.0, "initial layer scale; 0: the architecture's own", "paper", "shape")
    qk_norm: bool = setting(False, "norms of queries and keys; false: the architecture's own", "paper", "shape")
    mlp: Literal["own", "gelu", "swiglu"] = setting(
        "own", "MLP of a block, with as many weights; own: the architecture's", "paper", "shape"
    )


@dataclass(frozen=True)
class ScoreConfig:
    source: Literal[tuple(SCORE_SOURCES)] = setting("bank", f"place of Eq. 4: {labels(SCORE_SOURCES)}", "ours")
    block: u.BlocksOr0 = setting(0, "source=block: index of the block, 0-based", "ours")
    normalise: Literal["renorm", "softmax"] = setting(
        "renorm", "source=all: sum to 1, or softmax again (authors' code)", "ours"
    )
    temperature: u.ScheduledPositive = setting(1.0, "T of s^(1/T); [4, 1]: of the first and last epoch", "paper")
    grid: u.whole("cells", 1, 256) = setting(16, "bank: side of a sample's map, 2 bytes a cell", "ours", "shape")
    momentum: u.Decay = setting(0.5, "bank: share of its score that a cell keeps when a crop covers it again", "ours")
    blocks: u.BlocksOr0 = setting(0, "bank: last blocks, over which attention is averaged; 0: all", "ours")
    unseen: Literal["first", "random"] = setting("first", "bank: scores of patches that no crop has covered", "ours")
    store: Literal["auto", "device", "host", "file"] = setting(
        "auto", "bank: place of the maps; auto: the first that holds them", "ours", "free"
    )
    device_gb: u.Gigabytes = setting(2.0, "bank: memory of a GPU that the maps may take", "ours", "free")
    host_gb: u.Gigabytes = setting(16.0, "bank: memory of a process that the maps may take", "ours", "free")
    shards: u.whole("parts", 0) = setting(0, "parts of the images: docs/score-bank.md; 0: one per node", "ours", "free")


@dataclass(frozen=True)
class MaskConfig:
    ratio: u.real("share", "") = setting(0.75, "share of patches masked, in (0, 1): some stay visible", "MAE")
    strategy: Literal["random", "block", "importance", "importance_sampling"] = setting(
        "importance_sampling", "choice of the masked patches: docs/method.md", "paper, Table 5"
    )
    noise: Literal["gumbel", "uniform"] = setting(
        "gumbel", "uniform: divide by softmax(U(0, 1)), as the authors' code", "ours"
    )
    block_min: u.Patches = setting(16, "strategy=block: smallest block", "BEiT")
    hints: u.Decay = setting(
        0.0, "share of the patches that importance would mask that stays visible: docs/method.md", "AttMask"
    )
    importance: u.ScheduledShare = setting(
        1.0,
        "share of the masked patches chosen by importance, not at random; [0, 0.5]: of the first and last epoch",
        "HPM",
    )


@dataclass(frozen=True)
class DecoderConfig:
    depth: u.Blocks = setting(2, "blocks of the decoder (MAE and the authors' code: 8)", "paper, section 4.1", "shape")
    dim: u.Width = setting(512, "width of the decoder", "MAE", "shape")
    num_heads: u.Heads = setting(16, "heads of attention", "MAE", "shape")


@dataclass(frozen=True)
class TargetConfig:
    kind: Literal[tuple(TARGETS)] = setting("pixels", labels(TARGETS), "paper, section 3.2", "shape")
    norm_pix: bool = setting(True, "pixels: per-patch normalisation (unbiased variance, eps 1e-6)", "MAE")
    hog_cell: u.whole("pixels", 1, 32) = setting(8, "hog: side of a cell", "MaskFeat", "shape")


@dataclass(frozen=True)
class HeadsConfig:
    dim: u.Channels = setting(256, "width of the contrastive space", "authors' code", "shape")
    sync_bn: bool = setting(True, "BatchNorm statistics over all ranks", "ours")
    init: Literal["torch", "xavier"] = setting("torch", "initial weights; xavier: the authors' code", "ours")


@dataclass(frozen=True)
class ContrastConfig:
    loss: Literal[tuple(CONTRASTS)] = setting("nce", labels(CONTRASTS), "paper, Eq. 7", "shape")
    weight: u.Factor = setting(0.2, "lambda of Eq. 10", "paper, Fig. 2")
    temperature: u.Positive = setting(0.2, "tau of Eq. 7", "ours; the paper gives none")


@dataclass(frozen=True)
class TeacherConfig:
    tokens: u.Part = setting(
        1.0, "share of the masked patches that the masked branch sees, drawn at random", "paper, Eq. 7"
    )
    precision: Literal["auto", "same", "int8"] = setting(
        "same", "passes without gradient: same as train.precision, or 8 bits on a CPU; auto: the faster", "ours"
    )


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "apex_adamw", "apex_lamb"] = setting(
        "adamw", "torch's fused AdamW, or NVIDIA apex's, built from source: docs/performance.md", "MAE", "shape"
    )
    base_lr: u.Rate = setting(1.5e-4, "learning rate per 256 images", "paper, appendix C")
    min_lr: u.Rate = setting(0.0, "learning rate at the end of the schedule", "MAE")
    weight_decay: u.Factor = setting(0.05, "decay of weights, but of biases and norms", "paper, appendix C")
    decay_tokens: bool = setting(
        False, "decay of [CLS], registers and mask token too, as in MAE's and the authors' code", "ours", "shape"
    )
    betas: tuple[u.Decay, u.Decay] = setting((0.9, 0.95), "decays of AdamW's two averages", "MAE")
    warmup_epochs: u.WarmUp = setting(40.0, "linear warm-up of the learning rate", "MAE")
    clip_grad: u.Factor = setting(0.0, "largest gradient norm; 0: no clipping", "MAE")
    ema_decay: u.Decay = setting(0.0, "exponential moving average of the weights, per step; 0: none", "MAE")


@dataclass(frozen=True)
class TrainConfig:
    epochs: u.Epochs = setting(800, "passes over the images", "paper, Table 1")
    batch_size: u.Images = setting(1024, "images per optimizer step, over ranks and micro-batches", "paper, appendix C")
    accumulate: u.Count = setting(1, "micro-batches per step; BatchNorm and negatives see one micro-batch", "ours")
    precision: u.Precision = setting("auto", "auto: by device, see models/precision.py", "ours")
    device: u.Device = setting("auto", "auto: cuda where it is available", "ours", "free")
    kernels: Literal["auto", "triton", "reference"] = setting(
        "auto", "auto: Triton on CUDA, for each op unless plain PyTorch is measured to be faster", "ours", "free"
    )
    attention: u.Attention = setting("auto", "backend; auto: the fastest for each length, measured", "ours", "free")
    autotune: Literal["cached", "fresh", "off"] = setting(
        "cached", "how auto decides: measured once for a machine and a shape, anew, or unmeasured", "ours", "free"
    )
    parallel: Literal["ddp", "fsdp"] = setting("ddp", "whole weights on each rank, or divided (FSDP2)", "ours", "free")
    recompute: bool = setting(False, "activation checkpointing: keep each block's input alone", "ours", "free")
    compile: Literal["auto", "off", "blocks", "step"] = setting(
        "auto", "torch.compile of what; auto: step on CUDA from 7.0 on, unless eager is faster", "ours", "free"
    )
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = setting(
        "default", "mode of torch.compile", "torch", "free"
    )
    cuda_graph: bool = setting(False, "capture the whole step, optimizer included, and replay it", "ours", "free")
    find_batch: bool = setting(False, "first find the largest micro-batch that fits the GPU", "ours", "free")
    max_steps: u.StepsOr0 = setting(0, "stop after so many optimizer steps; 0: all epochs", "ours", "free")
    feature_images: u.ImagesOr0 = setting(
        512,
        "images whose features are measured without labels at ends of epochs: docs/long-runs.md; 0: none",
        "ours",
        "free",
    )
    # A step of ViT-B is about 10,000 events of the trace.
    profile: u.whole("optimizer steps", 0, 100) = setting(0, "profile so many once; 0: none", "ours", "free")


@dataclass(frozen=True)
class WatchConfig:
    bad_steps: u.Steps = setting(3, "in a row, gradients not finite, until the last checkpoint is restored", "ours")
    spike: u.Factor = setting(10.0, "deviations above the last losses from which on one is reported; 0: none", "ours")
    timeout: u.Minutes = setting(30.0, "minutes that a rank waits for another", "ours")


@dataclass(frozen=True)
class Config:
    seed: u.Seed = setting(0, "key of initial weights, order, crops and masks", "MAE")
    run: RunConfig = section(RunConfig, on_resume="free")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    score: ScoreConfig = section(ScoreConfig)
    mask: MaskConfig = section(MaskConfig)
    decoder: DecoderConfig = section(DecoderConfig)
    target: TargetConfig = section(TargetConfig)
    heads: HeadsConfig = section(HeadsConfig)
    contrast: ContrastConfig = section(ContrastConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    watch: WatchConfig = section(WatchConfig, on_resume="free")
