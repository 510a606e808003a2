"""The kinds of training step that are tried on the null device: settings by name. No torch here: tests import it."""

# The smallest step with every part, of images that are no square.
SMALL = (
    *("--model.arch=vit_tiny_patch16_224", "--model.depth=2", "--data.image_size=[64,96]", "--train.device=cuda"),
    *("--train.batch_size=4", "--train.compile=off", "--decoder.dim=64", "--decoder.num_heads=4"),
)
SOURCES, CONTRASTS, TARGETS = ("first", "block", "all", "bank"), ("nce", "align", "moco", "none"), ("pixels", "hog")
KERNELS, PRECISIONS = ("reference", "triton"), ("bf16", "fp16", "fp32")
# Compute capabilities times ten, and the precision that `auto` is there.
ARCHITECTURES = {61: "fp32", 75: "fp16", 80: "bf16", 90: "bf16", 100: "bf16"}

# Settings that change the path of a step.
OPTIONS: dict[str, tuple[str, ...]] = {
    "random masks": ("--mask.strategy=random",),
    "masks of blocks": ("--mask.strategy=block",),
    "masks by importance": ("--mask.strategy=importance",),
    "uniform noise": ("--mask.noise=uniform",),
    "scores at a temperature": ("--score.source=first", "--score.temperature=0.5"),
    "hints, a part by importance, schedules": (
        "--mask.hints=0.1",
        "--mask.importance=[0,0.5]",
        "--score.temperature=[4,1]",
    ),
    "unseen patches at random": ("--score.unseen=random",),
    "a teacher of a third of the patches": ("--teacher.tokens=0.34",),
    "recompute": ("--train.recompute=true",),
    "recompute, scores of all blocks": ("--train.recompute=true", "--score.source=all"),
    "clip": ("--optim.clip_grad=1",),
    "averaged weights": ("--optim.ema_decay=0.99",),
    "micro-batches": ("--train.accumulate=2", "--train.batch_size=8"),
    "stochastic depth": ("--model.drop_path=0.1",),
    "one channel": ("--data.channels=1", "--data.mean=[0.5]", "--data.std=[0.2]"),
    "pixels as they are": ("--target.norm_pix=false",),
    "parts of one's own": (
        "--model.positions=learned",
        "--model.registers=2",
        "--model.layer_scale=0.1",
        "--model.qk_norm=true",
        "--model.mlp=swiglu",
    ),
    "rotary positions": ("--model.positions=rope",),
    "rotary positions of DINOv3": ("--model.arch=vit_small_patch16_dinov3", "--score.source=first"),
    "learned frequencies": ("--model.arch=vit_small_patch16_rope_mixed_ape_224",),
    **{f"attention {name}": (f"--train.attention={name}",) for name in ("plain", "sdpa", "efficient", "flash")},
}


def settings_of(precision: str, kernels: str, more: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command line of a small step."""
    return (*SMALL, f"--train.precision={precision}", f"--train.kernels={kernels}", *more)


def parts_of(source: str, contrast: str, target: str) -> tuple[str, ...]:
    """Return the settings of a score source, a contrastive loss and a target."""
    block = 1 if source == "block" else 0
    chosen = (f"--score.source={source}", f"--score.block={block}", f"--contrast.loss={contrast}")
    return (*chosen, f"--target.kind={target}")
