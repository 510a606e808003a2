"""Heads on frozen encoders: linear (MAE) and attentive (CAE)."""

# B batch, T tokens (prefix tokens first), D width, C classes, R heads

from collections.abc import Callable, Iterator, Sequence

import timm.optim
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.data.build import build_loader
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.frozen.features import pooled
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.evaluation.supervised import Classifier
from ccmim_fast.models.tokens import heads_of

Groups = Sequence[tuple[Iterator[nn.Parameter], float]]

TRUST = 0.001  # coefficient of LARS; MAE, util/lars.py


def linear(job: Job) -> Work:
    """Prepare the linear probe: one linear layer, or one for each of `head.rates`, all on the same batches."""
    pool, rates = job.config.model.pool, job.config.head.rates
    encoder = job.frozen_encoder()
    head = LinearHeads(encoder.width, job.test.classes, len(rates), job.config.head.init_std)

    @torch.no_grad()
    def inputs(images_BHWC: Tensor) -> Tensor:
        return encoder.norm(pooled(encoder(images_BHWC), encoder.prefix, pool))

    groups = [(linear_.parameters(), rate) for linear_, rate in zip(head.linears, rates)]
    return _prepared(job, head, inputs, groups, head_names(rates))


def head_names(rates: tuple[float, ...]) -> tuple[str, ...]:
    """Return the names of the figures of a linear probe's heads."""
    return ("accuracy",) if len(rates) == 1 else tuple(f"rate x {rate:.12g}" for rate in rates)


def attentive(job: Job) -> Work:
    """Prepare the attentive probe: a learned query attends to all tokens."""
    encoder = job.frozen_encoder(pools=False)
    heads = job.config.head.num_heads or heads_of(encoder.vit)
    if encoder.width % heads:
        raise ConfigError(f"head.num_heads={heads}: must be a divisor of the width {encoder.width}; nearest valid is 1")
    head = AttentiveHead(encoder.width, job.test.classes, heads, job.config.head.init_std)
    return _prepared(job, head, torch.no_grad()(encoder), [(head.parameters(), 1.0)], ("accuracy",))


class LinearHeads(nn.Module):
    """Pooled features [B, D] -> logits [R, B, C]: BatchNorm without affine, as in MAE, then R linear layers."""

    def __init__(self, width: int, classes: int, heads: int, init_std: float):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linears = nn.ModuleList(_classifier(width, classes, init_std) for _ in range(heads))

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = self.norm(x_BD)
        return torch.stack([linear_(x_BD) for linear_ in self.linears])

    @torch.no_grad()
    def folded(self, head: int) -> dict[str, Tensor]:
        """Return weight [C, D] and bias [C] float32 of the layer that gives one head's logits without the norm."""
        linear_ = self.linears[head].double()
        weight_CD = linear_.weight / (self.norm.running_var.double() + self.norm.eps).sqrt()
        bias_C = linear_.bias - weight_CD @ self.norm.running_mean.double()
        return {"weight": weight_CD.float(), "bias": bias_C.float()}


class AttentiveHead(nn.Module):
    """Tokens [B, T, D] -> logits [B, C]: attention pooling with one query, BatchNorm without affine, linear."""

    def __init__(self, width: int, classes: int, num_heads: int, init_std: float):
        super().__init__()
        self.pool = AttentionPoolLatent(width, out_features=0, num_heads=num_heads)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = _classifier(width, classes, init_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(self.norm(self.pool(x_BTD)))


def _classifier(width: int, classes: int, init_std: float) -> nn.Linear:
    linear_ = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear_.weight, std=init_std)
    nn.init.zeros_(linear_.bias)
    return linear_


def build_head_optimizer(optim: EvalOptimConfig, groups: Groups) -> torch.optim.Optimizer:
    """Build the optimizer of groups of parameters and what their rate is multiplied by.

    `lars` is MAE's: rates of matrices are adapted to the gradient with the decay in it, those of vectors are not and
    have no decay.
    """
    if optim.name == "adamw":
        split = [{"params": list(of_group), "lr_scale": scale} for of_group, scale in groups]
        return torch.optim.AdamW(split, lr=optim.base_lr, betas=optim.betas, weight_decay=optim.weight_decay)
    split = []
    for of_group, scale in groups:
        parameters = list(of_group)
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        split.append({"params": matrices, "lr_scale": scale, "weight_decay": optim.weight_decay})
        split.append({"params": vectors, "lr_scale": scale, "weight_decay": 0.0})
    if optim.name == "sgd":
        return torch.optim.SGD(split, lr=optim.base_lr, momentum=optim.momentum)
    for matrices in split[::2]:
        # timm's Lars leaves rates alone at weight decay 0 unless it is told to adapt, and adapts to |g| + decay |w|.
        matrices |= {"always_adapt": True, "decay": optim.weight_decay, "weight_decay": 0.0}
    lars = timm.optim.Lars(split, lr=optim.base_lr, momentum=optim.momentum, trust_coeff=TRUST, eps=0.0)
    lars.register_step_pre_hook(_add_decay)
    return lars


def _add_decay(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Add a group's `decay` times its weights to their gradients."""
    for group in optimizer.param_groups:
        if decay := group.get("decay"):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=decay)


def _prepared(
    job: Job, head: nn.Module, inputs: Callable[[Tensor], Tensor], groups: Groups, names: tuple[str, ...]
) -> Work:
    config, here, images = job.config, job.here, job.train
    head.to(here.device)
    division = {"accumulate": config.train.accumulate, "rank": here.rank, "world_size": here.world_size}
    loader = build_loader(images.source, images.data, config.seed, config.train.batch_size, here.device, **division)
    return Classifier(job, head, inputs, build_head_optimizer(config.optim, groups), loader, names).run
