"""`ccmim demo`: ccMIM and MAE pretrained on made images, and compared."""

from rich.console import Console
from rich.table import Table

from ccmim_fast.config.load import make_config, settings_parser
from ccmim_fast.errors import ConfigError

COLUMNS = ("knn", "logreg", "auroc", "leakage", "recons", "images_per_second")


def demo(argv: list[str]) -> None:
    """Run the preset `demo`, changed by the settings `argv`."""
    config = make_config({"config": "demo", **settings_parser("ccmim demo").parse_args(argv).settings})
    if config.data.source != "shapes":
        raise ConfigError(f"data.source={config.data.source}: the demo needs known objects; nearest: shapes")
    from ccmim_fast.ablation.demo import run_demo

    methods, report = run_demo(config)
    table = Table("method", *COLUMNS)
    for name, figures in methods.items():
        table.add_row(name, *("-" if figures.get(key) is None else f"{figures[key]:.3f}" for key in COLUMNS))
    Console().print(table)
    print(f"\nReport: {report}")
