"""kNN and logistic regression on the features of frozen encoders."""

# N images of all ranks, S of this rank's share, D width

import torch
import torch.distributed as dist
from torch import Tensor

from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.frozen.features import extract
from ccmim_fast.evaluation.frozen.knn import knn_accuracies
from ccmim_fast.evaluation.frozen.logreg import logreg_accuracy
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.job import Job
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.ranks.session import broadcast

_BATCH = 256  # images encoded at once by a rank


def knn(job: Job) -> dict[str, float]:
    """Accuracy by the number of neighbours."""
    ks, images = job.config.knn.k, usable_count(job.train.source)
    if max(ks) > images:
        raise ConfigError(f"knn.k={max(ks)}: must be at most the {images} training images; nearest valid is {images}")
    train_SD, train_labels_S = features(job, job.train)
    test_ND, test_labels_N = of_all_ranks(*features(job, job.test), usable_count(job.test.source))
    on_device = [t.to(job.here.device) for t in (train_SD, train_labels_S, test_ND, test_labels_N)]
    found = knn_accuracies(*on_device, ks, job.config.knn.temperature)
    return {f"k={k}": accuracy for k, accuracy in found.items()}


def logreg(job: Job) -> dict[str, float]:
    """Accuracy; fitted by the first rank."""
    train = of_all_ranks(*features(job, job.train), usable_count(job.train.source))
    test = of_all_ranks(*features(job, job.test), usable_count(job.test.source))
    accuracy = logreg_accuracy(*train, *test, job.config.logreg.c)[0] if job.here.is_main else None
    return {"accuracy": broadcast(accuracy)}


def features(job: Job, images: Images) -> tuple[Tensor, Tensor]:
    """Features [S, D] float32 and labels [S] of this rank's share, every `world_size`-th image; on the CPU."""
    config, here = job.config, job.here
    encoder = job.frozen_encoder()
    precision = choose_precision(config.train.precision, here.device)

    def encode(images_BHWC: Tensor) -> Tensor:
        with precision.autocast(here.device):
            return encoder(images_BHWC)

    batches = evaluation_batches(
        images.source,
        config.data.image_size,
        _BATCH,
        here.device,
        config.data.workers,
        central=config.data.test_crop,
        part=(here.rank, here.world_size),
    )
    if config.model.pool == "cls" and not encoder.prefix:
        raise ConfigError(f"model.pool=cls: {job.weights.arch} has no [CLS] token; nearest valid is avg")
    return extract(encode, batches, prefix=encoder.prefix, pool=config.model.pool)


def of_all_ranks(features_SD: Tensor, labels_S: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """All `images` in their order, on every rank's CPU, from shares of every `world_size`-th one."""
    if not dist.is_initialized():
        return features_SD, labels_S
    world = dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else features_SD.device
    joined = []
    for share in (features_SD, labels_S):
        # A rank may have one less than the first: a row that is cut off again at the end.
        padded = share.new_zeros(-(-images // world), *share.shape[1:])
        padded[: len(share)] = share
        shares = [torch.empty_like(padded, device=device) for _ in range(world)]
        dist.all_gather(shares, padded.to(device))
        joined.append(torch.stack(shares, dim=1).flatten(0, 1)[:images].cpu())
    return joined[0], joined[1]
