"""`ccmim export`: a run's weights in the form that another library loads."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from ccmim_fast.config.keys import nearest
from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.export import graphs, hugging_face, plain
from ccmim_fast.export.trained import Trained, read_trained


class Target(NamedTuple):
    """One form.

    Attributes:
        write: writes into the folder it is given, or the file of this `suffix`; returns what it wrote.
        suffix: of a file that may stand alone; "": always a folder.
        said: for the help.
    """

    write: Callable[[Trained, Path], list[Path]]
    suffix: str
    said: str


TARGETS = {
    "timm": Target(plain.export_timm, ".safetensors", "the encoder, for timm.create_model"),
    "hf-vit": Target(hugging_face.export_vit, "", "the encoder, for ViTModel of transformers"),
    "hf-vitmae": Target(hugging_face.export_vitmae, "", "encoder and decoder, for its ViTMAEForPreTraining"),
    "safetensors": Target(plain.export_safetensors, ".safetensors", "all weights, under our own names"),
    "onnx": Target(graphs.export_onnx, ".onnx", "the encoder as a graph, for ONNX runtime"),
    "torch-export": Target(graphs.export_program, ".pt2", "the encoder as a graph, for torch.export.load"),
}


def export(argv: list[str]) -> None:
    """`ccmim export TARGET RUN OUT`: the newest checkpoint of a run, as another library loads it.

    RUN is a run's folder, or one of its checkpoints. OUT is a new folder, or a file of the target's suffix. Averaged
    weights are taken where the run has them.
    """
    given = _read(argv)
    target, out = TARGETS[given.target], Path(given.out)
    alone = bool(target.suffix) and out.suffix == target.suffix
    trained = read_trained(given.run)
    try:
        (out.parent if alone else out).mkdir(parents=True, exist_ok=True)
        if not alone and any(out.iterdir()):
            raise ConfigError(f"ccmim export: {given.out!r:.200} is not empty; name a new folder")
        for path in target.write(trained, out):
            print(path)
    except OSError as error:
        raise MachineError(f"{error.filename or given.out}: not written: {error.strerror or error}") from None


def _read(argv: list[str]) -> argparse.Namespace:
    given = _parser().parse_args(argv)
    if given.target not in TARGETS:
        raise ConfigError(
            f"ccmim export: {given.target!r:.80}: no such target; one of {', '.join(TARGETS)}; "
            f"nearest: {nearest(given.target, TARGETS)}"
        )
    return given


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, as everywhere in `ccmim`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    targets = "".join(
        f"\n  {name:13}{target.said}{f'; or FILE{target.suffix}' if target.suffix else ''}"
        for name, target in TARGETS.items()
    )
    parser = _Parser(
        "ccmim export",
        description=export.__doc__.replace("`", ""),
        epilog=f"targets:{targets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("out", metavar="OUT")
    return parser
