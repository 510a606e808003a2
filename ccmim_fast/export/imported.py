"""`ccmim import`: published weights as a checkpoint of ours, to evaluate, to export, to pretrain on."""

import argparse
import dataclasses
from pathlib import Path

import torch

from ccmim_fast.build.model import build_model
from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.published import TIMM, derived, fill_, read_published
from ccmim_fast.checkpoints.state import Progress, capture
from ccmim_fast.config.load import load_config
from ccmim_fast.config.parser import Parser
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError
from ccmim_fast.export.plain import write_weights
from ccmim_fast.export.trained import Trained
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_fast.runs.folder import describe_run, open_run_folder


def import_weights(argv: list[str]) -> None:
    """`ccmim import FILE --arch NAME --out OUT [settings]`: published weights as a checkpoint of ours.

    FILE: MAE's or the authors' ccMIM .pth; timm's .pth or .safetensors of an encoder; our own .safetensors; or
    timm:ARCH.TAG, which timm downloads. OUT: a new run folder, for ccmim export, embed, and pretrain --run.resume
    OUT/checkpoints/step_00000000; or a .safetensors in our names. Sizes are read off the weights; the other settings
    are those of ccmim pretrain. What is missing in FILE or unexpected is an error, but for a whole decoder or head,
    which starts anew.
    """
    given, settings = _read(argv)
    found = read_published(given.file)
    if given.arch and not given.file.startswith(TIMM):
        found = found._replace(arch=given.arch)
    if not found.arch:
        raise ConfigError(f"ccmim import: {given.file!r:.200} does not tell its architecture; add --arch NAME")
    config = load_config([*derived(found, settings), *settings], "ccmim import FILE --arch NAME --out OUT")
    torch.manual_seed(config.seed)
    model = build_model(config)
    new = fill_(model, found.tensors, given.file)
    path = _write(model, config, given.out)
    print(f"{path}; not in the file, starts anew: {', '.join(new)}" if new else path)


def _write(model: CCMIM, config: Config, out: str) -> Path:
    if out.endswith(".safetensors"):
        about = Trained(model, config, step=0, samples=0, averaged=False, run=Path(out).parent).about()
        return write_weights(model.state_dict(), about, Path(out))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=out))
    folder = open_run_folder(config)
    describe_run(folder, config, torch.device("cpu"))
    # No moments yet; the rate and the decay are those of the run that goes on.
    of = config.optim
    optimizer = build_optimizer("adamw", model, lr=of.base_lr, weight_decay=of.weight_decay, betas=of.betas)
    state = capture(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, Progress(0, 0, 0, ""), config)
    return io.save(folder / "checkpoints", 0, state, keep=1)


def _read(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    usage = "ccmim import FILE --arch NAME --out OUT [settings]"
    said = import_weights.__doc__.replace("`", "")
    parser = Parser("ccmim import", usage=usage, description=said, allow_abbrev=False)
    parser.add_argument("--arch", metavar="NAME", default="", help="timm's name; not needed where FILE tells it")
    parser.add_argument("--out", metavar="OUT", required=True, help="a new run folder, or a .safetensors")
    file = argv[0] if argv and not argv[0].startswith("-") else None
    given, settings = parser.parse_known_args(argv if file is None else argv[1:])
    if file is None:
        raise ConfigError(f"ccmim import: the file is missing; {usage}")
    given.file = file
    return given, settings
