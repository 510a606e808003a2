"""MAE by `lightly`: its masked timm encoder and its decoder of timm's blocks, put together as it documents them."""

# B batch, H height, W width, C channels, T tokens, K visible, M masked, D width, P values per patch

from collections.abc import Callable

import timm
import torch.nn.functional as F
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from plain_step import forms, plain_step
from timm.layers import set_fused_attn
from torch import Tensor, nn

__all__ = ["build", "forms"]


class MAE(nn.Module):
    def __init__(self, vit: nn.Module):
        super().__init__()
        self.patch = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.embed = nn.Linear(vit.embed_dim, 512)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches, embed_dim=512, depth=8, num_heads=16
        )
        self.predict = nn.Linear(512, 3 * self.patch**2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The loss, a scalar."""
        size = (len(images_BCHW), self.backbone.sequence_length)
        keep_BK, mask_BM = utils.random_token_mask(size=size, mask_ratio=0.75, device=images_BCHW.device)
        visible_BKD = self.embed(self.backbone.encode(images=images_BCHW, idx_keep=keep_BK))
        tokens_BTD = utils.repeat_token(self.decoder.mask_token, size)
        tokens_BTD = utils.set_at_index(tokens_BTD, keep_BK, visible_BKD.type_as(tokens_BTD))
        masked_BMD = utils.get_at_index(self.decoder(tokens_BTD), mask_BM)
        # Token 0 is [CLS], so token i is patch i - 1.
        target_BMP = utils.get_at_index(utils.patchify(images_BCHW, self.patch), mask_BM - 1)
        return F.mse_loss(self.predict(masked_BMD), utils.normalize_mean_var(target_BMP))


def build(arch: str, images_BHWC: Tensor, precision: str, attention: str = "sdpa", **form: str) -> Callable[[], Tensor]:
    """The contract of throughput.py."""
    set_fused_attn(attention == "sdpa")  # of the blocks that are made from here on
    model = MAE(timm.create_model(arch, num_classes=0, img_size=images_BHWC.shape[1]))
    return plain_step(model, lambda model, images: model(images), images_BHWC, precision, **form)
