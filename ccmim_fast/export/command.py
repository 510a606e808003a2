"""`ccmim export`: a run's weights in the form that another library loads."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.checkpoints import OpenedRun, open_run
from ccmim_fast.config.keys import nearest
from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.export import graphs, hugging_face, plain
from ccmim_fast.export.card import read_result, write_card


class Target(NamedTuple):
    """One form.

    Attributes:
        write: writes into the folder it is given, or the file of this `suffix`; returns what it wrote.
        suffix: of a file that may stand alone; "": always a folder.
        said: for the help.
    """

    write: Callable[[OpenedRun, Path], list[Path]]
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

    RUN is a run's folder, or one of its checkpoints. OUT is a new folder, in which a model card stands beside the
    weights, or a file of the target's suffix. Averaged weights are taken where the run has them.
    """
    given = _read(argv)
    evaluation = [row for path in given.result for row in read_result(path)]
    run = open_run(given.run)
    out = Path(given.out)
    try:
        for path in _write(TARGETS[given.target], run, out):
            print(path)
        if out.is_dir():
            print(write_card(given.target, run, out, given.push, evaluation))
    except OSError as error:
        raise MachineError(f"{error.filename or given.out}: not written: {error.strerror or error}") from None
    if given.push:
        _push(out, given)


def _write(target: Target, run: OpenedRun, out: Path) -> list[Path]:
    if target.suffix and out.suffix == target.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        return target.write(run, out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(f"ccmim export: {str(out)!r:.200} is not empty; name a new folder")
    return target.write(run, out)


def _push(folder: Path, given: argparse.Namespace) -> None:
    from ccmim_fast.export import hub

    if not given.dry_run:
        print(hub.push(folder, given.push, given.private))
        return
    print(f"would go to {given.push}, {'private' if given.private else 'for everyone'}:")
    for name, size in hub.to_upload(folder):
        print(f"{size:>14,} bytes  {name}")


def _read(argv: list[str]) -> argparse.Namespace:
    given = _parser().parse_args(argv)
    if given.target not in TARGETS:
        raise ConfigError(
            f"ccmim export: {given.target!r:.80}: no such target; one of {', '.join(TARGETS)}; "
            f"nearest: {nearest(given.target, TARGETS)}"
        )
    suffix, others = TARGETS[given.target].suffix, {target.suffix for target in TARGETS.values()} - {""}
    if Path(given.out).suffix in others - {suffix}:
        forms = f"FILE{suffix} or a folder" if suffix else "a folder"
        raise ConfigError(f"ccmim export {given.target}: OUT={given.out!r:.200} must be {forms}")
    if given.push:
        from ccmim_fast.export.hub import check_name

        check_name(given.push)
        if suffix and Path(given.out).suffix == suffix:
            raise ConfigError(f"ccmim export: --push needs a folder with its card, got {given.out!r:.200}")
    elif given.dry_run or given.private:
        raise ConfigError("ccmim export: --dry-run and --private are for --push OWNER/NAME")
    return given


def _parser() -> argparse.ArgumentParser:
    targets = "".join(
        f"\n  {name:13}{target.said}{f'; or FILE{target.suffix}' if target.suffix else ''}"
        for name, target in TARGETS.items()
    )
    parser = Parser(
        "ccmim export",
        description=export.__doc__.replace("`", ""),
        epilog=f"targets:{targets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument(
        "--result", metavar="FILE", action="append", default=[], help="result.json of an evaluation, for the card"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", default="", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="as a private model, if it is new")
    parser.add_argument("--dry-run", action="store_true", help="write all, say what would be uploaded, upload nothing")
    return parser
