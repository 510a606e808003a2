"""A run's weights are written for other libraries in these forms."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.errors import ConfigError, MachineError
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
    library: str  # name on the hub of the library that loads it; the card has the code that does
    classifier: str = ""  # as `place`, of an `OpenedClassifier`; "": there is no such form of a classifier


TARGETS = {
    "timm": Target(
        "plain:export_timm",
        ".safetensors",
        "the encoder or classifier, for timm.create_model",
        "timm",
        "classifier:export_timm",
    ),
    "hf-vit": Target(
        "hugging_face:export_vit",
        "",
        "the encoder or classifier, for ViTModel or ViTForImageClassification of transformers",
        "transformers",
        "classifier:export_vit",
    ),
    "hf-vitmae": Target(
        "hugging_face:export_vitmae", "", "encoder and decoder, for ViTMAEForPreTraining", "transformers"
    ),
    "safetensors": Target(
        "plain:export_safetensors",
        ".safetensors",
        "all weights, under our own names",
        "safetensors",
        "classifier:export_safetensors",
    ),
    "onnx": Target(
        "graphs:export_onnx",
        ".onnx",
        "the encoder or classifier as a graph, for ONNX runtime",
        "onnx",
        "classifier:export_onnx",
    ),
    "torch-export": Target(
        "graphs:export_program",
        ".pt2",
        "the encoder or classifier as a graph, for torch.export.load",
        "pytorch",
        "classifier:export_program",
    ),
}


def export_run(target: str, run: str, out: Path, results: Sequence[str] = (), hub_name: str = "") -> list[Path]:
    """Write a run's newest checkpoint, averaged weights where it has them, for another library; return the files.

    `target` is one of `TARGETS`, `out` a new folder, in which a model card stands beside the weights, or a file of the
    target's suffix. The card shows `results`, result.json of evaluations, and loads from `hub_name`, OWNER/NAME on the
    Hugging Face hub; "": from `out`.

    Raises ConfigError: `out` is not empty, a result is none, the target cannot express the model; CheckpointError:
    `run`, the folder of a run or of one of its checkpoints, of pretraining or of an evaluation that trains a
    classifier, does not load; MachineError: `out` cannot be written.
    """
    from ccmim_fast.checkpoints.run import newest_of, pretraining_in
    from ccmim_fast.evaluation.classifier import classifier_in, is_evaluation
    from ccmim_fast.export.card import read_result, write_card, write_classifier_card

    evaluation = [row for path in results for row in read_result(path)]
    found, chosen, card = newest_of(run), TARGETS[target], write_card
    if is_evaluation(found.state):
        if not chosen.classifier:
            others = ", ".join(name for name, other in TARGETS.items() if other.classifier)
            raise ConfigError(f"ccmim export {target}: {run!r:.200} is a classifier, without a decoder; take {others}")
        opened, place, card = classifier_in(found), chosen.classifier, write_classifier_card
    else:
        opened, place = pretraining_in(found), chosen.place
    export = load(f"ccmim_fast.export.{place}")
    try:
        if bool(chosen.suffix) and out.suffix == chosen.suffix:
            with new_file(out, "ccmim export") as partial:
                written = export(opened, partial)
            return [out.with_name(path.name) for path in written]
        with new_folder(out, "ccmim export") as partial:
            written = [*export(opened, partial), card(target, opened, partial, hub_name, evaluation)]
        return [out / path.name for path in written]
    except OSError as error:
        raise MachineError(f"{error.filename or out}: not written: {error.strerror or error}") from None
