"""The commands that are tried on the null device, by name: each is a line of `ccmim` in a folder. No torch here."""

from pathlib import Path

TRAINED = "device"  # the run whose weights are embedded, exported and evaluated


def pretrain(folder: Path, name: str, *settings: str) -> list[str]:
    """Return a run of the demo's size: five steps of two epochs, a checkpoint after each epoch."""
    images = ("--data.source=shapes", f"--data.root={folder / 'shapes'}", "--data.samples=96", "--data.workers=1")
    size = ("--train.batch_size=32", "--train.epochs=2", "--train.max_steps=5", "--run.log_every=2")
    how = ("--train.device=cuda", "--train.compile=off", "--data.loader=torch", "--run.tensorboard=false")
    kept = ("--run.save_every=1", f"--run.dir={folder / name}")
    return ["pretrain", "--config=demo", *images, *size, *how, *kept, *settings]


def runs(folder: Path) -> dict[str, list[str]]:
    """Return the runs of `make test`."""
    bank, graph = "--score.source=bank", ("--train.cuda_graph=true", "--train.precision=fp16", "--score.source=bank")
    on, rows = ("--run.resume=auto", "--train.max_steps=6"), folder / "rows.npy"
    return {
        "bank on the device": pretrain(folder, TRAINED, bank, "--score.store=device"),
        "resumed": pretrain(folder, TRAINED, bank, "--score.store=device", *on),
        "graph": pretrain(folder, "graph", *graph),
        "graph, resumed": pretrain(folder, "graph", *graph, *on),
        "averages, clipping, micro-batches": pretrain(
            folder, "averages", "--optim.ema_decay=0.9", "--optim.clip_grad=1", "--train.accumulate=2"
        ),
        "embed": ["embed", *(str(folder / name) for name in (TRAINED, "images")), f"--out={rows}", "--device=cuda"],
    }


def more_runs(folder: Path) -> dict[str, list[str]]:
    """Return the other runs, and what is done with one."""
    bank = "--score.source=bank"
    on = ("--run.resume=auto", "--train.max_steps=6")
    kernels = ("--train.kernels=triton", "--target.kind=hog")
    return {
        "bank on the device": pretrain(folder, TRAINED, bank, "--score.store=device"),
        "bank on the host": pretrain(folder, "host", bank, "--score.store=host"),
        "bank on the host, resumed": pretrain(folder, "host", bank, "--score.store=host", *on),
        "bank in a file": pretrain(folder, "file", bank, "--score.store=file"),
        "bank in a file, resumed": pretrain(folder, "file", bank, "--score.store=file", *on),
        "fp16": pretrain(folder, "fp16", "--train.precision=fp16"),
        "find_batch": pretrain(folder, "find_batch", "--train.find_batch=true"),
        "recompute, our kernels": pretrain(folder, "recompute", bank, "--train.recompute=true", *kernels),
        "profile": pretrain(folder, "profile", "--train.profile=1"),
        "export timm": ["export", "timm", f"{folder / TRAINED}", f"{folder / 'timm'}"],
        "export safetensors": ["export", "safetensors", f"{folder / TRAINED}", f"{folder / 'own'}"],
        "masks": ["eval", "masks", f"{folder / TRAINED}", "--train.device=cuda", "--measure=8"],
    }


def evaluation(folder: Path, kind: str) -> list[str]:
    """Return an evaluation of the run: one step where it trains."""
    # Logistic regression wants five images of a class.
    count = 48 if kind in ("logreg", "views") else 16
    images = ("--data.source=shapes", f"--data.root={folder / 'shapes'}")
    images += (f"--data.samples={count}", "--data.test_samples=8")
    trains = kind not in ("knn", "logreg", "views")
    steps = ("--train.max_steps=1", "--train.batch_size=4") if trains else ()
    dense = ("--data.image_size=[64,64]",) if kind in ("detection", "segmentation") else ()
    dense += ("--optim.warmup_steps=1",) if kind == "detection" else ()
    windows = ("--segment.stride=64",) if kind == "segmentation" else ()
    few = ("--knn.k=[10]",) if kind in ("knn", "views") else ()
    return ["eval", kind, f"{folder / TRAINED}", "--train.device=cuda", *images, *steps, *dense, *windows, *few]


def predict(folder: Path) -> list[str]:
    """Return what is done with the fine-tuned run."""
    run, images = folder / TRAINED / "eval" / "finetune", folder / "images"
    return ["predict", f"{run}", f"{images}", f"--out={folder / 'classes.csv'}", "--device=cuda"]


# As small as benchmarks of steps go.
_SMALL = ("--device=cuda", "--arch=vit_tiny_patch16_224", "--batch=8", "--rounds=1")
LADDER = (*_SMALL, "--steps=1", "--model.depth=2", "--decoder.depth=1")
BENCHMARKS = {
    "throughput": (*_SMALL, "--seconds=0.001", "--only", "ccmim-first", "--train.compile=off"),
    "bank": (*_SMALL, "--train.compile=off"),
    "attention": ("--device=cuda", "--batch=4", "--shapes=1", "--rounds=1"),
}
