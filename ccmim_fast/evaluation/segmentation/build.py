"""From the settings to the model: the encoder with a new decoder, on the device."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import build_encoder
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.segmentation.model import Segmenter


def build_segmenter(job: Job) -> nn.Module:
    """A `Segmenter`, its BatchNorms synchronised where ranks train on GPUs.

    Raises:
        ConfigError: an architecture, a size or a batch that it cannot be built or trained with.
    """
    config, segment = job.config, job.config.segment
    vit = build_encoder(job.weights, config.data.image_size, config.model.num_heads, drop_path=config.model.drop_path)
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.arch={job.weights.arch}: is a {type(vit).__name__}, and must be a VisionTransformer")
    _check_size(config.data.image_size, vit.patch_embed.patch_size)
    # torch's SyncBatchNorm runs on GPUs only; elsewhere each rank has statistics of its own.
    synced = job.here.world_size > 1 and job.here.device.type == "cuda"
    if not synced:
        _check_batch(config.train.batch_size, config.train.accumulate * job.here.world_size)
    model = Segmenter(
        vit,
        job.weights.mean,
        job.weights.std,
        job.test.classes,
        decoder_dim=segment.decoder_dim or vit.embed_dim,
        auxiliary_dim=segment.auxiliary_dim,
        dropout=segment.dropout,
        init_std=config.head.init_std,
    )
    return (nn.SyncBatchNorm.convert_sync_batchnorm(model) if synced else model).to(job.here.device)


def _check_size(size: tuple[int, int], patch: tuple[int, int]) -> None:
    near = [max(2, round(side / of_patch)) * of_patch for side, of_patch in zip(size, patch)]
    if list(size) != near:
        raise ConfigError(
            f"data.image_size={list(size)}: must be whole patches of {patch[0]} pixels, two at least a side; "
            f"nearest valid is {near}"
        )


def _check_batch(batch_size: int, parts: int) -> None:
    if batch_size // parts < 2:
        raise ConfigError(
            f"train.batch_size={batch_size}: BatchNorm needs two images in each of {parts} micro-batches; "
            f"nearest valid is {2 * parts}"
        )
