"""From the configuration to the model; past this file nothing of `models` knows the configuration."""

from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.blocks import BlockRunner
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.decoder import Decoder
from ccmim_fast.models.embedding import patch_size_of
from ccmim_fast.models.encoder import build_encoder, grid_of


def build_model(config: Config) -> CCMIM:
    """The model of a run, with initial weights drawn from torch's global generator.

    Raises:
        ConfigError: sizes that do not fit each other; the message names the nearest valid one.
    """
    encoder = build_encoder(
        config.model.arch,
        image_size=tuple(config.data.image_size),
        channels=config.data.channels,
        patch_size=config.model.patch_size,
        embed_dim=config.model.embed_dim,
        depth=config.model.depth,
        num_heads=config.model.num_heads,
        drop_path=config.model.drop_path,
    )
    patch = patch_size_of(encoder)
    _check_ratio(config.mask.ratio, encoder.patch_embed.num_patches)
    run = BlockRunner(config.train.attention, config.train.recompute)
    decoder = Decoder(
        encoder_dim=encoder.embed_dim,
        dim=config.decoder.dim,
        depth=config.decoder.depth,
        num_heads=config.decoder.num_heads,
        grid=grid_of(encoder),
        outputs=target_width(config, patch),
        masked_only=config.fast.masked_only,
        row_ops=config.fast.row_ops,
        kernels=config.train.kernels,
        run=run,
    )
    return CCMIM(
        encoder,
        decoder,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        mask_ratio=config.mask.ratio,
        strategy=config.mask.strategy,
        noise=config.mask.noise,
        block_min=config.mask.block_min,
        temperature=config.score.temperature,
        source=config.score.source,
        block=config.score.block,
        normalise=config.score.normalise,
        read_blocks=config.score.blocks,
        unseen=config.score.unseen,
        contrast=config.contrast.loss,
        head_dim=config.heads.dim,
        sync_bn=config.heads.sync_bn,
        fold_input=config.fast.fold_input,
        visible_gradient=config.fast.visible_gradient,
        fold_score=config.fast.fold_score,
        masked_no_grad=config.fast.masked_no_grad,
        cls_only=config.fast.cls_only,
        row_ops=config.fast.row_ops,
        kernels=config.train.kernels,
        run=run,
    )


def target_width(config: Config, patch: int) -> int:
    """P: values the decoder predicts per patch."""
    if config.target.kind == "pixels":
        return patch * patch * config.data.channels
    cell = config.target.hog_cell
    if patch % cell:
        divisors = [size for size in range(1, patch + 1) if patch % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - cell))
        raise ConfigError(f"target.hog_cell={cell} must divide the patch size {patch}; nearest: {nearest}")
    return (patch // cell) ** 2 * config.data.channels * config.target.hog_bins


def _check_ratio(ratio: float, patches: int) -> None:
    keep = int(patches * (1 - ratio))
    if not 1 <= keep < patches:
        nearest = min(max(keep, 1), patches - 1)
        raise ConfigError(
            f"mask.ratio={ratio} leaves {keep} of {patches} patches visible; nearest valid: {1 - nearest / patches:.4g}"
        )
