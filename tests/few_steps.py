"""A few steps of the smallest model, and what they give: to compare one way to run a step with another."""

import numpy as np
import torch
from tiny import images, tiny_config

from ccmim_fast.data.stream.batch import on_device
from ccmim_fast.ranks.session import Session


def config_for(score=(), contrast=(), model=(), decoder=(), mask=(), **train):
    return tiny_config(
        score=dict(score),
        contrast=dict(contrast),
        model=dict(model),
        decoder=dict(decoder),
        mask=dict(mask),
        optim={"clip_grad": 1.0, "ema_decay": 0.9},
        train={"batch_size": 4, "precision": "fp32", **train},
    )


def here(device):
    return Session(0, 1, device)


def batches(count, device):
    torch.manual_seed(1)
    ids_B, epochs_B, whole_B4 = np.arange(4), np.zeros(4), np.tile([0.0, 0.0, 1.0, 1.0], (4, 1))
    return [
        on_device(images(4).to(device), ids_B + 4 * i, epochs_B + i // 2, None, whole_B4, device) for i in range(count)
    ]


def trained(step, call=None, steps=4):
    """Results of some steps in two epochs, and the weights after them. Each step's maps are the next one's."""
    results, cells = [], step.config.score.grid
    maps = torch.zeros(4, cells, cells, dtype=torch.float16, device=step.device)
    for batch in batches(steps, step.device):
        result = (call or step)([batch._replace(maps_BGG=maps) if step.model.banked else batch], lr=1e-3)
        maps = result.seen[0].maps_BGG.clone() if step.model.banked else maps
        results.append([*(float(x) for x in result[:4]), float(result.gradients.norm), float(maps.double().sum())])
    return torch.tensor(results), {k: v.clone() for k, v in step.model.state_dict().items()}
