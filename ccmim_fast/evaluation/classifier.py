"""A classifier that an evaluation has trained becomes one module of timm's: from its run, or from an export of it."""

# B batch, H height, W width, C channels, K classes

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_fast.checkpoints.claims import check_claims
from ccmim_fast.checkpoints.published import Weights, known_arch
from ccmim_fast.checkpoints.run import Found, newest_of, weights_in
from ccmim_fast.checkpoints.weight_files import WEIGHTS, read_safetensors
from ccmim_fast.config.evaluation import EvalConfig, validate_evaluation
from ccmim_fast.config.load import from_yaml
from ccmim_fast.errors import CheckpointError, ConfigError, one_line
from ccmim_fast.evaluation.encoders import Tokens, build_encoder, read_encoder, undistilled
from ccmim_fast.evaluation.probes import LinearHeads, head_names
from ccmim_fast.evaluation.supervised import fingerprint
from ccmim_fast.runs.state import METRICS

_TIMMS = {"avg": "avg", "cls": "token"}  # `model.pool` -> timm's `global_pool`
# Of the parts of a head: timm's names and ours, distilled DeiT's second one, and transformers'.
_HEADS = {"head": "head", "head_dist": "head_dist", "classifier": "head"}
_PLAIN = (str, int, float, bool, tuple, type(None))


@dataclass(frozen=True)
class OpenedClassifier:
    """This record is what a command needs of a trained classifier."""

    path: Path  # folder of the checkpoint, or what was exported
    folder: Path  # folder of the run
    vit: VisionTransformer | Eva  # normalised images [B, C, H, W] -> logits [B, K]; evaluating, float32, on the CPU
    encoder: Weights  # what the run knew of the encoder that it began with; no tensors
    classes: tuple[str, ...]  # names of the K classes
    config: EvalConfig
    kind: Literal["fine-tuned", "linear probe"]
    accuracy: float | None = None  # share of the test images that these very weights named right, where it is known
    averaged: bool = False  # the weights are their moving average (`optim.ema`)
    step: int = 0  # optimizer steps of the evaluation

    def __post_init__(self):
        if self.vit.num_classes != len(self.classes):
            raise CheckpointError(f"{self.path}: {self.vit.num_classes} logits for {len(self.classes)} classes")

    @property
    def rounds_to_uint8(self) -> bool:
        """Tell whether the images are shown as uint8, as fine-tuning does for timm's augmentation."""
        return self.kind == "fine-tuned"


class Logits(Tokens):
    """This module turns images [B, C, H, W] in 0..1 into logits [B, K]; it normalises the images."""

    def forward(self, images: Tensor) -> Tensor:
        return self.vit((images - self.mean_C11) / self.std_C11)


def is_evaluation(state: dict[str, Any]) -> bool:
    """Tell whether a checkpoint is of an evaluation that trains."""
    return "encoder" in state and "progress" in state


def classifier_in(found: Found) -> OpenedClassifier:
    """Return the classifier that a checkpoint of fine-tuning or of a linear probe holds; averaged weights if it does.

    Of the heads of a linear probe the most accurate one of the last test in metrics.jsonl is taken.

    Raises CheckpointError: another evaluation's, one of an older version, damaged, or without the encoder that a linear
    probe reads; ConfigError: several heads, and no test that tells the best.
    """
    state, place = found.state, str(found.path)
    if "classifier" not in state:
        raise CheckpointError(
            f"{place}: no classifier that can be taken out: it is of an evaluation that trains none, or of a version "
            "that did not write down its classes; name the folder of ccmim eval finetune, transfer or linear"
        )
    try:
        tensors, averaged = weights_in(state, "averaged")
        told, classes = state["classifier"]["encoder"], tuple(map(str, state["classifier"]["classes"]))
        encoder = _told(told)
        config = from_yaml(state["config"], place, EvalConfig, validate_evaluation)
        step = int(state["progress"]["step"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{place}: not a checkpoint of an evaluation") from None
    figures, averages = _figures(found.folder, step), ", averaged weights" if averaged else ""
    if "head.weight" in tensors:
        encoder = undistilled(encoder) if config.model.pool == "avg" else encoder
        vit, kind, named = _fine_tuned(tensors, encoder, config, place), "fine-tuned", "accuracy"
    elif "linears.0.weight" in tensors:
        best, named = _best_head(config.head.rates, figures, averages, place)
        vit, encoder = _probe(tensors, best, encoder, config, state["encoder"], place)
        kind = "linear probe"
    else:
        raise CheckpointError(
            f"{place}: an attentive probe is no module of timm's; fine-tune, or train ccmim eval linear"
        )
    accuracy = figures.get(f"{named}{averages}")
    return OpenedClassifier(found.path, found.folder, vit, encoder, classes, config, kind, accuracy, averaged, step)


def _told(told: dict[str, Any]) -> Weights:
    known = {key: value for key, value in told.items() if key in Weights._fields and isinstance(value, _PLAIN)}
    encoder = Weights(**known | {"tensors": {}})
    return encoder._replace(arch=known_arch(encoder.arch))


def _fine_tuned(
    tensors: dict[str, Tensor], encoder: Weights, config: EvalConfig, place: str
) -> VisionTransformer | Eva:
    """Build the module that was trained: its positions are those of the settings' images."""
    check_claims({f"encoder.{name}": value for name, value in tensors.items()}, place)
    heads = heads_in(tensors)
    own = {name: value for name, value in tensors.items() if name not in heads}
    encoder = encoder._replace(name=place, tensors=own, image_size=config.data.image_size)
    return with_head(encoder, config.data.image_size, config.model.num_heads, _TIMMS[config.model.pool], heads)


def heads_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the heads among those of a classifier, under timm's names."""
    parts = ((name.partition("."), value) for name, value in tensors.items())
    return {f"{_HEADS[first]}.{kind}": value for (first, _, kind), value in parts if first in _HEADS}


def _best_head(rates: tuple[float, ...], figures: dict[str, float], averages: str, place: str) -> tuple[int, str]:
    """Return which head of a linear probe named most test images right, and the name of its figure."""
    names = head_names(rates)
    if len(names) > 1 and not figures.keys() >= {f"{name}{averages}" for name in names}:
        raise ConfigError(
            f"{place}: {len(names)} heads, and no test of them in metrics.jsonl that tells the best; "
            "let the evaluation end with --resume auto"
        )
    best = max(range(len(names)), key=lambda head: figures.get(f"{names[head]}{averages}", 0.0))
    return best, names[best]


def _probe(
    tensors: dict[str, Tensor], head: int, encoder: Weights, config: EvalConfig, expected: str, place: str
) -> tuple[VisionTransformer | Eva, Weights]:
    """Build the frozen encoder with one of the heads, BatchNorm folded into it; return what is known of it, too."""
    try:
        found = read_encoder(encoder.name, encoder.arch, encoder.num_heads, config.model.pretrained_size)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: a linear probe needs the encoder that it was trained on: {error}") from None
    if fingerprint(found) != expected:
        raise CheckpointError(f"{place}: {encoder.name} is not the encoder that this linear probe was trained on")
    if not found.tensors:
        raise CheckpointError(f"{place}: trained on initial weights of {found.arch}, which no file holds; fine-tune")
    classes, width = tensors["linears.0.weight"].shape
    heads = LinearHeads(width, classes, len(config.head.rates), init_std=0.01)
    try:
        heads.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{place}: the weights do not fit the settings: {one_line(error)}") from None
    found, model = undistilled(found._replace(mean=encoder.mean, std=encoder.std)), config.model
    options = {"resample": model.resample, "pool": "avg" if model.pool == "avg" and model.fc_norm else ""}
    folded = {f"head.{kind}": value for kind, value in heads.folded(head).items()}
    vit = with_head(found, config.data.image_size, model.num_heads, _TIMMS[model.pool], folded, **options)
    return vit, encoder._replace(arch=found.arch)


def with_head(
    encoder: Weights,
    image_size: tuple[int, int],
    num_heads: int,
    global_pool: str,
    heads: dict[str, Tensor],
    **options: Any,
) -> VisionTransformer | Eva:
    """Build timm's module of an encoder and linear heads behind `global_pool`; `options` are of `build_encoder`.

    `heads` are `head.weight` [K, D] and `head.bias` [K]; of a distilled DeiT those of `head_dist`, too. Raises
    CheckpointError: names or shapes that do not fit; ConfigError: see `build_encoder`.
    """
    vit = build_encoder(encoder, image_size, num_heads, plain=True, **options)
    parts = ("head", "head_dist") if isinstance(vit, VisionTransformerDistilled) else ("head",)
    names = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    if heads.keys() != names or heads["head.weight"].ndim != 2:
        said = f"; expected {', '.join(sorted(names))}, found {', '.join(sorted(heads)) or 'none'}"
        raise CheckpointError(f"{encoder.name}: its head is no linear layer with a bias{said}")
    try:
        vit.reset_classifier(len(heads["head.weight"]), global_pool)
        vit.load_state_dict(vit.state_dict() | heads)
    except (RuntimeError, AssertionError) as error:  # the latter of a pooling that the encoder has not
        raise CheckpointError(f"{encoder.name}: its head does not fit: {one_line(error)}") from None
    return vit.float().eval().requires_grad_(False)


def _figures(folder: Path, step: int) -> dict[str, float]:
    """Return the shares of the last test after a step, as metrics.jsonl has them; none without such a record."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in (folder / METRICS).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and (record.get("kind"), record.get("step")) == ("test", step):
                    found = {name: value for name, value in record.items() if isinstance(value, float)}
    return found


def open_classifier(place: str) -> OpenedClassifier:
    """Open the classifier of an evaluation's run, of one of its checkpoints, or of what `ccmim export` made of it.

    Raises CheckpointError: no classifier, or see `classifier_in`; ConfigError: see there.
    """
    path = Path(place)
    if path.is_file() or (path / WEIGHTS).is_file():
        return _exported(path)
    found = newest_of(path)
    if not is_evaluation(found.state):
        raise CheckpointError(
            f"{place}: a run of pretraining, which knows no classes; name the folder of ccmim eval finetune, transfer "
            "or linear, which is eval/NAME in it"
        )
    return classifier_in(found)


def _exported(path: Path) -> OpenedClassifier:
    """Open a file or folder of ours with weights of a classifier."""
    file = str(path / WEIGHTS if path.is_dir() else path)
    tensors, about = read_safetensors(file)
    if "classes" not in about:
        raise CheckpointError(f"{path}: tells no classes; expected a classifier as ccmim export writes it")
    try:
        classes = tuple(map(str, json.loads(about["classes"])))
        pool = json.loads(about["timm_arguments"])["global_pool"]
        accuracy = json.loads(about["accuracy"])
        config = from_yaml(about["settings"], file, EvalConfig, validate_evaluation)
        kind, averaged, step = about["classifier"], about["averaged_weights"] == "true", int(about["step"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: what it tells of itself is damaged; expected what ccmim export writes"
        ) from None
    encoder = read_encoder(file)
    vit = with_head(encoder, config.data.image_size, 0, pool, heads_in(tensors))
    return OpenedClassifier(
        path, path, vit, encoder._replace(tensors={}), classes, config, kind, accuracy, averaged, step
    )
