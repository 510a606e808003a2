"""ccMIM: score, divide, encode both sets, reconstruct one from the other. Returns tensors, never a loss.

With `strategy="random"` and `contrast="none"` this is MAE.
"""

# B batch, H height, W width, C channels, L patches, K visible, M masked, P values per patch, E embedding dim, D width

import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models import repeated
from ccmim_fast.models.blocks import BlockRunner, RowReader
from ccmim_fast.models.decoder import Decoder
from ccmim_fast.models.embedding import embed, folded_projection, patch_size_of, prefix_tokens, with_gradient
from ccmim_fast.models.encoder import encode, encode_and_read, encode_cls, grid_of
from ccmim_fast.models.exchange import arrived, send
from ccmim_fast.models.heads import build_predictor, build_projector
from ccmim_fast.models.output import Known, Output
from ccmim_fast.models.scores import Score, check_scores, score
from ccmim_kernels import Divided, Partition, divide_tokens, folded_logits, gather_tokens, sample_partition


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
        source, block, normalise: of the scores, see `models.scores.score`. With `bank` they are given to each pass,
            which gives back what it saw itself.
        read_blocks: for `bank`, in how many of the last blocks attention is read; 0: all.
        unseen: for `bank`, how patches are scored that it does not know: `random`, or by Eq. 4 at the `first` block.
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
        read_blocks: int = 0,
        unseen: str = "first",
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
            check_scores(encoder, source, block, read_blocks)
        self.banked = self.scored and source == "bank"
        if self.banked and contrast == "none":
            raise ConfigError("score.source=bank: reads both passes, of which contrast.loss=none has one; use nce")
        self.read_blocks, self.unseen = read_blocks or len(encoder.blocks), unseen
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
        self,
        images_BHWC: Tensor,
        ids_B: Tensor,
        epoch: int | Tensor,
        partition: Partition | None = None,
        known: Known | None = None,
    ) -> Output:
        """One pass over a batch.

        Args:
            images_BHWC: [B, H, W, C] uint8.
            ids_B: [B] int64 sample ids; with `epoch` they key the masks.
            epoch: 0 .. 2**32 - 1, as a number, or as int64 on the images' device, one for all or [B].
            partition: take this division instead of sampling one.
            known: what a bank says; None: it knows nothing. Not looked at where scores do not come from a bank.
        """
        divided = self._tokens(images_BHWC, ids_B, epoch, partition, known)
        encoded_BTD, seen_BK = self._encode(divided.visible)
        visible_BE, masked_BE, shares_BL, sent = None, None, None, None
        if self.contrast != "none":
            visible_BE = self.projector(encoded_BTD[:, 0])
            # What the other ranks need is sent as soon as it is known, and travels while the rest is computed.
            if self.contrast == "nce" and self.training:
                sent = send(visible_BE)
            masked_BE, hidden_BM = self.encode_masked(divided.masked)
            if self.contrast == "moco" and self.training:
                sent = send(masked_BE)
            if self.banked:
                shares_BL = torch.cat([seen_BK, hidden_BM], dim=1).gather(1, divided.partition.ids_restore_BL)
        if self.contrast == "align":
            visible_BE = self.predictor(visible_BE)
        pred_BMP = self._decode(encoded_BTD, divided.partition)
        return Output(pred_BMP, divided.partition, visible_BE, masked_BE, divided.logits, shares_BL, arrived(sent))

    def predict(self, images_BHWC: Tensor, partition: Partition) -> Tensor:
        """[B, M, P] as `Output.pred_BMP`, of a division that is given: `forward` without the masked branch."""
        visible = self._take(self.embed(images_BHWC), prefix_tokens(self.encoder), partition, with_masked=False).visible
        return self._decode(self._encode(visible)[0], partition)

    def _decode(self, encoded_BTD: Tensor, partition: Partition) -> Tensor:
        # Registers stay in the encoder: the decoder sees [CLS] and patches, as in MAE.
        registers = self.encoder.num_prefix_tokens - 1
        if registers:
            encoded_BTD = torch.cat([encoded_BTD[:, :1], encoded_BTD[:, 1 + registers :]], 1)
        return self.decoder(encoded_BTD, partition)

    def _tokens(
        self,
        images_BHWC: Tensor,
        ids_B: Tensor,
        epoch: int | Tensor,
        partition: Partition | None,
        known: Known | None,
    ) -> Divided:
        """Embed and divide; the visible tokens carry the gradient of the patch embedding and of the prefix."""
        projection = self._projection()
        if not self.visible_gradient:
            x_BLD = embed(self.encoder, images_BHWC, projection, self.mean_C, self.std_C)
            return self.divide(x_BLD, ids_B, epoch, partition, known)
        with torch.no_grad():
            x_BLD = embed(self.encoder, images_BHWC, projection, self.mean_C, self.std_C)
            divided = self.divide(x_BLD, ids_B, epoch, partition, known)
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

    def _scores(self, x_BLD: Tensor, known: Known | None) -> Score:
        if not self.scored:
            return Score(None, None)
        if not self.banked:
            return self.score(x_BLD)
        if known is None:
            nothing_BL = torch.zeros(x_BLD.shape[:2], device=x_BLD.device)
            known = Known(nothing_BL, nothing_BL)
        if self.unseen == "random":
            return Score(known.scores_BL, None)
        first = self.score(x_BLD, source="first", block=0)
        logits_BL = self._logits(x_BLD, first)
        # As shares, so that both are of one kind: log of the softmax, times the patches there are.
        guess_BL = logits_BL.log_softmax(1) + math.log(logits_BL.shape[1])
        return Score(known.scores_BL + (1 - known.share_BL) * guess_BL, None)

    def _logits(self, x_BLD: Tensor, scores: Score) -> Tensor | None:
        """[B, L], computed from the direction where there is one."""
        if scores.direction_D is None:
            return scores.logits_BL
        return folded_logits(x_BLD.detach(), scores.direction_D, self._eps())

    def divide(
        self,
        x_BLD: Tensor,
        ids_B: Tensor,
        epoch: int | Tensor,
        partition: Partition | None = None,
        known: Known | None = None,
    ) -> Divided:
        """Score the embedded patches and split them into visible and masked tokens (Eq. 4, section 3.2)."""
        prefix_PD = prefix_tokens(self.encoder)
        with_masked = self.contrast != "none"
        if partition is not None:
            return self._take(x_BLD, prefix_PD, partition, with_masked)
        scores = self._scores(x_BLD, known)
        if not self.row_ops:
            logits_BL = self._logits(x_BLD, scores)
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

    def _encode(self, x_BTD: Tensor, cls_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """Encoded tokens, or [CLS] alone [B, 1, D]; and, for a bank, how much [CLS] attended to each patch."""
        if self.banked:
            read = RowReader(self.encoder.num_prefix_tokens, self.kernels)
            return encode_and_read(self.encoder, x_BTD, self.read_blocks, read, self.run, cls_only)
        if cls_only:
            return encode_cls(self.encoder, x_BTD, self.run)[:, None], None
        return encode(self.encoder, x_BTD, self.run), None

    def encode_masked(self, masked_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """SG(hM) [B, E] of Eq. 7 and 8, and what a bank keeps of the pass [B, M] or None.

        The teacher runs without gradient and saves no activation.
        """
        with torch.set_grad_enabled(not self.masked_no_grad and torch.is_grad_enabled()):
            encoded_BTD, hidden_BM = self._encode(masked_BTD, self.cls_only)
            return self.projector(encoded_BTD[:, 0]).detach(), hidden_BM
