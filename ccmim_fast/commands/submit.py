"""`ccmim submit`: a pretraining run as a job of Slurm."""

import argparse
import re
import sys

from ccmim_fast.commands.pretrain import pretrain
from ccmim_fast.config.load import make_config, presets
from ccmim_fast.config.parser import Parser, whole_number, words
from ccmim_fast.errors import ConfigError, exit_code_of
from ccmim_fast.ranks.slurm import NOTICE, Job, become_rank, check_job, sbatch_script, submit_job

_HELP = """
Carry out ccmim pretrain as a job of Slurm. The settings are checked first. A job that starts again goes on from the
newest checkpoint: run.resume=auto.
"""


def submit(argv: list[str]) -> None:
    """Hand in the job, or print the file for sbatch."""
    parser = Parser("ccmim submit", _HELP)
    count = whole_number(1, 999_999)
    parser.add_argument("--nodes", type=count, default=1, help="machines")
    parser.add_argument("--gpus-per-node", type=count, default=1, help="ranks on each node")
    parser.add_argument("--cpus-per-gpu", type=count, default=8, help="cores for a rank's images")
    parser.add_argument("--time", type=_clock, default="24:00:00", metavar="HH:MM:SS", help="limit of the job's time")
    parser.add_argument("--partition", type=_word, help="if not given: Slurm's default")
    parser.add_argument("--account", type=_word, help="if not given: Slurm's default")
    parser.add_argument(
        "--requeue", action=argparse.BooleanOptionalAction, default=True, help="queue again until the run is done"
    )
    parser.add_argument("--print", action="store_true", help="print the file for sbatch, submit nothing")
    parser.add_settings(presets=presets())
    given = vars(parser.parse_args([word for word in argv if word != "--"]))  # which may stand before the settings
    settings, printing = given.pop("settings"), given.pop("print")
    if not settings:
        raise ConfigError("ccmim submit: the settings are missing; write ccmim submit [options] -- --config NAME ...")
    config, job = make_config(settings), Job(**given)
    check_job(config, job)
    from ccmim_fast.runs.folder import check_apart, read_by

    check_apart(config.run.dir, read_by(config.data))
    settings = words({**settings, "run.resume": "auto"})
    if printing:
        print(sbatch_script(config, job, settings))
    else:
        handed_in = submit_job(pretrain_rank, config, job, settings)
        print(f"job {handed_in.job_id}; what it prints goes to {handed_in.paths.stdout}")


def pretrain_rank(settings: list[str]) -> None:
    """Carry out `ccmim pretrain` as one task of the job, with the command's exit code."""
    become_rank()
    sys.argv = ["ccmim", "pretrain", *settings]  # for the run's record of its command
    # A task that exits, with code 0 too, has no result for submitit: it counts as failed.
    if code := exit_code_of(lambda: pretrain(settings)):
        sys.exit(code)


def _clock(text: str) -> str:
    parts = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d)", text, re.ASCII)
    if not parts or 3600 * int(parts[1]) + 60 * int(parts[2]) + int(parts[3]) <= NOTICE:
        raise argparse.ArgumentTypeError(
            f"{text!r:.20} must be HH:MM:SS and more than {NOTICE} seconds, such as 24:00:00"
        )
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[\w.,+-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r:.80} must be letters, digits and .,+-_")
    return text
