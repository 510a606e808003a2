"""MAE by `lightly`: its masked timm encoder and its decoder, put together as its documentation's MAE example does."""

# B batch, H height, W width, C channels, T tokens, K visible, M masked, D width, P values per patch

import warnings
from collections.abc import Callable

import timm
import torch.nn.functional as F
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from plain_step import normalised, plain_step
from torch import Tensor, nn


class MAE(nn.Module):
    def __init__(self, vit: nn.Module):
        super().__init__()
        self.patch = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        with warnings.catch_warnings():
            # From 1.6 on it names a successor for 1.7; what it computes is the same.
            warnings.simplefilter("ignore", FutureWarning)
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches, patch_size=self.patch, embed_dim=vit.embed_dim
            )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The loss, a scalar."""
        size = (len(images_BCHW), self.backbone.sequence_length)
        keep_BK, mask_BM = utils.random_token_mask(size=size, mask_ratio=0.75, device=images_BCHW.device)
        visible_BKD = self.decoder.embed(self.backbone.encode(images=images_BCHW, idx_keep=keep_BK))
        tokens_BTD = utils.repeat_token(self.decoder.mask_token, size)
        tokens_BTD = utils.set_at_index(tokens_BTD, keep_BK, visible_BKD.type_as(tokens_BTD))
        masked_BMD = utils.get_at_index(self.decoder.decode(tokens_BTD), mask_BM)
        # Token 0 is [CLS], so token i is patch i - 1.
        target_BMP = utils.get_at_index(utils.patchify(images_BCHW, self.patch), mask_BM - 1)
        return F.mse_loss(self.decoder.predict(masked_BMD), target_BMP)


def build(arch: str, images_BHWC: Tensor, precision: str) -> Callable[[], Tensor]:
    """The contract of throughput.py."""
    vit = timm.create_model(arch, num_classes=0, img_size=images_BHWC.shape[1])
    model = MAE(vit).to(images_BHWC.device).train()
    images_BCHW = normalised(images_BHWC)
    return plain_step(model, lambda: model(images_BCHW), precision)
