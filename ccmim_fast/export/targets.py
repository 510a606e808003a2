"""A run's weights are written for other libraries in these forms."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.errors import MachineError
from ccmim_fast.registry import load
from ccmim_fast.runs.output import new_file, new_folder


class Target(NamedTuple):
    """A target is one form.

    `place` is `module:function` below this package: (`OpenedRun`, the folder or the file of this `suffix` to write) ->
    the paths that it wrote. It is imported when called, for torch takes seconds.
    """

    place: str
    suffix: str  # of a file that may stand alone; "": always a folder
    help: str  # one line
    library: str  # name on the hub of the library that loads it; card.md has the code that does


TARGETS = {
    "timm": Target("plain:export_timm", ".safetensors", "the encoder, for timm.create_model", "timm"),
    "hf-vit": Target("hugging_face:export_vit", "", "the encoder, for ViTModel of transformers", "transformers"),
    "hf-vitmae": Target(
        "hugging_face:export_vitmae", "", "encoder and decoder, for ViTMAEForPreTraining", "transformers"
    ),
    "safetensors": Target(
        "plain:export_safetensors", ".safetensors", "all weights, under our own names", "safetensors"
    ),
    "onnx": Target("graphs:export_onnx", ".onnx", "the encoder as a graph, for ONNX runtime", "onnx"),
    "torch-export": Target("graphs:export_program", ".pt2", "the encoder as a graph, for torch.export.load", "pytorch"),
}


def export_run(target: str, run: str, out: Path, results: Sequence[str] = (), hub_name: str = "") -> list[Path]:
    """Write a run's newest checkpoint, averaged weights where it has them, for another library; return the files.

    `target` is one of `TARGETS`, `out` a new folder, in which a model card stands beside the weights, or a file of the
    target's suffix. The card shows `results`, result.json of evaluations, and loads from `hub_name`, OWNER/NAME on the
    Hugging Face hub; "": from `out`.

    Raises ConfigError: `out` is not empty, a result is none; CheckpointError: `run`, a run's folder or one of its
    checkpoints, does not load; MachineError: `out` cannot be written.
    """
    from ccmim_fast.checkpoints.run import open_run
    from ccmim_fast.export.card import read_result, write_card

    evaluation = [row for path in results for row in read_result(path)]
    opened = open_run(run)
    export = load(f"ccmim_fast.export.{TARGETS[target].place}")
    try:
        if bool(TARGETS[target].suffix) and out.suffix == TARGETS[target].suffix:
            with new_file(out, "ccmim export") as partial:
                written = export(opened, partial)
            return [out.with_name(path.name) for path in written]
        with new_folder(out, "ccmim export") as partial:
            written = [*export(opened, partial), write_card(target, opened, partial, hub_name, evaluation)]
        return [out / path.name for path in written]
    except OSError as error:
        raise MachineError(f"{error.filename or out}: not written: {error.strerror or error}") from None
