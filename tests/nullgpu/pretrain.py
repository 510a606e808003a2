"""This script pretrains on the null device: `pretrain.py SETTINGS`; it tells the exit code, and kernels by name."""

import sys

from nullgpu.counters import bools_are, counted, tell, without_cudnn

from ccmim_fast.cli import main
from ccmim_fast.engine import pretraining


def main_here(settings: list[str]) -> None:
    without_cudnn()
    build = pretraining.build_step

    def build_step(*arguments):
        # A capturable optimizer asks its rate on the device whether it is positive.
        with bools_are(True):
            return build(*arguments)

    pretraining.build_step = build_step
    with counted() as counts:
        code = main(["pretrain", *settings])
    tell("code", code)
    tell("kernels", sorted(counts.names("kernel")))


if __name__ == "__main__":
    main_here(sys.argv[1:])
