"""Count on paper the FLOPs of one image: print the tables of docs/performance.md.

    python benchmarks/arithmetic.py             # the formulas
    python benchmarks/arithmetic.py --count     # beside torch's count of a real step: minutes on a CPU, 12 GB

Nothing here is a measurement of speed.
"""

# T tokens, Q of them that ask, D width, L patches, K visible, M masked, S of them for the teacher, A values per patch,
# E contrastive width

import argparse
from dataclasses import dataclass

from ccmim_fast.config.keys import build, flatten
from ccmim_fast.config.schema import Config
from ccmim_fast.registry import SCORE_SOURCES

E = 256  # heads.dim
DECODER_WIDTH = 512
FLASH = 2.5  # attention's backward in forwards: it computes the scores again; torch counts so too


@dataclass(frozen=True)
class Vit:
    """Attributes: timm's name; width, depth; `patch` pixels a side; `image` pixels a side."""

    arch: str
    width: int
    depth: int
    patch: int = 16
    image: int = 224

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


VITS = {
    "ViT-S/16": Vit("vit_small_patch16_224", 384, 12),
    "ViT-B/16": Vit("vit_base_patch16_224", 768, 12),
    "ViT-L/16": Vit("vit_large_patch16_224", 1024, 24),
    "ViT-H/14": Vit("vit_huge_patch14_224", 1280, 32, patch=14),
}

# Score source, decoder blocks, and the share of the masked set that the teacher sees, if it is not all; MAE scores
# nothing and has no masked branch.
METHODS = {
    "MAE-8": ("none", 8),
    "MAE-2": ("none", 2),
    "ccMIM `first`": ("first", 2),
    "ccMIM `bank`": ("bank", 2),
    "ccMIM `bank`, tokens 1/3": ("bank", 2, 1 / 3),
    "ccMIM `all`": ("all", 2),
    "ccMIM `all`, 8 blocks": ("all", 8),
}


def block(T: int, D: int, Q: int | None = None, backward: bool = True) -> float:
    """FLOPs of a block in which Q of T tokens ask (None: all): keys, values 4TD^2, the rest 20QD^2, attention 4QTD."""
    Q = T if Q is None else Q
    products, attention = 4 * T * D**2 + 20 * Q * D**2, 4 * Q * T * D
    return 3 * products + (1 + FLASH) * attention if backward else products + attention


def parts(vit: Vit, source: str, decoder_blocks: int, tokens: float = 1.0) -> dict[str, float]:
    """FLOPs of one image and step by part: products and attention; without the loss of the contrastive half."""
    L, D, n, d = vit.patches, vit.width, vit.depth, DECODER_WIDTH
    K = L // 4
    M, A = L - K, 3 * vit.patch**2
    found = {
        # Pixels need no gradient, masked patches give none.
        "embedding": 2 * (L + K) * A * D,
        "visible": n * block(K + 1, D),
        "decoder": 3 * 2 * (K + 1) * D * d
        + (decoder_blocks - 1) * block(L + 1, d)
        + block(L + 1, d, Q=M)
        + 3 * 2 * M * d * A,
    }
    if source == "none":
        return found
    head = 2 * D * D + 2 * D * E
    S = round(M * tokens)
    found["masked"] = (n - 1) * block(S + 1, D, backward=False) + block(S + 1, D, Q=1, backward=False)
    found["heads"] = 3 * head + head
    found["score"] = SCORE_SOURCES[source].flops(L, D, n, 0)
    return found


def config_of(vit: Vit, source: str, decoder_blocks: int, tokens: float = 1.0, *, precision: str = "fp32") -> Config:
    """The run that `parts` describes."""
    settings = {
        "model.arch": vit.arch,
        "data.image_size": (vit.image, vit.image),
        "decoder.depth": decoder_blocks,
        "teacher.tokens": tokens,
        "train.precision": precision,
        # Whose backward pass the formula counts.
        "train.attention": "sdpa",
        **({"mask.strategy": "random", "contrast.loss": "none"} if source == "none" else {"score.source": source}),
    }
    return build(flatten(Config()) | settings)


def counted(vit: Vit, *method) -> float:
    """FLOPs of one image by torch's counter, over a forward and backward pass of two images on the CPU."""
    import torch

    from ccmim_fast.build.model import build_model, build_objective
    from ccmim_fast.profile.meter import flop_counter

    config = config_of(vit, *method)
    model = build_model(config).train()
    objective = build_objective(config, model)
    images_BHWC = torch.randint(0, 256, (2, vit.image, vit.image, 3), dtype=torch.uint8)
    with flop_counter() as counter:
        objective(model(images_BHWC, torch.arange(2), 0), images_BHWC).total.backward()
    return counter.get_total_flops() / 2


def block_parameters(width: int) -> int:
    """Of a transformer block."""
    return 12 * width**2 + 13 * width


def parameters(vit: Vit, source: str = "all", decoder_blocks: int = 2) -> int:
    """Trainable ones: each has a gradient that ranks exchange."""
    D, d, A = vit.width, DECODER_WIDTH, 3 * vit.patch**2
    # Patch projection with bias, [CLS], blocks, last norm; and projection, mask token, blocks, last norm, prediction.
    encoder = A * D + D + D + vit.depth * block_parameters(D) + 2 * D
    decoder = D * d + d + d + decoder_blocks * block_parameters(d) + 2 * d + d * A + A
    heads = 0 if source == "none" else D * D + 2 * D + D * E
    return encoder + decoder + heads


RATE = 0.5 * 800e12  # FLOP/s: half of what is assumed for a large bf16 product on an H100


def lines(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def arithmetic_table() -> str:
    rows = []
    for name, method in METHODS.items():
        rows.append([name, *(f"{sum(parts(vit, *method).values()) / 1e9:.1f}" for vit in VITS.values())])
    return lines(["GFLOP per image", *VITS], rows)


def parts_table(name: str = "ViT-B/16") -> str:
    names = ("embedding", "score", "visible", "masked", "heads", "decoder")
    rows = []
    for method, choice in METHODS.items():
        found = parts(VITS[name], *choice)
        rows.append([method, *(f"{found[part] / 1e9:.1f}" if part in found else "-" for part in names)])
    return lines([name, *names], rows)


def count_table() -> str:
    rows = []
    for name, vit in VITS.items():
        for method, choice in METHODS.items():
            formula, torch_s = sum(parts(vit, *choice).values()), counted(vit, *choice)
            difference = f"{torch_s / formula - 1:+.2%}"
            rows.append([f"{name}, {method}", f"{formula / 1e9:.2f}", f"{torch_s / 1e9:.2f}", difference])
            print(rows[-1], flush=True)
    return lines(["GFLOP per image", "formula", "torch", "difference"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", action="store_true", help="count real steps too")
    chosen = parser.parse_args()
    tables = [arithmetic_table(), parts_table()]
    print("\n\n".join([*tables, count_table()] if chosen.count else tables))
