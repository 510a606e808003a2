"""`ccmim submit`: a pretraining run as a job of Slurm, that saves before its time ends and is queued again.

By submitit, whose tasks are the ranks; or, with --print, as a plain file for sbatch, in which torchrun starts them.
Both ask Slurm for USR1 before the end. A run that it stopped says so in its state.json: the job then queues itself
again.
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

from ccmim_fast.config.load import load_config
from ccmim_fast.config.parser import Parser
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.runs.state import FILE

NOTICE = 120  # seconds before the end: for a step and ViT-H's checkpoint, 7.6 GB (three floats a weight) at 100 MB/s
_INSTALL = "pip install 'ccmim_fast[slurm]'"

# Slurm signals the tasks alone, not what they start (its proctrack/cgroup). torchrun ends at USR1 and takes its workers
# along: here it ignores the signal, which its workers get. TERM it passes on itself.
_ON_NODE = """on_node() {{
    trap '' USR1
    {torchrun} &
    agent=$!
    trap 'pkill -USR1 -P $agent' USR1
    trap 'kill -TERM $agent' TERM
    until wait $agent; code=$?; ! kill -0 $agent 2>/dev/null; do :; done
    exit $code
}}"""


def submit(argv: list[str]) -> None:
    """`ccmim submit [options] -- SETTINGS`: `ccmim pretrain SETTINGS` as a job of Slurm.

    The settings are checked first. A job that starts again goes on from the newest checkpoint: run.resume=auto.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    given = _parser().parse_args(argv[:end])
    if end == len(argv):
        raise ConfigError("ccmim submit: the settings are missing; write ccmim submit [options] -- --config NAME ...")
    config = load_config(argv[end + 1 :], "ccmim submit [options] --")
    _check(config, given)
    settings = [*argv[end + 1 :], "--run.resume=auto"]
    if given.print:
        print(sbatch_file(config, given, settings))
    else:
        job = hand_in(config, given, settings)
        print(f"job {job.job_id}; what it prints goes to {job.paths.stdout}")


def _check(config: Config, given: argparse.Namespace) -> None:
    """Refuse what cannot run on so many ranks, or would lose the run when the job starts again."""
    validate(config, given.nodes * given.gpus_per_node)
    if config.run.overwrite:
        raise ConfigError("run.overwrite=true: a job that starts again would empty its own run; choose another run.dir")
    if config.run.resume not in ("never", "auto"):
        raise ConfigError(
            f"run.resume={config.run.resume!r:.80}: a job goes on from its own run; nearest valid is auto"
        )


def sbatch_file(config: Config, given: argparse.Namespace, settings: list[str]) -> str:
    """The file for sbatch: one task a node, in which torchrun starts a rank for each GPU.

    Args:
        config: what `settings` give.
        given: the options of the command.
        settings: those of `ccmim pretrain`.
    """
    name = _job_name(config)
    cpus = given.cpus_per_gpu * given.gpus_per_node
    options = {
        "job-name": name,
        "nodes": given.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": given.gpus_per_node,
        "cpus-per-task": cpus,
        "time": given.time,
        "partition": given.partition,
        "account": given.account,
        "signal": f"USR1@{NOTICE}",
        "output": f"{name}-%j.out",
        "open-mode": "append",
    }
    torchrun = f"torchrun --nnodes {given.nodes} --nproc-per-node {given.gpus_per_node} --rdzv-backend c10d"
    torchrun += f' --rdzv-endpoint "$1" --rdzv-id "$SLURM_JOB_ID" -m ccmim_fast.cli pretrain {shlex.join(settings)}'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None),
        f"#SBATCH --{_requeue(given)}",
        "",
        f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# Below 32768, where Linux begins to hand out ports.",
        "port=$((10000 + SLURM_JOB_ID % 20000))",
        *_before(config),
        "",
        _ON_NODE.format(torchrun=torchrun),
        # Since 22.05 srun does not take cpus-per-task over from sbatch.
        f'srun --kill-on-bad-exit=1 --cpus-per-task={cpus} bash -c "$(declare -f on_node); on_node $head:$port"',
        *_after(given),
    ]
    return "\n".join(lines)


def hand_in(config: Config, given: argparse.Namespace, settings: list[str], cluster: str = "slurm") -> Any:
    """Submit by submitit, whose files and logs go into the run's folder; returns its job.

    Args:
        config, given, settings: as `sbatch_file`.
        cluster: submitit's name of where jobs go; `local` is this machine.

    Raises:
        MachineError: submitit or Slurm is missing, or refused the job.
    """
    try:
        import submitit
    except ImportError:
        raise MachineError(f"ccmim submit needs submitit: {_INSTALL}; or --print, and sbatch") from None
    hours, minutes, seconds = map(int, given.time.split(":"))
    try:
        executor = submitit.AutoExecutor(Path(config.run.dir) / "slurm", cluster=cluster)
        executor.update_parameters(
            name=_job_name(config),
            nodes=given.nodes,
            tasks_per_node=given.gpus_per_node,
            gpus_per_node=given.gpus_per_node,
            cpus_per_task=given.cpus_per_gpu,
            timeout_min=60 * hours + minutes + (seconds > 0),
            stderr_to_stdout=True,
            slurm_partition=given.partition,
            slurm_account=given.account,
            slurm_setup=_before(config),
            slurm_teardown=_after(given),
            slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={given.cpus_per_gpu}"],
            slurm_additional_parameters={"signal": f"USR1@{NOTICE}", _requeue(given): True},
        )
        # What sbatch complains of is printed by submitit, and raised.
        with contextlib.redirect_stderr(io.StringIO()):
            return executor.submit(train_here, settings)
    except (RuntimeError, OSError) as error:
        raise MachineError(f"ccmim submit: not submitted: {str(error) or 'sbatch failed'}") from error


def train_here(settings: list[str]) -> None:
    """A task of the job: one rank. What ends `ccmim pretrain` ends the task, with its exit code."""
    from submitit.helpers import TorchDistributedEnvironment

    # Each rank sees all GPUs of its node and takes its own, as under torchrun.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    sys.argv = ["ccmim", "pretrain", *settings]
    runpy.run_module("ccmim_fast.cli", run_name="__main__")


def _before(config: Config) -> list[str]:
    """Shell lines that remember what the run said last: `stopped` of an earlier start is no reason to start again."""
    return [f"state={shlex.quote(str(Path(config.run.dir) / FILE))}", 'before=$(cat "$state" 2>/dev/null)']


def _after(given: argparse.Namespace) -> list[str]:
    """Shell lines behind srun. Slurm by itself queues a job again after a node's failure, not when its time ends."""
    again = """if [ "$now" != "$before" ] && grep -q '"state": "stopped"' <<< "$now"; then"""
    lines = ['now=$(cat "$state" 2>/dev/null)', again, '    scontrol requeue "$SLURM_JOB_ID"', "fi"]
    return ["code=$?", *(lines if given.requeue else []), "exit $code"]


def _requeue(given: argparse.Namespace) -> str:
    return "requeue" if given.requeue else "no-requeue"


def _job_name(config: Config) -> str:
    return re.sub(r"[^\w.-]", "-", Path(config.run.dir).name, flags=re.ASCII) or "ccmim"


def _parser() -> argparse.ArgumentParser:
    usage = "ccmim submit [options] -- SETTINGS"
    text = submit.__doc__.replace("`", "")
    parser = Parser("ccmim submit", usage=usage, description=text, allow_abbrev=False)
    parser.add_argument("--nodes", type=_count, default=1, help="default 1")
    parser.add_argument("--gpus-per-node", type=_count, default=1, help="ranks on each node; default 1")
    parser.add_argument("--cpus-per-gpu", type=_count, default=8, help="cores for a rank's images; default 8")
    parser.add_argument("--time", type=_clock, default="24:00:00", metavar="HH:MM:SS", help="default 24:00:00")
    parser.add_argument("--partition", type=_word, help="default: Slurm's")
    parser.add_argument("--account", type=_word, help="default: Slurm's")
    parser.add_argument(
        "--requeue", action=argparse.BooleanOptionalAction, default=True, help="queue again until the run is done"
    )
    parser.add_argument("--print", action="store_true", help="print the file for sbatch, submit nothing")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r:.20} must be a whole number from 1 on")
    return int(text)


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
