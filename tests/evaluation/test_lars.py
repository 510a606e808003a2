"""MAE's LARS, written down from its paper's update rule, in float64, against what the linear probe trains with."""

import pytest
import torch
from torch import nn

from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.evaluation.probes import LinearHeads, build_head_optimizer


def by_hand(weight, bias, gradients, lr, momentum, trust, decay):
    """Matrices: g = gradient + decay w, times trust |w| / |g| where both are above 0; vectors as is. Then momentum."""
    values, moved = [weight.clone(), bias.clone()], [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in gradients:
        for i, gradient in enumerate(step):
            if gradient.ndim > 1:
                gradient = gradient + decay * values[i]
                w, g = values[i].norm(), gradient.norm()
                gradient = gradient * (trust * w / g if w > 0 and g > 0 else 1.0)
            moved[i] = momentum * moved[i] + gradient
            values[i] = values[i] - lr * moved[i]
    return values


@pytest.mark.parametrize(("rate", "decay"), [(1.0, 0.0), (3.0, 0.0), (1.0, 0.3)])
def test_equals_maes_rule_in_float64(rate, decay):
    """timm's Lars leaves rates alone at weight decay 0, and with decay adapts them to another length than MAE's."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    gradients = [(torch.randn(4, 5).double(), torch.randn(4).double()) for _ in range(7)]
    expected = by_hand(layer.weight.detach(), layer.bias.detach(), gradients, 6.4 * rate, 0.9, 0.001, decay)
    optimizer = build_head_optimizer(EvalOptimConfig(name="lars", weight_decay=decay), [(layer.parameters(), rate)])
    for step in gradients:
        for group in optimizer.param_groups:
            group["lr"] = 6.4 * group["lr_scale"]
        layer.weight.grad, layer.bias.grad = (gradient.clone() for gradient in step)
        optimizer.step()
    assert (layer.weight - expected[0]).abs().max() < 1.4e-12
    assert (layer.bias - expected[1]).abs().max() < 1.4e-12


def test_heads_that_train_together_train_as_each_alone():
    """Two rates at once give what each gives alone: no weight and no statistic is shared but those of the features."""
    features, labels = torch.randn(20, 3, 6).double(), torch.randint(4, (20, 3))

    def trained(rates):
        torch.manual_seed(1)
        head = LinearHeads(6, 4, 2, 0.01).double()
        kept = [(of_head.parameters(), rate) for of_head, rate in zip(head.linears, rates) if rate]
        optimizer = build_head_optimizer(EvalOptimConfig(name="lars"), kept)
        for x_BD, y_B in zip(features, labels):
            for group in optimizer.param_groups:
                group["lr"] = 10 * group["lr_scale"]
            logits_RBC = head(x_BD)
            asked = [i for i, rate in enumerate(rates) if rate]
            sum(nn.functional.cross_entropy(logits_RBC[i], y_B) for i in asked).backward()
            optimizer.step()
            optimizer.zero_grad()
        return head

    both, first, second = trained((1.0, 5.0)), trained((1.0, 0)), trained((0, 5.0))
    torch.testing.assert_close(both.linears[0].weight, first.linears[0].weight)
    torch.testing.assert_close(both.linears[1].weight, second.linears[1].weight)
    assert not torch.allclose(both.linears[0].weight, both.linears[1].weight)
