"""docs/architectures.md is what this program prints: `make architectures`. One name of each structure trained a step.

A structure is what a small model of a name prints of itself, but for its numbers. The step is that of `ccmim_vit_base`:
importance masks by the score bank, both passes, forward and backward, at a small width and depth.
"""

import re
from collections import defaultdict
from importlib.metadata import version
from typing import NamedTuple

import timm
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from ccmim_fast.build.model import build_model, build_objective
from ccmim_fast.config.load import load_config
from ccmim_fast.config.validate import STEM_MODULES, VIT_MODULES
from ccmim_fast.errors import ConfigError

HEAD = """# Architectures

`model.arch` takes timm's names of its classes VisionTransformer, VisionTransformerDistilled and Eva. This page lists
all of them. Of each structure one name was trained for a step at a small width: masks by the score bank, forward and
backward, a finite gradient in every weight. `make architectures` writes the page anew, and a test holds it.

Every encoder gets a [CLS] token, which scores and the contrast need. Names without one (`gap`, SigLIP, AIMv2) train
with one token more than their published weights have. Registers and DeiT's token of distillation stand behind it; the
decoder does not see them. Heads and pooling are left out; where timm has a norm behind the pooling (`fc_norm`), it is
one of all tokens here.

Fixed sine-cosine positions stand in place of those that an architecture adds to its patches; rotary ones stay.

Blocks that are neither timm's `Block` with its `Attention` nor its `EvaBlock` are slower: their last one computes all
tokens, and a named `train.attention` and `train.recompute` are refused.

## Parts of one's own

These settings stand in place of a part of the architecture, which stays by default. Runs, exports and imports carry
them.

| setting | in the encoder | has weight decay |
|---|---|---|
| `model.positions=learned` | positions are trained, from N(0, 0.02); the decoder's stay fixed | no |
| `model.positions=rope` | rotary positions alone, of a plain ViT or of the Eva family | no |
| `model.registers=4` | so many register tokens (`reg_token`), from N(0, 0.02) | with `optim.decay_tokens` |
| `model.layer_scale=1e-5` | factors of what attention and MLP add (`ls1.gamma`, `ls2.gamma`) | no |
| `model.qk_norm=true` | a norm of each head's queries and keys; scores are read behind it | no |
| `model.mlp=swiglu` | timm's `SwiGLUPacked`; `gelu`: its `Mlp` with GELU | yes |

An MLP with gates has 2/3 of the hidden channels of one without, rounded up to a multiple of 8, and so as many weights.
An architecture that has no place for a part, or rotary positions alone, is refused with a line that says so.

## Names
"""
MODULES = VIT_MODULES + STEM_MODULES
SMALL = ["--model.patch_size=8", "--model.embed_dim=48", "--model.depth=2", "--model.num_heads=3"]
SMALL += ["--data.image_size=[16,24]", "--decoder.dim=16", "--decoder.num_heads=2", "--decoder.depth=1"]
SMALL += ["--heads.dim=8", "--train.batch_size=4", "--train.device=cpu", "--train.precision=fp32"]


class Row(NamedTuple):
    """A row says what comes of names whose encoders look alike."""

    kind: str  # class of timm's
    blocks: str
    positions: str
    trains: str  # "yes", or why not
    names: tuple[str, ...]


def names() -> list[str]:
    """Return all names that timm lists in modules of these classes."""
    return sorted(name for module in MODULES for name in timm.list_models(module=module))


def structures() -> dict[tuple, list[str]]:
    """Return the names by structure; the first three entries of a key are those of a `Row`."""
    found = defaultdict(list)
    for name in names():
        with torch.device("meta"):
            try:
                vit = timm.create_model(name, num_classes=0, depth=2)
            except (TypeError, AssertionError, ValueError, IndexError):  # a list for each block
                vit = timm.create_model(name, num_classes=0)
        tokens = tuple(getattr(vit, token, None) is None for token in ("cls_token", "reg_token", "dist_token"))
        half = any(getattr(part, "rotate_half", False) for part in vit.modules())
        key = type(vit).__name__, blocks_of(vit), positions_of(vit)
        found[(*key, vit.no_embed_class, half, tokens, re.sub(r"\d+", "#", repr(vit)))].append(name)
    return dict(found)


def blocks_of(vit: nn.Module) -> str:
    """Return block, attention and MLP in the names of their classes, and the stem where it is a network."""
    block = vit.blocks[0]
    attention = next((type(part).__name__ for part in block.modules() if hasattr(part, "qkv")), "")
    mlp = next((type(part).__name__ for part in block.modules() if isinstance(part, (Mlp, GluMlp, SwiGLU))), "")
    words = [type(block).__name__, attention, mlp, "norm of queries and keys" * _has(block, "q_norm")]
    words += ["layer scale" * (_has(block, "ls1") or _has(block, "ls") or _has(block, "gamma_1"))]
    stem = type(vit.patch_embed).__name__
    return ", ".join([word for word in words if word] + [stem] * (stem != "PatchEmbed"))


def _has(block: nn.Module, part: str) -> bool:
    return any(name.split(".")[-1] == part or f".{part}." in f".{name}" for name, _ in block.named_parameters())


def positions_of(vit: nn.Module) -> str:
    """Return whether positions are added to patches, rotate queries and keys, or both."""
    kinds = ["added" * (vit.pos_embed is not None), "rotary" * (getattr(vit, "rope", None) is not None)]
    return " and ".join(filter(None, kinds)) or "none"


def trained(name: str, *options: str) -> str:
    """Train a small encoder for a step; return "yes", or what the user is told. Anything else is raised."""
    try:
        config = load_config([f"--model.arch={name}", *SMALL, *options], "ccmim pretrain")
        torch.manual_seed(0)
        model = build_model(config)
    except ConfigError as error:
        return str(error).replace(f"model.arch={name}", "").lstrip(": ")
    images_BHWC = torch.randint(0, 256, (4, 16, 24, 3), dtype=torch.uint8)
    output = model.train()(images_BHWC, torch.arange(4), 0)
    build_objective(config, model)(output, images_BHWC).total.backward()
    without = [key for key, one in model.named_parameters() if one.requires_grad and one.grad is None]
    broken = [key for key, one in model.named_parameters() if one.grad is not None and not one.grad.isfinite().all()]
    assert not without, f"{name}: no gradient in {without[0]}"
    assert not broken, f"{name}: {broken[0]} is not finite"
    if config.score.source == "bank" and output.cls_attention_BL is not None:
        assert output.cls_attention_BL.isfinite().all()
        assert output.cls_attention_BL.std() > 0, f"{name}: every patch has one score"
    return "yes"


def rows(of: dict[tuple, list[str]]) -> list[Row]:
    """Train one name of each structure, and return what came of it."""
    merged = defaultdict(list)
    for key, alike in of.items():
        merged[(*key[:3], trained(alike[0]))] += alike
    return sorted(Row(*key, tuple(sorted(alike))) for key, alike in merged.items())


def counts(found: list[Row]) -> dict[str, tuple[int, int]]:
    """Return for each class of encoders without a convolutional stem how many names train, and how many there are."""
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in found:
        kind = f"{row.kind} behind a convolutional network" if "HybridEmbed" in row.blocks else row.kind
        total[kind][0] += len(row.names) * (row.trains == "yes")
        total[kind][1] += len(row.names)
    return {kind: tuple(pair) for kind, pair in total.items()}


def page(found: list[Row]) -> str:
    """Return the text of docs/architectures.md."""
    lines = [HEAD, f"Trained with timm {version('timm')}.", "", "| class | names | train |", "|---|---|---|"]
    lines += [f"| {kind} | {of} | {train} |" for kind, (train, of) in counts(found).items()]
    lines += ["", "| class | block, attention, MLP | positions | trains | names |", "|---|---|---|---|---|"]
    for row in found:
        shown = ", ".join(f"`{name}`" for name in row.names)
        lines.append(f"| {row.kind} | {row.blocks} | {row.positions} | {row.trains} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(rows(structures())), end="")
