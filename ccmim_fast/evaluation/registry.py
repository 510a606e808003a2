"""Each evaluation has one entry here, and nothing else in the tree lists them."""

import importlib.util
from typing import NamedTuple

from ccmim_fast.errors import MachineError

PACKAGE = "ccmim_fast.evaluation"

_IMAGES = ("images", "shapes", "inaturalist", "flowers")
_SHOWN = ("data.image_size", "data.test_crop", "model.pool", "model.fc_norm", "model.resample")
_LENGTH = ("train.epochs", "train.steps", "train.batch_size", "train.max_steps")
_TRAINED = (*_SHOWN, "data.crop_scale", "data.crop_rule", "data.flip", "optim.", *_LENGTH)
_FINETUNED = (*_TRAINED, "head.init_std", "augment.", "model.drop_path")
_DENSE = ("data.image_size", "data.flip", "optim.", *_LENGTH, "model.drop_path", "model.resample")


class Evaluation(NamedTuple):
    """One of the evaluations; its preset of the same name is in `configs/eval/`.

    Functions are named as `module:function`, module below `evaluation`. `prepare`: Job -> Work; every rank calls both.
    What can be refused is refused by `prepare`, which writes nothing. `open_images`: (settings, what loaders of the
    images to train on and of those to test on are built from) -> the two sources.
    """

    help: str  # one line
    prepare: str
    figures: tuple[str, ...]  # settings, or beginnings of settings, that are the protocol's; others say how and where
    sources: tuple[str, ...] = _IMAGES  # values of `data.source` that `open_images` reads
    open_images: str = "images:open_both"
    guessed: bool = True  # a guess among the classes is right once in as many, so that chance is known
    trains: bool = True  # for hours, perhaps: images to test on are read once before
    needs: tuple[str, ...] = ()  # packages of the extra of the evaluation's name
    optimizers: tuple[str, ...] = ("lars", "sgd", "adamw")  # values of `optim.name` that it has


EVALUATIONS = {
    "knn": Evaluation("nearest neighbours in frozen features", "frozen.knn:knn", (*_SHOWN, "knn."), trains=False),
    "logreg": Evaluation(
        "logistic regression on frozen features", "frozen.logreg:logreg", (*_SHOWN, "logreg."), trains=False
    ),
    "views": Evaluation(
        "both of [CLS], average and both, of whole images and of few patches",
        "frozen.views:views",
        ("data.image_size", "data.test_crop", "model.resample", "model.mask_ratio", "knn.", "logreg."),
        trains=False,
    ),
    "linear": Evaluation(
        "a linear classifier of frozen features",
        "probes:linear",
        (*_TRAINED, "head.rates", "head.init_std", "augment."),
    ),
    "attentive": Evaluation(
        "an attentive classifier of frozen features",
        "probes:attentive",
        (*_TRAINED, "head.num_heads", "head.init_std", "augment."),
    ),
    "finetune": Evaluation(
        "training all weights to classify, as on ImageNet", "finetune:prepare", _FINETUNED, optimizers=("adamw",)
    ),
    "transfer": Evaluation(
        "training all weights to classify iNaturalist or Flowers-102",
        "finetune:prepare",
        _FINETUNED,
        optimizers=("adamw",),
    ),
    "detection": Evaluation(
        "object detection and instance segmentation: Mask R-CNN on COCO",
        "detection.run:prepare",
        (*_DENSE, "detect."),
        sources=("coco", "shapes"),
        open_images="detection.run:open_images",
        guessed=False,
        needs=("torchmetrics", "faster-coco-eval"),
        optimizers=("adamw",),
    ),
    "segmentation": Evaluation(
        "semantic segmentation: UPerNet on ADE20K",
        "segmentation.run:prepare",
        (*_DENSE, "segment.", "head.init_std"),
        sources=("ade20k", "shapes"),
        open_images="segmentation.run:open_images",
        guessed=False,
        needs=("segmentation_models_pytorch",),
        optimizers=("adamw",),
    ),
}


def check_installed(command: str, packages: tuple[str, ...], extra: str) -> None:
    """Raise MachineError with the command that installs, by our `extra`, the packages that a command lacks."""
    missing = [one for one in packages if importlib.util.find_spec(one.replace("-", "_")) is None]
    if missing:
        raise MachineError(f"ccmim {command}: needs {', '.join(missing)}: pip install 'ccmim_fast[{extra}]'")
