"""ccMIM: score, divide, encode both sets, reconstruct one from the other. Returns tensors, never a loss.

With `strategy="random"` and `contrast="none"` this is MAE.
"""

# B batch, H height, W width, C channels, L patches, K visible, M masked, P values per patch, E embedding dim, D width

from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.models import repeated
from ccmim_fast.models.blocks import BlockRunner
from ccmim_fast.models.decoder import Decoder
from ccmim_fast.models.embedding import embed, folded_projection, patch_size_of, prefix_tokens, with_gradient
from ccmim_fast.models.encoder import encode, encode_cls, grid_of
from ccmim_fast.models.heads import build_predictor, build_projector
from ccmim_fast.models.scores import Score, check_scores, score
from ccmim_kernels import Divided, Partition, divide_tokens, gather_tokens, sample_partition
from ccmim_kernels.divide_tokens.reference import folded_logits


class Output(NamedTuple):
    """What one forward pass gives.

    Attributes:
        pred_BMP: [B, M, P] predicted targets of the masked patches, rows in the order of `partition.ids_masked_BM`.
        partition: which patches are visible and masked.
        visible_BE: [B, E] hV (for `align`: p(hV)), or None without a contrastive loss.
        masked_BE: [B, E] hM, no gradient, or None likewise.
        logits_BL: [B, L] log-scores up to a constant per row, or None where nothing was scored.
    """

    pred_BMP: Tensor
    partition: Partition
    visible_BE: Tensor | None
    masked_BE: Tensor | None
    logits_BL: Tensor | None


class CCMIM(nn.Module):
    """The whole model.

    Args:
        encoder: from `build_encoder`; its parameters keep timm's names under `encoder.`.
        decoder: from `Decoder`.
        mean, std: per channel on a 0..1 scale.
        seed: keys the masks.
        mask_ratio: share of patches masked; the number visible is int(L * (1 - ratio)), as in MAE.
        strategy, noise, block_min: of the division, see `ccmim_kernels.sample_partition`.
        temperature: T of s^(1/T).
        source, block, normalise: of the scores, see `models.scores.score`.
        contrast: `nce`, `align`, `moco` or `none`; `none` computes no masked branch.
        head_dim: E.
        sync_bn: BatchNorm statistics over all ranks.
        fold_input, visible_gradient, fold_score, masked_no_grad, cls_only, row_ops: arithmetic left out, see
            `config.schema.FastConfig`; no result depends on them.
        kernels: which implementation of the ops runs, see `ccmim_kernels.dispatch`.
        run: how the blocks are run.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: Decoder,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        mask_ratio: float,
        strategy: str,
        noise: str,
        block_min: int,
        temperature: float,
        source: str,
        block: int,
        normalise: str,
        contrast: str,
        head_dim: int,
        sync_bn: bool,
        fold_input: bool = True,
        visible_gradient: bool = True,
        fold_score: bool = True,
        masked_no_grad: bool = True,
        cls_only: bool = True,
        row_ops: bool = True,
        kernels: str = "auto",
        run: BlockRunner | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.scored = strategy.startswith("importance")
        if self.scored:
            check_scores(encoder, source, block)
        self.contrast = contrast
        if contrast != "none":
            self.projector = build_projector(encoder.embed_dim, head_dim, sync_bn=sync_bn)
        if contrast == "align":
            self.predictor = build_predictor(head_dim, sync_bn=sync_bn)
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

        self.patch = patch_size_of(encoder)
        self.grid = grid_of(encoder)
        self.keep = int(self.grid[0] * self.grid[1] * (1 - mask_ratio))
        self.kernels, self.run = kernels, run or BlockRunner()
        self.fold_input, self.row_ops = fold_input, row_ops
        self.masked_no_grad, self.cls_only = masked_no_grad, cls_only
        # The gradient is that of the folded projection, unless something follows it.
        self.visible_gradient = visible_gradient and fold_input and isinstance(encoder.patch_embed.norm, nn.Identity)
        self.scoring = {
            "source": source,
            "block": block,
            "normalise": normalise,
            "fold": fold_score,
            "cls_only": cls_only,
            "kernels": kernels,
        }
        self.sampling = {
            "grid": self.grid,
            "keep": self.keep,
            "seed": seed,
            "strategy": strategy,
            "noise": noise,
            "temperature": temperature,
            "block_min": block_min,
        }

    def forward(
        self, images_BHWC: Tensor, ids_B: Tensor, epoch: int | Tensor, partition: Partition | None = None
    ) -> Output:
        """One pass over a batch.

        Args:
            images_BHWC: [B, H, W, C] uint8.
            ids_B: [B] int64 sample ids; with `epoch` they key the masks.
            epoch: 0 .. 2**32 - 1, as a number, or as int64 on the images' device, one for all or [B].
            partition: take this division instead of sampling one.
        """
        divided = self._tokens(images_BHWC, ids_B, epoch, partition)
        encoded_BTD = encode(self.encoder, divided.visible, self.run)
        # Registers stay in the encoder: the decoder sees [CLS] and patches, as in MAE.
        registers = self.encoder.num_prefix_tokens - 1
        decoder_input = (
            torch.cat([encoded_BTD[:, :1], encoded_BTD[:, 1 + registers :]], 1) if registers else encoded_BTD
        )
        pred_BMP = self.decoder(decoder_input, divided.partition)
        visible_BE, masked_BE = None, None
        if self.contrast != "none":
            visible_BE = self.projector(encoded_BTD[:, 0])
            masked_BE = self.encode_masked(divided.masked)
        if self.contrast == "align":
            visible_BE = self.predictor(visible_BE)
        return Output(pred_BMP, divided.partition, visible_BE, masked_BE, divided.logits)

    def _tokens(self, images_BHWC: Tensor, ids_B: Tensor, epoch: int | Tensor, partition: Partition | None) -> Divided:
        """Embed and divide; the visible tokens carry the gradient of the patch embedding and of the prefix."""
        projection = self._projection()
        if not self.visible_gradient:
            x_BLD = embed(self.encoder, images_BHWC, projection, self.mean_C, self.std_C)
            return self.divide(x_BLD, ids_B, epoch, partition)
        with torch.no_grad():
            x_BLD = embed(self.encoder, images_BHWC, projection, self.mean_C, self.std_C)
            divided = self.divide(x_BLD, ids_B, epoch, partition)
        ids_BK = divided.partition.ids_visible_BK
        visible = with_gradient(divided.visible, projection, prefix_tokens(self.encoder), images_BHWC, ids_BK)
        return Divided(visible, divided.masked, divided.partition, divided.logits)

    def _projection(self) -> tuple[Tensor, Tensor] | None:
        return folded_projection(self.encoder, self.mean_C, self.std_C) if self.fold_input else None

    def embed(self, images_BHWC: Tensor) -> Tensor:
        """Embedded patches with positions: uint8 [B, H, W, C] -> [B, L, D]."""
        return embed(self.encoder, images_BHWC, self._projection(), self.mean_C, self.std_C)

    def score(self, x_BLD: Tensor, **changed: Any) -> Score:
        """Scores of embedded patches (Eq. 4), no gradient; `changed` replaces some of the model's own settings."""
        return score(self.encoder, x_BLD, **{**self.scoring, **changed}, run=self.run)

    def divide(self, x_BLD: Tensor, ids_B: Tensor, epoch: int | Tensor, partition: Partition | None = None) -> Divided:
        """Score the embedded patches and split them into visible and masked tokens (Eq. 4, section 3.2)."""
        prefix_PD = prefix_tokens(self.encoder)
        with_masked = self.contrast != "none"
        if partition is not None:
            return self._take(x_BLD, prefix_PD, partition, with_masked)
        scores = self.score(x_BLD) if self.scored else Score(None, None)
        if not self.row_ops:
            logits_BL = scores.logits_BL
            if scores.direction_D is not None:
                logits_BL = folded_logits(x_BLD.detach(), scores.direction_D, self._eps())
            partition = sample_partition(logits_BL, ids_B, epoch=epoch, kernels=self.kernels, **self.sampling)
            return repeated.divide_tokens(x_BLD, prefix_PD, partition, logits_BL, with_masked)
        return divide_tokens(
            x_BLD,
            prefix_PD,
            ids_B,
            epoch=epoch,
            logits_BL=scores.logits_BL,
            direction_D=scores.direction_D,
            eps=self._eps(),
            with_masked=with_masked,
            kernels=self.kernels,
            **self.sampling,
        )

    def _eps(self) -> float:
        """Of the LayerNorm that Eq. 4 reads the tokens through."""
        return getattr(self.encoder.blocks[0].norm1, "eps", 1e-6)

    def _take(self, x_BLD: Tensor, prefix_PD: Tensor, partition: Partition, with_masked: bool) -> Divided:
        masked = None
        if with_masked:
            masked = gather_tokens(x_BLD.detach(), partition.ids_masked_BM, prefix_PD.detach(), kernels=self.kernels)
        visible = gather_tokens(x_BLD, partition.ids_visible_BK, prefix_PD, kernels=self.kernels)
        return Divided(visible, masked, partition, None)

    def encode_masked(self, masked_BTD: Tensor) -> Tensor:
        """SG(hM) [B, E] of Eq. 7 and 8: the teacher runs without gradient and saves no activation."""
        with torch.set_grad_enabled(not self.masked_no_grad and torch.is_grad_enabled()):
            if self.cls_only:
                cls_BD = encode_cls(self.encoder, masked_BTD, self.run)
            else:
                cls_BD = encode(self.encoder, masked_BTD, self.run)[:, 0]
            return self.projector(cls_BD).detach()
