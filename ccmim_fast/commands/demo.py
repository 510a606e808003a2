"""`ccmim demo`: ccMIM and MAE pretrained on made images, and compared."""

from rich.console import Console
from rich.table import Table

from ccmim_fast.config.load import load_config, on_preset
from ccmim_fast.errors import ConfigError

COLUMNS = ("knn", "logreg", "auroc", "leakage", "recons", "images_per_second")


def demo(argv: list[str]) -> None:
    """Run the preset `demo`, changed by the settings `argv`."""
    config = load_config(on_preset("demo", argv), "ccmim demo")
    if config.data.source != "shapes":
        raise ConfigError(f"data.source={config.data.source}: the demo needs known objects; nearest: shapes")
    from ccmim_fast.ablation.demo import run_demo

    found = run_demo(config)
    table = Table("method", *COLUMNS)
    for name, figures in found.methods.items():
        table.add_row(name, *("-" if figures.get(key) is None else f"{figures[key]:.3f}" for key in COLUMNS))
    Console().print(table)
    print(f"\nReport: {found.report}")
