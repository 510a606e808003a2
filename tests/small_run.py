"""Settings of a run of seconds on a CPU, three steps an epoch, for tests that launch processes."""

SETTINGS = [
    "--data.source=shapes",
    "--data.samples=48",
    "--data.image_size=[32,32]",
    "--data.loader=torch",
    "--model.arch=vit_tiny_patch16_224",
    "--model.patch_size=8",
    "--model.embed_dim=48",
    "--model.depth=2",
    "--model.num_heads=3",
    "--decoder.dim=32",
    "--decoder.depth=1",
    "--decoder.num_heads=4",
    "--train.batch_size=16",
    "--train.epochs=2",
    "--train.precision=fp32",
    "--train.device=cpu",
    "--optim.warmup_epochs=0",
    "--optim.base_lr=0.01",
    "--run.log_every=1",
    "--run.tensorboard=false",
]


def run_settings(folder):
    """Settings of the run `run` in `folder`, with its images in `shapes`."""
    return [*SETTINGS, f"--run.dir={folder / 'run'}", f"--data.root={folder / 'shapes'}"]
