"""What an ablation compares: names and the settings that make each of them, on top of a base."""

from ccmim_fast.config.schema import Config


def score_variants(base: Config) -> dict[str, list[str]]:
    """Where scores come from, of which the paper says Eq. 4 alone, and the bank's settings, one changed at a time."""
    found = {
        "MAE": ["--mask.strategy=random", "--contrast.loss=none"],
        "random": ["--mask.strategy=random"],
        "first": ["--score.source=first"],
    }
    for block in range(1, base.model.depth or 12):
        found[f"block {block}"] = ["--score.source=block", f"--score.block={block}"]
    found |= {"all": ["--score.source=all"], "all, temperature 2": ["--score.source=all", "--score.temperature=2"]}
    changes = {
        "momentum": (0.0, 0.25, 0.75, 0.9),
        "temperature": (0.5, 2.0, 4.0),
        "grid": (4, 8, 32),
        "blocks": (1, 2),
        "unseen": ("random",),
    }
    bank = ["--score.source=bank"]
    found["bank"] = bank
    for key, values in changes.items():
        for value in values:
            found[f"bank, {key} {value:g}" if key != "unseen" else f"bank, {key} {value}"] = [
                *bank,
                f"--score.{key}={value}",
            ]
    return found
