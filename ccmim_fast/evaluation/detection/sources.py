"""Images with objects: those to train on, and those to test on."""

from ccmim_fast.config.evaluation import EvalConfig, images_of
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.evaluation.detection.coco import CocoSource
from ccmim_fast.evaluation.detection.shapes import ShapesInstances
from ccmim_fast.evaluation.images import Images


def open_both(config: EvalConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Images, Images]:
    """The training images and the test images.

    Raises:
        DataError: a file is missing or damaged, or the two have other classes.
        ConfigError: an encoder that takes no RGB.
    """
    data = config.data
    mean, std = data.mean or mean, data.std or std
    if len(mean) != 3 or len(std) != 3:
        raise ConfigError(f"data.mean={list(mean)}, data.std={list(std)}: detection has RGB, three values of each")
    if data.source == "shapes":
        made = data.image_size, data.classes, data.background, data.root or None
        train, test = (
            ShapesInstances(config.seed + number, samples, *made)
            for number, samples in enumerate((data.samples, data.test_samples))
        )
    else:
        train, test = CocoSource(data.root, "train2017", train=True), CocoSource(data.root, "val2017", train=False)
    if train.class_names != test.class_names:
        raise DataError(f"{data.root}: train2017 and val2017 are of other categories, or in another order of their ids")
    return tuple(Images(source, images_of(data, mean, std, test=source is test)) for source in (train, test))
