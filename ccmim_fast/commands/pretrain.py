"""`ccmim pretrain`: pretrain a vision transformer on images."""

from ccmim_fast.config.load import load_config


def pretrain(argv: list[str]) -> None:
    """Pretrain with the settings `argv`."""
    config = load_config(argv, "ccmim pretrain")
    from ccmim_fast.engine.pretraining import fit

    if config.data.source != "shapes":
        fit(config)
        return
    from ccmim_fast.evaluation.masks.objects import object_figures

    fit(config, more=object_figures)
