"""The configuration of one pretraining run: frozen, typed, each field with its unit and source.

The defaults are ViT-B/16 as the paper trains it; the YAML files under `configs/` hold differences from them only.
"paper" is ccMIM (ICLR 2023), "MAE" is He et al. (2021), "MaskFeat" is Wei et al. (2021), "BEiT" is Bao et al. (2021).
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/pretrain"  # output folder; refused if it holds a run, unless `resume` or `overwrite` is set
    resume: str = "never"  # never | auto (the newest complete checkpoint in `dir`) | path of a checkpoint
    overwrite: bool = False  # empty `dir` first
    allow_change: bool = False  # go on with settings that make it another run: batch, rate, epochs, masks and the like
    save_every: int = 10  # epochs between checkpoints; the last epoch is always saved
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # epochs; every n-th is saved too, and its checkpoint kept for good besides those; 0: none
    log_every: int = 20  # optimizer steps between log lines
    tensorboard: bool = True  # event files beside metrics.jsonl


@dataclass(frozen=True)
class DataConfig:
    source: Literal["images", "shapes", "photos"] = "images"  # `shapes` and `photos` are made by code
    # folder of images (ImageFolder tree or flat), of tars or of tables; one of these, a list, a URL; see docs/data.md.
    # For made sources the cache folder
    root: str = ""
    index: str = ""  # file that says where each image is; empty: beside the tars or in the user's cache folder
    on_error: Literal["skip", "error"] = "skip"  # an image that cannot be decoded: show another, or stop
    max_bad: float = 0.01  # share of the images that may be unusable; more stop the run
    window: int = 0  # samples shuffled among each other, where distant reads are slow; 0: all
    loader: Literal["auto", "dali", "torch"] = "auto"  # auto: DALI where it is installed, else PIL + torch
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; paper
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # per channel on a 0..1 scale; ImageNet, as in MAE
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # random resized crop, share of the image's area; MAE
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of the crop; MAE
    flip: bool = False  # horizontal flip, p = 0.5; the paper uses the crop only (appendix C)
    workers: int = 0  # decoding threads of a rank; 0: its share of the cores
    samples: int = 4000  # made sources: number of images
    classes: int = 6  # `shapes`: number of shape classes, 2..6
    background: Literal["plain", "textured"] = "plain"  # `shapes`: what stands behind the object


@dataclass(frozen=True)
class ModelConfig:
    arch: str = "vit_base_patch16_224"  # any timm VisionTransformer by name
    patch_size: int = 0  # pixels, 2..32; 0: the architecture's own
    embed_dim: int = 0  # width; 0: the architecture's own, likewise below
    depth: int = 0  # blocks
    num_heads: int = 0
    drop_path: float = 0.0  # stochastic depth rate


@dataclass(frozen=True)
class ScoreConfig:
    # where Eq. 4 is read: at the first block, at one block, at all; or in a bank of what earlier steps saw at all of
    # them, see docs/score-bank.md
    source: Literal["first", "block", "all", "bank"] = "bank"
    block: int = 0  # `source: block`: index of the block, 0-based
    normalise: Literal["renorm", "softmax"] = "renorm"  # `source: all`: renormalise, or softmax again (authors' code)
    temperature: float = 1.0  # T of s^(1/T)
    # The rest is for `source: bank`.
    grid: int = 16  # cells per side of a sample's map; 2 bytes each
    momentum: float = 0.5  # of what a cell held, when a crop covers it again
    blocks: int = 0  # the last ones, over which attention is averaged; 0: all
    unseen: Literal["first", "random"] = "first"  # how patches are scored that no crop has covered yet
    store: Literal["auto", "device", "host", "file"] = "auto"  # where the maps lie; auto: the first that holds them
    device_gb: float = 2.0  # 10^9 bytes of a GPU's memory that the maps may take
    host_gb: float = 16.0  # of a process's memory on the host
    shards: int = 0  # parts of the images, each on ranks of its own; 0: one per node; 1: a global shuffle


@dataclass(frozen=True)
class MaskConfig:
    ratio: float = 0.75  # share of patches masked; MAE
    strategy: Literal["random", "block", "importance", "importance_sampling"] = "importance_sampling"  # paper, Table 5
    noise: Literal["gumbel", "uniform"] = "gumbel"  # uniform: the authors' code divides by softmax(U(0, 1))
    block_min: int = 16  # patches; smallest block of `strategy: block`; BEiT


@dataclass(frozen=True)
class DecoderConfig:
    depth: int = 2  # blocks; paper, section 4.1 (MAE and the authors' code: 8)
    dim: int = 512  # width; MAE
    num_heads: int = 16  # MAE


@dataclass(frozen=True)
class TargetConfig:
    kind: Literal["pixels", "hog"] = "pixels"  # paper, section 3.2
    norm_pix: bool = True  # per-patch normalisation (unbiased variance, eps 1e-6); MAE
    hog_bins: int = 9  # orientations over 180 degrees; MaskFeat
    hog_cell: int = 8  # pixels per side; MaskFeat


@dataclass(frozen=True)
class HeadsConfig:
    dim: int = 256  # width of the contrastive space; authors' code
    sync_bn: bool = True  # BatchNorm statistics over all ranks


@dataclass(frozen=True)
class ContrastConfig:
    loss: Literal["nce", "align", "moco", "none"] = "nce"  # Eq. 7, Eq. 8, the authors' code, off (MAE)
    weight: float = 0.2  # lambda of Eq. 10; paper, Fig. 2
    temperature: float = 0.2  # tau of Eq. 7; the paper gives none


@dataclass(frozen=True)
class OptimConfig:
    # torch's fused AdamW; the others are NVIDIA apex's, which is built from source, see docs/performance.md
    name: Literal["adamw", "apex_adamw", "apex_lamb"] = "adamw"
    base_lr: float = 1.5e-4  # per 256 images; paper, appendix C
    min_lr: float = 0.0  # end of the cosine; MAE
    weight_decay: float = 0.05  # paper, appendix C; not applied to biases, norms and tokens
    betas: tuple[float, float] = (0.9, 0.95)  # MAE
    warmup_epochs: float = 40.0  # linear warm-up; MAE
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping
    ema_decay: float = 0.0  # exponential moving average of the weights, per step; 0: none


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 800  # paper, Table 1
    batch_size: int = 1024  # images per optimizer step, over all ranks and micro-batches; paper, appendix C
    accumulate: int = 1  # micro-batches per optimizer step; BatchNorm and negatives see one micro-batch
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # auto: by device, see models/precision.py
    device: str = "auto"  # auto | cpu | cuda
    # auto: Triton on CUDA for the ops measured to win there (none yet: no kernel has run on a GPU), else plain PyTorch
    kernels: Literal["auto", "triton", "reference"] = "auto"
    # backend, see models/block.py; auto: the one measured best for the device, the dtype and the number of tokens
    attention: Literal["auto", "sdpa", "plain", "flash", "cudnn", "efficient", "xformers"] = "auto"
    # many processes: whole weights on each, or (FSDP2) each block's divided among them and gathered when it runs
    parallel: Literal["ddp", "fsdp"] = "ddp"
    recompute: bool = False  # activation checkpointing: keep each block's input alone, compute the rest again
    # torch.compile: per block, or forward and losses as one graph; auto: `step` on CUDA from compute capability 7.0 on
    compile: Literal["auto", "off", "blocks", "step"] = "auto"
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # of torch.compile
    cuda_graph: bool = False  # capture the whole step, optimizer included, and replay it
    find_batch: bool = False  # first find the largest micro-batch that fits the GPU, and accumulate as that asks
    max_steps: int = 0  # stop after so many optimizer steps; 0: all epochs
    profile: int = 0  # profile so many optimizer steps once, after 3 others, and go on; 0: none; docs/performance.md


@dataclass(frozen=True)
class WatchConfig:
    bad_steps: int = 3  # in a row, with gradients that are not finite, until the run goes back to its last checkpoint
    spike: float = 10.0  # standard deviations above the last logged losses from which on one is told of; 0: none
    timeout: float = 30.0  # minutes that a rank waits for another


@dataclass(frozen=True)
class Config:
    seed: int = 0  # 0 .. 2**32 - 1; keys initial weights, order, crops and masks
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
