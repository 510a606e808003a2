"""`ccmim eval`: a checkpoint measured by a published protocol, or what it looks at and hides, drawn."""


def evaluate(argv: list[str]) -> None:
    if argv[:1] == ["masks"]:
        from ccmim_fast.masks.command import masks

        masks(argv[1:])
        return
    from ccmim_fast.evaluation.command import evaluate as run

    run(argv)
