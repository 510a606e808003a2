"""A pretraining run as a job of Slurm, that saves before its time ends and is queued again.

The job is handed in by submitit, or printed as a file for sbatch (sbatch.sh). In both, each task is a rank, and Slurm
sends USR1 before the end. A run that USR1 stopped says so in its state.json: the job then queues itself again.
"""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.runs.state import FILE

NOTICE = 120  # seconds before the end: for a step and ViT-H's checkpoint, 7.6 GB (three floats a weight) at 100 MB/s


class Job(NamedTuple):
    """A job asks Slurm for this; `time` is HH:MM:SS, `requeue` asks for another start until the run is done."""

    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_gpu: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    requeue: bool = True


def check_job(config: Config, job: Job) -> None:
    """Raise ConfigError for a run that cannot have so many ranks, or that would be lost when the job starts again."""
    validate(config, job.nodes * job.gpus_per_node)
    if config.run.overwrite:
        raise ConfigError("run.overwrite=true: a job that starts again would empty its own run; choose another run.dir")
    if config.run.resume not in ("never", "auto"):
        raise ConfigError(
            f"run.resume={config.run.resume!r:.80}: a job goes on from its own run; nearest valid is auto"
        )


def sbatch_script(config: Config, job: Job, settings: Sequence[str]) -> str:
    """Return the file for sbatch that carries out `ccmim pretrain SETTINGS`; `config` is what `settings` give."""
    template, values = _filled(config, job)
    return template.render(values, settings=shlex.join(settings))


def submit_job(
    train: Callable[[list[str]], None], config: Config, job: Job, settings: list[str], cluster: str = "slurm"
) -> Any:
    """Hand in a job by submitit, whose files and logs go into the run's folder; returns submitit's job.

    Each task calls `train`, a module's function, with `settings`. `cluster` is submitit's name of where jobs go.
    Raises MachineError if submitit or Slurm is missing, or refused the job.
    """
    try:
        import submitit
    except ImportError:
        install = "pip install 'ccmim_fast[slurm]'"
        raise MachineError(f"ccmim submit needs submitit: {install}; or --print, and sbatch") from None
    template, values = _filled(config, job)
    before, after = ("".join(template.blocks[name](template.new_context(values))) for name in ("before", "after"))
    hours, minutes, seconds = map(int, job.time.split(":"))
    try:
        executor = submitit.AutoExecutor(Path(config.run.dir) / "slurm", cluster=cluster)
        executor.update_parameters(
            name=values["name"],
            nodes=job.nodes,
            tasks_per_node=job.gpus_per_node,
            gpus_per_node=job.gpus_per_node,
            cpus_per_task=job.cpus_per_gpu,
            timeout_min=60 * hours + minutes + (seconds > 0),
            stderr_to_stdout=True,
            slurm_partition=job.partition,
            slurm_account=job.account,
            slurm_setup=[before],
            slurm_teardown=[after],
            slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={job.cpus_per_gpu}"],
            slurm_additional_parameters={"signal": f"USR1@{NOTICE}", "requeue" if job.requeue else "no-requeue": True},
        )
        # What sbatch complains of is printed by submitit, and raised.
        with contextlib.redirect_stderr(io.StringIO()):
            return executor.submit(train, settings)
    except (RuntimeError, OSError) as error:
        raise MachineError(f"ccmim submit: not submitted: {str(error) or 'sbatch failed'}") from error


def become_rank() -> None:
    """Put this task's rank, and where the ranks meet, into the environment, as torchrun does."""
    from submitit.helpers import TorchDistributedEnvironment

    # Each rank sees all GPUs of its node and takes its own.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _filled(config: Config, job: Job) -> tuple[Any, dict[str, Any]]:
    """Return jinja2's template of the job and what it is filled with, but for the settings."""
    from jinja2 import Environment, StrictUndefined

    run = Path(config.run.dir)
    text = Path(__file__).with_name("sbatch.sh").read_text()
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return template, {
        "name": re.sub(r"[^\w.-]", "-", run.name, flags=re.ASCII) or "ccmim",
        "job": job,
        "notice": NOTICE,
        "bin": shlex.quote(str(Path(sys.executable).parent)),
        "state": shlex.quote(str(run / FILE)),
    }
