"""The ablations: the variants that each compares, by name, with the settings that make them on top of a base."""

from collections.abc import Callable
from typing import NamedTuple

from ccmim_fast.config.schema import Config

Variants = dict[str, list[str]]
# What a base may have, and strategies without scores refuse.
ALL_BY_SCORES = ["--mask.hints=0", "--mask.importance=1", "--score.temperature=1"]
RANDOM = ["--mask.strategy=random", *ALL_BY_SCORES]
MAE = {"MAE": [*RANDOM, "--contrast.loss=none"]}


class Ablation(NamedTuple):
    """One question."""

    title: str  # of its page
    variants: Callable[[Config], Variants]  # settings by name, on top of a base
    lines: tuple[str, ...]  # variants whose way is drawn, too
    compared: tuple[tuple[str, str], ...]  # pairs whose difference is given, run by run with the same seed
    time_of: str = ""  # a variant in whose time the slower ones are trained once more; empty: none
    # Variant -> the curve it is a point of, and its place there; None: variants stand beside each other.
    axis: Callable[[str], tuple[str, float] | None] | None = None


def score_variants(base: Config) -> Variants:
    """Vary the source of the scores, of which the paper says Eq. 4 alone, and the bank's settings, one at a time."""
    found = {**MAE, "random": RANDOM, "first": ["--score.source=first"]}
    if not (depth := base.model.depth):
        # Seconds to import, which `ccmim ablate --help` need not wait for.
        import timm
        import torch

        with torch.device("meta"):
            depth = len(timm.create_model(base.model.arch).blocks)
    for block in range(1, depth):
        found[f"block {block}"] = ["--score.source=block", f"--score.block={block}"]
    found |= {"all": ["--score.source=all"], "all, temperature 2": ["--score.source=all", "--score.temperature=2"]}
    found["bank"] = ["--score.source=bank"]
    changes = {
        "momentum": ("0", "0.25", "0.75", "0.9"),
        "temperature": ("0.5", "2", "4"),
        "grid": ("4", "8", "32"),
        "blocks": ("1", "2"),
        "unseen": ("random",),
    }
    for key, values in changes.items():
        for value in values:
            found[f"bank, {key} {value}"] = [*found["bank"], f"--score.{key}={value}"]
    return found


def strategy_variants(base: Config) -> Variants:
    """Table 5: how patches are divided, with the base's own losses and scores; and the authors' code's noise."""
    names = ("random", "block", "importance", "importance_sampling")
    found = MAE | {name.replace("_", " "): [f"--mask.strategy={name}", *ALL_BY_SCORES] for name in names}
    return found | {"importance, uniform noise": [*found["importance sampling"], "--mask.noise=uniform"]}


def lambda_variants(base: Config) -> Variants:
    """Figure 2: lambda of Eq. 10 with both losses, from no regularisation on."""
    found = {**MAE, "lambda 0": ["--contrast.weight=0"]}
    for name, loss in (("NCE", "nce"), ("align", "align")):
        for weight in (0.1, 0.2, 0.5, 0.8, 1.0):
            found[f"{name}, lambda {weight:g}"] = [f"--contrast.loss={loss}", f"--contrast.weight={weight}"]
    return found


def lambda_of(variant: str) -> tuple[str, float] | None:
    """("NCE", 0.2) of "NCE, lambda 0.2"; None of what has no loss of its own."""
    loss, _, weight = variant.rpartition(", lambda ")
    return (loss, float(weight)) if loss else None


def decoder_variants(base: Config) -> Variants:
    """Blocks of the decoder: the paper has 2, MAE and the authors' code 8."""
    return {f"{depth} block{'s' * (depth > 1)}": [f"--decoder.depth={depth}"] for depth in (1, 2, 4, 8)}


def heads_variants(base: Config) -> Variants:
    """Vary the initial weights of projector and predictor."""
    return {init: [f"--heads.init={init}"] for init in ("torch", "xavier")}


def teacher_variants(base: Config) -> Variants:
    """Vary the share of the masked patches that the teacher sees, with scores from the bank and with random masks."""
    ways = {"bank": ["--score.source=bank"], "random": RANDOM}
    shares = {"all": "1", "half": "0.5", "a third": "0.3333", "a fifth": "0.2", "a tenth": "0.1"}
    return {
        f"{way}, {words}": [*how, f"--teacher.tokens={t}"] for way, how in ways.items() for words, t in shares.items()
    }


def division_variants(base: Config) -> Variants:
    """Vary how strictly the masks follow the bank's scores: hints, a share at random, temperature, over epochs too."""
    found = {**MAE, "random": RANDOM, "bank": ["--score.source=bank", *ALL_BY_SCORES]}
    changes = {
        "mask.hints": ("0.1", "0.3"),
        "mask.importance": ("0.25", "0.5", "0.75", "[0,0.5]"),
        "score.temperature": ("2", "4", "[4,1]"),
    }
    for key, values in changes.items():
        for value in values:
            words = value.strip("[]").replace(",", " to ")
            found[f"{key.rpartition('.')[2]} {words}"] = [*found["bank"], f"--{key}={value}"]
    return found


ABLATIONS = {
    "score": Ablation(
        "Where scores come from", score_variants, ("random", "first", "all", "bank"), (("bank", "all"),), "bank"
    ),
    "strategy": Ablation(
        "How patches are divided",
        strategy_variants,
        ("random", "block", "importance", "importance sampling"),
        (("importance sampling", "random"), ("importance sampling", "importance"), ("importance sampling", "MAE")),
    ),
    "lambda": Ablation(
        "How much the contrast counts",
        lambda_variants,
        ("lambda 0", "NCE, lambda 0.2", "NCE, lambda 1", "align, lambda 0.2"),
        (("NCE, lambda 0.2", "lambda 0"), ("NCE, lambda 0.2", "NCE, lambda 1"), ("NCE, lambda 0.2", "MAE")),
        axis=lambda_of,
    ),
    "decoder": Ablation(
        "How deep the decoder is", decoder_variants, ("1 block", "2 blocks", "8 blocks"), (("2 blocks", "8 blocks"),)
    ),
    "heads": Ablation("How the contrastive heads begin", heads_variants, ("torch", "xavier"), (("xavier", "torch"),)),
    "teacher": Ablation(
        "How much the teacher sees",
        teacher_variants,
        ("bank, all", "bank, a third", "bank, a fifth", "random, all", "random, a fifth"),
        (("bank, a third", "bank, all"), ("bank, a fifth", "bank, all"), ("random, a fifth", "random, all")),
        "bank, a fifth",
    ),
    "division": Ablation(
        "How strictly masks follow the scores",
        division_variants,
        ("random", "bank", "importance 0.5", "temperature 4"),
        tuple((name, other) for name in ("importance 0.5", "temperature 4") for other in ("bank", "random", "MAE")),
    ),
}
