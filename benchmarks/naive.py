"""The step as the algorithm is written down: the arithmetic that ours leaves out, each saving by a name of its own.

`without(step, savings)` turns a step of ours into one that lacks these savings. Losses and gradients stay the same but
for rounding, which tests/models/test_savings.py holds; what changes is the arithmetic, the memory and the time.
"""

# B batch, H height, W width, C channels, L patches, K kept, M masked, S of them for the teacher, T tokens, P prefix
# tokens, D width

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ccmim_fast.engine import build
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.models.ccmim import CCMIM, Decoder
from ccmim_fast.models.scores import AllBlocks, Bank, FirstBlock, OneBlock
from ccmim_fast.models.tokens import encode, prefix_tokens, with_prefix
from ccmim_kernels import Divided, Partition, sample_partition

SAVINGS = {
    "fold_input": "normalisation of uint8 images folded into the patch embedding: no float image",
    "visible_gradient": "gradient of the patch embedding from the visible patches only",
    "fold_score": "Eq. 4 at the first block as one vector in place of all keys",
    "masked_no_grad": "the masked branch, whose result has no gradient, saves no activation",
    "cls_only": "last block of the masked branch and of the scores of all blocks for [CLS] only",
    "masked_only": "decoder's last block (queries, MLP) and the prediction for masked positions only",
    "row_ops": "rows moved by the ops of ccmim_kernels, not by index tensors as large as the tokens",
    "kernels": "on CUDA: the ops by their Triton kernels, not by plain PyTorch",
    "onednn_linear": "on a CPU in float32, uncompiled: large linear layers by oneDNN, not MKL",
    "attention": "attention by the backend that is fastest for its number of tokens, not by torch's own choice",
    "kept_memory": "on a CPU: what a step frees is kept for the next one",
    "fused_adamw": "AdamW as one kernel over all weights, not as one for each operation",
}
# These save something on one kind of device alone.
ON = {"kernels": "cuda", "onednn_linear": "cpu", "kept_memory": "cpu"}
# Of these a setting decides.
_SETTINGS = {"kernels": "--train.kernels=reference", "attention": "--train.attention=sdpa"}


def settings_without(savings: Collection[str]) -> list[str]:
    """Return the settings of a run that lacks these savings, as far as settings decide."""
    return [setting for name, setting in _SETTINGS.items() if name in savings]


@contextmanager
def freed_memory(savings: Collection[str]) -> Iterator[None]:
    """Let a step that is built within free its memory, if it lacks `kept_memory`: a process cannot take that back."""
    keep = build.keep_freed_memory
    if "kept_memory" in savings:
        build.keep_freed_memory = lambda: False
    try:
        yield
    finally:
        build.keep_freed_memory = keep


def without(step: TrainStep, savings: Collection[str]) -> TrainStep:
    """Take these savings from `step`, in place, before it is compiled; `settings_without` has those of settings."""
    step.linear = None if "onednn_linear" in savings else step.linear
    if "fused_adamw" in savings and isinstance(step.optimizer, torch.optim.AdamW):
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in step.optimizer.param_groups]
        first = step.optimizer.param_groups[0]
        step.optimizer = torch.optim.AdamW(groups, lr=first["lr"], betas=first["betas"])
    without_in_model(step.model, savings)
    return step


def without_in_model(model: CCMIM, savings: Collection[str]) -> CCMIM:
    """Take these savings from `model`, in place; its weights stay."""
    model.__class__, model.savings_off = NaiveCCMIM, frozenset(savings)
    model.decoder.__class__, model.decoder.savings_off = NaiveDecoder, frozenset(savings)
    source = model.score_source
    if "fold_score" in savings and isinstance(source, FirstBlock):
        model.score_source = OneBlock(model.encoder, block=0)
    elif "fold_score" in savings and isinstance(source, Bank) and source.unseen is not None:
        source.unseen = OneBlock(model.encoder, block=0)
    elif "cls_only" in savings and isinstance(source, AllBlocks):
        source.__class__ = NaiveAllBlocks
    return model


class NaiveCCMIM(CCMIM):
    """This model computes what `savings_off` names, where ours does not."""

    savings_off: frozenset[str]

    def embed(self, images_BHWC: Tensor) -> Tensor:
        if "fold_input" not in self.savings_off:
            return super().embed(images_BHWC)
        vit = self.encoder
        pixels_BCHW = ((images_BHWC.to(self.mean_C.dtype) / 255 - self.mean_C) / self.std_C).permute(0, 3, 1, 2)
        x_BLD = vit.patch_embed.norm(vit.patch_embed.proj(pixels_BCHW).flatten(2).transpose(1, 2))
        return x_BLD + vit.pos_embed[:, -x_BLD.shape[1] :]

    def embed_and_divide(self, images_BHWC: Tensor, *rest) -> Divided:
        if self.savings_off.isdisjoint(("fold_input", "visible_gradient")):
            return super().embed_and_divide(images_BHWC, *rest)
        return self.divide(self.embed(images_BHWC), *rest)

    def divide(
        self, x_BLD: Tensor, ids_B: Tensor, epoch, partition: Partition | None = None, prior=None, folded_BL=None
    ) -> Divided:
        if "row_ops" not in self.savings_off or partition is not None:
            return super().divide(x_BLD, ids_B, epoch, partition, prior, folded_BL)
        prefix_PD = prefix_tokens(self.encoder)
        logits_BL = self.score(x_BLD, prior, folded_BL)
        partition = sample_partition(logits_BL, ids_B, epoch=epoch, kernels=self.kernels, **self.sampling)
        visible_BTD = _gather_with_prefix(x_BLD, partition.ids_visible_BK, prefix_PD)
        masked_BTD = None
        if self.projector is not None:
            masked_BTD = _gather_with_prefix(x_BLD.detach(), partition.ids_teacher_BT, prefix_PD.detach())
        return Divided(visible_BTD, masked_BTD, partition, logits_BL)

    def encode_masked(self, masked_BTD: Tensor, ids_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled("masked_no_grad" in self.savings_off and torch.is_grad_enabled()):
            cls_only = "cls_only" not in self.savings_off
            encoded_BTD, attention_BS = encode(
                self.encoder, masked_BTD, ids_BS, cls_only=cls_only, read_blocks=self.read_blocks
            )
            return self.projector(encoded_BTD[:, 0]).detach(), attention_BS


class NaiveAllBlocks(AllBlocks):
    """These scores compute the last block whole."""

    def logits(self, vit, x_BLD: Tensor) -> Tensor:
        x_BTD, total_BL = vit.norm_pre(with_prefix(vit, x_BLD)), None
        for block in vit.blocks:
            x_BTD, total_BL = block(x_BTD, reads_cls=True, total_BL=total_BL)
        return total_BL.log() if self.normalise == "renorm" else total_BL


class NaiveDecoder(Decoder):
    """This decoder computes what `savings_off` names, where ours does not."""

    savings_off: frozenset[str]

    def forward(self, visible_BTE: Tensor, partition: Partition) -> Tensor:
        if "masked_only" not in self.savings_off:
            return super().forward(visible_BTE, partition)
        x_BTD = self.restore(self.embed(visible_BTE), partition.ids_restore_BL)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.gather(self.pred(self.norm(x_BTD)), partition.ids_masked_BM + 1)

    def restore(self, visible_BTD: Tensor, ids_restore_BL: Tensor) -> Tensor:
        if "row_ops" not in self.savings_off:
            return super().restore(visible_BTD, ids_restore_BL)
        batch, patches = ids_restore_BL.shape
        filler_BMD = self.mask_token.to(visible_BTD.dtype).repeat(batch, patches + 1 - visible_BTD.shape[1], 1)
        grid_BLD = _gather(torch.cat([visible_BTD[:, 1:], filler_BMD], dim=1), ids_restore_BL)
        return torch.cat([visible_BTD[:, :1], grid_BLD], dim=1) + self.pos_embed[0]

    def gather(self, x_BTD: Tensor, ids_BM: Tensor) -> Tensor:
        return _gather(x_BTD, ids_BM) if "row_ops" in self.savings_off else super().gather(x_BTD, ids_BM)


def _gather(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """Gather rows [B, K, D] by an index as large as they are."""
    return torch.gather(x_BLD, 1, ids_BK[..., None].repeat(1, 1, x_BLD.shape[2]))


def _gather_with_prefix(x_BLD: Tensor, ids_BK: Tensor, prefix_PD: Tensor) -> Tensor:
    kept_BKD = _gather(x_BLD, ids_BK)
    return torch.cat([prefix_PD.to(x_BLD.dtype).expand(len(x_BLD), -1, -1), kept_BKD], dim=1)
