"""Object detection and instance segmentation: a pyramid over the encoder, and torchvision's Mask R-CNN over that.

What this command alone needs is imported when it is carried out.
"""

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job


def open_images(config: EvalConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Images, Images]:
    """Those to train on and those to test on; their sources are `InstanceSource`s.

    Raises:
        MachineError: a library of the extra `detection` is not installed.
        DataError, ConfigError: see `sources.open_both`.
    """
    from ccmim_fast.evaluation.detection.precision import check_installed
    from ccmim_fast.evaluation.detection.sources import open_both

    check_installed()
    return open_both(config, mean, std)


def run(job: Job) -> dict[str, float]:
    """Train all weights; average precisions of boxes and masks at the end."""
    from ccmim_fast.evaluation.detection.training import train

    return train(job)
