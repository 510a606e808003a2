"""A vision transformer names every pixel: blocks of a plain ViT -> four scales -> UPerNet."""

# B batch, H height, W width of images, h w of the patches' grid, D width, E decoder's width, K classes

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import OUTPUTS, keep_blocks_, maps_of
from ccmim_fast.evaluation.job import Job

_AUXILIARY = 2  # which of the four scales the second classifier looks at


class Neck(nn.Module):
    """Four maps [B, D, h, w] -> [B, D, 4 h, 4 w], [B, D, 2 h, 2 w], [B, D, h, w] and [B, D, h / 2, w / 2] (BEiT)."""

    def __init__(self, width: int):
        super().__init__()
        twice = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(3)]
        four_times = nn.Sequential(twice[0], nn.BatchNorm2d(width), nn.GELU(), twice[1])
        self.scales = nn.ModuleList([four_times, twice[2], nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [scale(map_BDhw) for scale, map_BDhw in zip(self.scales, maps)]


class Segmenter(nn.Module):
    """uint8 images [B, 3, H, W] of the size the ViT was built for -> logits [B, K, H, W].

    In training mode a pair of them, the second from the auxiliary classifier. Images are normalised here, by `mean` and
    `std` per channel on a 0..1 scale. The final norms, pooling and head of `vit` are taken away. `dropout` is of whole
    channels, before the classifiers, whose weights begin with a deviation of `init_std`.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        classes: int,
        *,
        decoder_dim: int,
        auxiliary_dim: int,
        dropout: float,
        init_std: float,
    ):
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        super().__init__()
        width, self.vit, self.out_indices = vit.embed_dim, vit, keep_blocks_(vit, OUTPUTS)
        self.neck = Neck(width)
        # Takes six maps, and leaves out the first two: an image's own resolution and half of it.
        self.decoder = UPerNetDecoder([0, 0, *4 * [width]], encoder_depth=5, decoder_channels=decoder_dim)
        self.auxiliary = nn.Sequential(
            nn.Conv2d(width, auxiliary_dim, 3, padding=1, bias=False), nn.BatchNorm2d(auxiliary_dim), nn.ReLU()
        )
        for part in [*self.decoder.modules(), *self.auxiliary]:
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        self.classifier = _classifier(decoder_dim, classes, dropout, init_std)
        self.auxiliary_classifier = _classifier(auxiliary_dim, classes, dropout, init_std)
        self.register_buffer("mean_C11", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std_C11", 255 * torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pixels_BCHW = (images_BCHW - self.mean_C11) / self.std_C11
        scales = self.neck(maps_of(self.vit, self.out_indices, pixels_BCHW))
        logits_BKHW = self._at_pixels(self.classifier(self.decoder([None, None, *scales])), images_BCHW)
        if not self.training:
            return logits_BKHW
        coarse_BKhw = self.auxiliary_classifier(self.auxiliary(scales[_AUXILIARY]))
        return logits_BKHW, self._at_pixels(coarse_BKhw, images_BCHW)

    @staticmethod
    def _at_pixels(logits_BKhw: Tensor, images_BCHW: Tensor) -> Tensor:
        return F.interpolate(logits_BKhw, images_BCHW.shape[-2:], mode="bilinear", align_corners=False)

    def new_parts(self) -> list[nn.Module]:
        """Return what is trained from scratch: all but the encoder."""
        return [part for part in self.children() if part is not self.vit]


def _classifier(width: int, classes: int, dropout: float, init_std: float) -> nn.Sequential:
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=init_std)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


def build_segmenter(job: Job) -> nn.Module:
    """Build a `Segmenter`; on many GPUs its BatchNorms are synchronised. Raises ConfigError: settings do not fit."""
    config, segment = job.config, job.config.segment
    vit = job.build_encoder(drop_path=config.model.drop_path, plain=True)
    size, patch, batch = config.data.image_size, vit.patch_embed.patch_size, config.train.batch_size
    near = [max(2, round(side / of_patch)) * of_patch for side, of_patch in zip(size, patch)]
    if list(size) != near:
        raise ConfigError(
            f"data.image_size={list(size)}: must be whole patches of {patch[0]} pixels, two at least a side; "
            f"nearest valid is {near}"
        )
    # torch's SyncBatchNorm runs on GPUs only; elsewhere each rank has statistics of its own.
    synced = job.here.world_size > 1 and job.here.device.type == "cuda"
    parts = config.train.accumulate * job.here.world_size
    if not synced and batch // parts < 2:
        raise ConfigError(
            f"train.batch_size={batch}: BatchNorm needs two images in each of {parts} micro-batches; "
            f"nearest valid is {2 * parts}"
        )
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
