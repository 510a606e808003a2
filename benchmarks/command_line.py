"""The options that `throughput` and `ladder` share, and the jobs they make of them."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import Contender, ours_config
from measure import SMALL, Job

from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import CcmimError, ConfigError
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.ranks.session import open_session

# Settings that an option of the benchmark gives.
OWNED = {
    "config": "the contenders' own",
    "model.arch": "--arch",
    "data.image_size": "--image-size",
    "data.channels": "3 here",
    "train.batch_size": "--batch",
    "train.accumulate": "1 here",
    "train.precision": "--precision",
    "train.device": "--device",
}


def parser(name: str, description: str) -> Parser:
    made = Parser(f"ccmim bench {name}", description=description, allow_abbrev=False)
    made.epilog = "Any further --section.key=value is a setting of every contender of ours."
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    made.add_argument("--arch", default="vit_base_patch16_224", help="timm's name of a vision transformer")
    made.add_argument("--batch", type=int, help="images per step; default 16 on a CPU, 256 on CUDA")
    made.add_argument("--image-size", type=int, default=224, help="pixels per side")
    made.add_argument("--rounds", type=int, default=3, help="each with a process per contender, in turn")
    made.add_argument("--threads", type=int, default=2, help="on a CPU")
    made.add_argument("--out", type=Path, help="path of the results, without a suffix")
    return made


def parse(made: Parser, arguments: list[str]) -> argparse.Namespace:
    """The options, `auto` resolved; `settings` are those for ours.

    Raises:
        CcmimError: a mistake.
    """
    options, options.settings = made.parse_known_args(arguments)
    for given in options.settings:
        key = given.removeprefix("--").partition("=")[0]
        if key in OWNED:
            raise ConfigError(f"{made.prog}: {given}: is {OWNED[key]}")
    with open_session(options.device) as here:
        options.device = here.device.type
        options.precision = choose_precision(options.precision, here.device).name
    if options.batch is None:
        options.batch = 256 if options.device == "cuda" else 16
    for name, value, least in (
        ("batch", options.batch, SMALL),
        ("rounds", options.rounds, 1),
        ("threads", options.threads, 1),
    ):
        if value < least:
            raise ConfigError(f"{made.prog}: --{name}={value}: must be at least {least}")
    return options


def job_of(contender: Contender, options: argparse.Namespace, **more) -> Job:
    """What the process of `contender` is told; a wrong setting is found here, before any process.

    Raises:
        ConfigError: a setting, or the contender's precision.
    """
    # The settings given may be newer than another commit.
    settings = [*contender.settings, *([] if contender.peer or contender.commit else options.settings)]
    precision = contender.precision or options.precision
    choose_precision(precision, torch.device(options.device))
    if not contender.peer and not contender.commit:
        ours_config(settings, options.arch, (options.batch, options.image_size, options.image_size, 3), precision)
    return Job(
        settings=settings,
        without=list(contender.without),
        peer=contender.peer,
        arch=options.arch,
        batch=options.batch,
        image_size=options.image_size,
        device=options.device,
        precision=precision,
        threads=options.threads,
        **more,
    )


def run_main(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """`main`'s exit status; a user's mistake is one line on standard error."""
    try:
        return main(arguments)
    except CcmimError as error:
        print(f"ccmim: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
