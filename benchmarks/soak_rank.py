"""This script is a rank of the hour's run: `ccmim pretrain`, where a file can order gradients that are not finite.

    python -m torch.distributed.run ... benchmarks/soak_rank.py FOLDER [settings]

The file `FOLDER/rank_<RANK>` holds a number of steps: the loss of this rank's next ones becomes NaN.
"""

import os
import sys
from pathlib import Path

from ccmim_fast import cli
from ccmim_fast.engine.step import TrainStep


def obey(order: Path) -> None:
    """Spoil the steps that the file `order` asks for from now on; the file is removed when it is read."""
    losses, left = TrainStep.losses, 0

    def spoiled(self: TrainStep, *args):
        nonlocal left
        found, seen = losses(self, *args)
        if order.exists():
            left = int(order.read_text())
            order.unlink()
        if not left:
            return found, seen
        left -= 1
        return found._replace(total=found.total * float("nan")), seen

    TrainStep.losses = spoiled


if __name__ == "__main__":
    obey(Path(sys.argv[1]) / f"rank_{os.environ['RANK']}")
    sys.exit(cli.main(["pretrain", *sys.argv[2:]]))
