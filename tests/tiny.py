"""The smallest model that still has every part: what most tests run. No score bank and no look, unless a test asks."""

import dataclasses

import torch

from ccmim_fast.build.model import build_model, build_objective
from ccmim_fast.config.schema import (
    Config,
    DataConfig,
    DecoderConfig,
    HeadsConfig,
    ModelConfig,
    OptimConfig,
    ScoreConfig,
    TrainConfig,
)
from ccmim_fast.losses.criteria import Losses
from ccmim_fast.models.ccmim import CCMIM, Output

TINY = Config(
    data=DataConfig(image_size=(32, 48)),
    model=ModelConfig(arch="vit_tiny_patch16_224", patch_size=8, embed_dim=48, depth=3, num_heads=3),
    score=ScoreConfig(source="all"),
    decoder=DecoderConfig(depth=2, dim=32, num_heads=4),
    heads=HeadsConfig(dim=16),
    optim=OptimConfig(warmup_epochs=0.0),  # runs of few epochs
    train=TrainConfig(feature_images=0),  # records of training steps alone
)


def tiny_config(**sections) -> Config:
    """`TINY` with some fields of some sections replaced: `tiny_config(mask={"ratio": 0.5})`."""
    replaced = {
        name: dataclasses.replace(getattr(TINY, name), **fields) if isinstance(fields, dict) else fields
        for name, fields in sections.items()
    }
    return dataclasses.replace(TINY, **replaced)


def tiny_model(dtype: torch.dtype = torch.float64, **sections) -> tuple[CCMIM, Config]:
    """A model with random biases and norms (initial ones are zero and one, and would hide mistakes)."""
    config = tiny_config(**sections)
    model = build_model(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model, config


def total_loss(model: CCMIM, output: Output, images_BHWC: torch.Tensor, config: Config) -> Losses:
    """The losses of a run with this configuration, in the model's dtype."""
    return build_objective(config, model).to(model.mean_C.dtype)(output, images_BHWC)


def images(count: int = 4, size: tuple[int, int] = (32, 48), channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, *size, channels), dtype=torch.uint8)
