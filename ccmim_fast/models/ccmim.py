"""ccMIM: score, divide, encode both sets, reconstruct one from the other by MAE's decoder. No loss is computed here.

Without a score source and without heads this is MAE.
"""

# B batch, N global batch, H height, W width, C channels, L patches, K visible, M masked, S of them for the teacher,
# T tokens of a pass, P values per patch, E embedding dim, D width (in the decoder its own, and E the encoder's)

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.encoder import initialise, sincos_positions
from ccmim_fast.models.heads import GlobalBatchNorm, Heads, finish_all_gather, start_all_gather
from ccmim_fast.models.scores import PriorScores, ScoreSource
from ccmim_fast.models.tokens import (
    centred,
    embed,
    encode,
    folded_projection,
    grid_of,
    learned_positions,
    patch_size_of,
    prefix_tokens,
    with_gradient,
)
from ccmim_kernels import Divided, Embedded, Partition, divide_tokens, gather_tokens, restore_tokens


class Output(NamedTuple):
    """The tensors that one forward pass gives."""

    pred_BMP: Tensor  # predicted targets of the masked patches, rows in the order of `partition.ids_masked_BM`
    partition: Partition  # which patches are visible and masked
    visible_BE: Tensor | None  # hV (for `align`: p(hV)); None without a contrastive loss
    masked_BE: Tensor | None  # hM, no gradient; None likewise
    logits_BL: Tensor | None  # log-scores up to a constant per row; None where nothing was scored
    # Log of [CLS]'s attention to each patch in the pass it was in, over an equal share of it; 0 for a patch that was in
    # none; float32 without gradient; None unless scores come from a bank of them.
    cls_attention_BL: Tensor | None = None
    attended_BL: Tensor | None = None  # bool, the patches that were in a pass; None: all
    # The rows of all ranks, in rank order, that a contrastive loss compares with: hV for `nce`, hM for `moco`, else
    # None; and None for one rank, and in eval mode, where each is alone.
    gathered_NE: Tensor | None = None


class CCMIM(nn.Module):
    """The whole model.

    Args:
        encoder: from `build_encoder`; its parameters keep timm's names under `encoder.`.
        mean, std: per channel on a 0..1 scale.
        sampling: of the division, the keyword arguments of `ccmim_kernels.sample_partition` from `keep` on, but for
            `epoch` and `kernels`.
        score_source: how patches are scored; None where `strategy` needs no scores.
        heads: of the contrastive half; None: no masked branch is computed.
        kernels: which implementation of the ops runs, see `ccmim_kernels.dispatch`.
    """

    # Within it the encoder's passes without gradient are computed, see `int8.Int8Layers`; None: as all others.
    without_gradient: AbstractContextManager | None = None

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: "Decoder",
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        sampling: Mapping[str, Any],
        score_source: ScoreSource | None = None,
        heads: Heads | None = None,
        kernels: str = "auto",
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.sampling, self.score_source, self.kernels = dict(sampling), score_source, kernels
        self.read_blocks = 0 if score_source is None else score_source.read_blocks
        if self.read_blocks and heads is None:
            raise ConfigError("score.source: a bank reads both passes, of which contrast.loss=none has one; use nce")
        self.projector, self.predictor, self.negatives = heads or (None, None, "")
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)
        self.patch, self.grid, self.keep = patch_size_of(encoder), grid_of(encoder), sampling["keep"]
        self.alone = False

    def leave_ranks(self) -> None:
        """Send nothing to other ranks any more, and wait for none: for a step that this rank tries alone."""
        self.alone = True
        for module in self.modules():
            if isinstance(module, GlobalBatchNorm):
                module.sync = False

    @property
    def banked(self) -> bool:
        """Tell whether the scores of a pass come from those of earlier passes."""
        return self.read_blocks > 0

    def forward(
        self,
        images_BHWC: Tensor,
        ids_B: Tensor,
        epoch: int | Tensor,
        partition: Partition | None = None,
        prior: PriorScores | None = None,
    ) -> Output:
        """Pass a batch through the model.

        Args:
            images_BHWC: [B, H, W, C] uint8 or float32, 255 for white.
            ids_B: [B] int64 sample ids; with `epoch` they key the masks.
            epoch: 0 .. 2**32 - 1, as a number, or as int64 on the images' device, one for all or [B].
            partition: take this division instead of sampling one.
            prior: the scores that a bank has; None: it has none. Ignored where scores do not come from a bank.
        """
        divided = self.embed_and_divide(images_BHWC, ids_B, epoch, partition, prior)
        encoded_BTD, visible_BK = self._encode(divided.visible, divided.partition.ids_visible_BK)
        visible_BE, masked_BE, attention, gathering = None, None, (None, None), None
        if self.projector is not None:
            visible_BE = self.projector(encoded_BTD[:, 0])
            # What the other ranks need is sent as soon as it is known, and travels while the rest is computed.
            if self.negatives == "visible" and self.training:
                gathering = start_all_gather(visible_BE, self.alone)
            masked_BE, masked_BS = self.encode_masked(divided.masked, divided.partition.ids_teacher_BT)
            if self.negatives == "masked" and self.training:
                gathering = start_all_gather(masked_BE, self.alone)
            if self.banked:
                attention = _in_patch_order(visible_BK, masked_BS, divided.partition)
        if self.predictor is not None:
            visible_BE = self.predictor(visible_BE)
        pred_BMP = self._decode(encoded_BTD, divided.partition)
        gathered_NE = None if gathering is None else finish_all_gather(gathering)
        return Output(pred_BMP, divided.partition, visible_BE, masked_BE, divided.logits, *attention, gathered_NE)

    def predict(self, images_BHWC: Tensor, partition: Partition) -> Tensor:
        """Return [B, M, P] as `Output.pred_BMP` of a given division: `forward` without the masked branch."""
        visible_BTD = gather_tokens(
            self.embed(images_BHWC), partition.ids_visible_BK, prefix_tokens(self.encoder), kernels=self.kernels
        )
        return self._decode(self._encode(visible_BTD, partition.ids_visible_BK)[0], partition)

    def embed(self, images_BHWC: Tensor) -> Tensor:
        """Embed patches, with positions: images [B, H, W, C] -> [B, L, D]."""
        images_BHWC, mean_C = centred(images_BHWC, self.mean_C)
        return self._embed(images_BHWC, folded_projection(self.encoder, mean_C, self.std_C)).tokens

    def embed_and_divide(
        self,
        images_BHWC: Tensor,
        ids_B: Tensor,
        epoch: int | Tensor,
        partition: Partition | None = None,
        prior: PriorScores | None = None,
    ) -> Divided:
        """Embed and divide; the visible tokens carry the gradient of the patch embedding and of the prefix."""
        images_BHWC, mean_C = centred(images_BHWC, self.mean_C)
        projection, scored = folded_projection(self.encoder, mean_C, self.std_C), partition is None
        # The gradient of visible patches alone is that of the folded projection, unless a norm follows it.
        if not isinstance(self.encoder.patch_embed.norm, nn.Identity):
            x_BLD, folded_BL = self._embed(images_BHWC, projection, scored)
            return self.divide(x_BLD, ids_B, epoch, partition, prior, folded_BL)
        with torch.no_grad():
            x_BLD, folded_BL = self._embed(images_BHWC, projection, scored)
            divided = self.divide(x_BLD, ids_B, epoch, partition, prior, folded_BL)
        prefix_PD, ids_BK = prefix_tokens(self.encoder), divided.partition.ids_visible_BK
        positions_LD = learned_positions(self.encoder)
        visible_BTD = with_gradient(divided.visible, projection, prefix_PD, positions_LD, images_BHWC, ids_BK)
        # In full: torch.compile 2.7 does not trace `_replace`.
        return Divided(visible_BTD, divided.masked, divided.partition, divided.logits)

    def _embed(self, images_BHWC: Tensor, projection: tuple[Tensor, Tensor], scored: bool = False) -> Embedded:
        direction_D = self.score_source.direction(self.encoder) if scored and self.score_source is not None else None
        return embed(self.encoder, images_BHWC, projection, direction_D, self.kernels)

    def score(self, x_BLD: Tensor, prior: PriorScores | None = None, folded_BL: Tensor | None = None) -> Tensor | None:
        """Return the logits [B, L] of embedded patches (Eq. 4), without gradient; None where nothing is scored."""
        if self.score_source is None:
            return None
        with self.without_gradient or nullcontext():
            return self.score_source(self.encoder, x_BLD, prior, folded_BL)

    def divide(
        self,
        x_BLD: Tensor,
        ids_B: Tensor,
        epoch: int | Tensor,
        partition: Partition | None = None,
        prior: PriorScores | None = None,
        folded_BL: Tensor | None = None,
    ) -> Divided:
        """Score the embedded patches and split them into visible and masked tokens (Eq. 4, section 3.2)."""
        prefix_PD, with_masked = prefix_tokens(self.encoder), self.projector is not None
        if partition is not None:
            visible = gather_tokens(x_BLD, partition.ids_visible_BK, prefix_PD, kernels=self.kernels)
            masked = None
            if with_masked:
                masked = gather_tokens(
                    x_BLD.detach(), partition.ids_teacher_BT, prefix_PD.detach(), kernels=self.kernels
                )
            return Divided(visible, masked, partition, None)
        return divide_tokens(
            x_BLD,
            prefix_PD,
            ids_B,
            epoch=epoch,
            logits_BL=self.score(x_BLD, prior, folded_BL),
            with_masked=with_masked,
            kernels=self.kernels,
            **self.sampling,
        )

    @torch.no_grad()
    def encode_masked(self, masked_BTD: Tensor, ids_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return SG(hM) [B, E] of Eq. 7 and 8, and [CLS]'s attention [B, S], which a bank keeps, or None.

        The teacher runs without gradient, saves no activation, and computes its last block for [CLS] alone. It sees
        `masked_BTD`, the prefix and the tokens of the patches `ids_BS`.
        """
        with self.without_gradient or nullcontext():
            encoded_B1D, attention_BS = self._encode(masked_BTD, ids_BS, cls_only=True)
        return self.projector(encoded_B1D[:, 0]), attention_BS

    def _encode(self, x_BTD: Tensor, ids_BK: Tensor, cls_only: bool = False) -> tuple[Tensor, Tensor | None]:
        return encode(self.encoder, x_BTD, ids_BK, cls_only=cls_only, read_blocks=self.read_blocks)

    def _decode(self, encoded_BTD: Tensor, partition: Partition) -> Tensor:
        # Registers stay in the encoder: the decoder sees [CLS] and patches, as in MAE.
        registers = self.encoder.num_prefix_tokens - 1
        if registers:
            encoded_BTD = torch.cat([encoded_BTD[:, :1], encoded_BTD[:, 1 + registers :]], 1)
        return self.decoder(encoded_BTD, partition)


def _in_patch_order(visible_BK: Tensor, masked_BS: Tensor, partition: Partition) -> tuple[Tensor, Tensor | None]:
    """Return `Output.cls_attention_BL` and `attended_BL` of what both passes read."""
    both = torch.cat([visible_BK, masked_BS], dim=1)  # [B, K + S]
    if both.shape[1] == partition.mask_BL.shape[1]:
        return both.gather(1, partition.ids_restore_BL), None
    places = torch.cat([partition.ids_visible_BK, partition.ids_teacher_BT], dim=1)
    nothing_BL = torch.zeros_like(partition.mask_BL)
    return nothing_BL.to(both.dtype).scatter(1, places, both), nothing_BL.scatter(1, places, True)


class Decoder(nn.Module):
    """The decoder predicts the target of the masked patches, P `outputs`, from the encoder's visible tokens.

    The last block's queries and MLP and the prediction are computed for masked positions only. `dim`, `depth` (at least
    1) and `num_heads` are of its blocks; `grid` are rows and columns of patches.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        outputs: int,
        kernels: str = "auto",
    ):
        super().__init__()
        self.kernels = kernels
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid, prefix=1)[None], requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)  # MAE
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, outputs)
        initialise(self)

    def forward(self, visible_BTE: Tensor, partition: Partition) -> Tensor:
        """Map [B, 1 + K, E] encoder output ([CLS] first) to [B, M, P], rows as in `partition.ids_masked_BM`."""
        x_BTD = self.restore(self.embed(visible_BTE), partition.ids_restore_BL)
        *others, last = self.blocks
        for block in others:
            x_BTD = block(x_BTD)
        # Position 0 is [CLS], so patch i is token i + 1.
        masked_BMD = self.gather(x_BTD, partition.ids_masked_BM + 1)
        return self.pred(self.norm(last(x_BTD, query_BQD=masked_BMD)))

    def restore(self, visible_BTD: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """Put visible tokens back on the grid, mask tokens elsewhere, and add positions: [B, 1 + L, D]."""
        return restore_tokens(
            visible_BTD, self.mask_token[0, 0], ids_restore_BL, self.pos_embed[0], kernels=self.kernels
        )

    def gather(self, x_BTD: Tensor, ids_BM: Tensor) -> Tensor:
        """Gather tokens [B, M, D]."""
        return gather_tokens(x_BTD, ids_BM, kernels=self.kernels)
