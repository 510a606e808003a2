"""`ccmim eval`: a checkpoint measured by a published protocol, or what it looks at and hides, drawn."""

from ccmim_fast.commands import take_name

NAMES = {
    "knn": "nearest neighbours in frozen features",
    "logreg": "logistic regression on frozen features",
    "linear": "a linear classifier trained on frozen features",
    "attentive": "an attentive classifier trained on frozen features",
    "finetune": "all weights trained, classes of ImageNet",
    "transfer": "all weights trained, other classes: iNaturalist, Flowers-102",
    "detection": "Mask R-CNN on COCO",
    "segmentation": "UPerNet on ADE20K",
    "masks": "scores and masks, drawn and measured",
}


def evaluate(argv: list[str]) -> None:
    """Carry out one of `NAMES`."""
    take_name("ccmim eval", "evaluation", NAMES, argv, "CHECKPOINT [settings]")
    if argv[:1] == ["masks"]:
        from ccmim_fast.evaluation.masks.command import masks

        masks(argv[1:])
        return
    from ccmim_fast.evaluation.command import evaluate as run

    run(argv)
