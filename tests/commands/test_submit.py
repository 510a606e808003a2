"""`ccmim submit`: the file for sbatch, run with a made Slurm; and submitit's, and a job of its on this machine."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ccmim_fast.cli import main
from ccmim_fast.commands import submit
from ccmim_fast.config.load import load_config
from ccmim_fast.ranks.slurm import Job, submit_job
from ccmim_fast.runs.state import RunState, read_state, write_state

SETTINGS = ["--data.source=shapes", "--data.image_size=[32,32]", "--data.samples=8", "--data.loader=torch"]
SETTINGS += [
    "--model.arch=test_vit",
    "--decoder.dim=32",
    "--train.batch_size=4",
    "--train.epochs=1",
    "--optim.warmup_epochs=1",
]
SETTINGS += ["--train.device=cpu", "--train.precision=fp32", "--run.log_every=1", "--run.tensorboard=false"]

# What Slurm and Python are here. A task is what srun becomes: its id is kept. `$AT` is the folder of the test.
RANK = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" > "$AT/scontrol"; fi',
    "srun": """echo $$ > "$AT/task"; echo "$1" "$2" > "$AT/srun"; shift 2
SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NTASKS_PER_NODE=2 exec "$@" """,
    "python": f"""printf '%s\\n' "$@" > "$AT/python"; printenv {RANK} > "$AT/rank"
[ -e "$AT/said" ] && cp "$AT/said" "$AT/run/state.json"
[ -e "$AT/worker.py" ] || exit 3
exec "$PYTHON" "$AT/worker.py" "$AT" """,
    "sbatch": """[ -e "$AT/refuse" ] && { echo "invalid partition" >&2; exit 1; }
cp "$1" "$AT/job.sh"; echo Submitted batch job 7""",
}
# Saves at USR1, as a rank.
WORKER = """
import pathlib, signal, sys, time
from ccmim_fast.runs.state import RunState, write_state
at = pathlib.Path(sys.argv[1])
def save(*_):
    write_state(at / "run", RunState("stopped", 1, "node7", 2))
    sys.exit(143)
signal.signal(signal.SIGUSR1, save)
(at / "ready").touch()
time.sleep(60)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with a made Slurm on the path, of which the job's file knows by the folder of the interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "run").mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("AT", str(tmp_path))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("SLURM_JOB_ID", "20123")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return tmp_path


def printed(slurm, capsys, *options, settings=()):
    """The path of the file that --print gives."""
    assert main(["submit", *options, "--print", "--", *SETTINGS, f"--run.dir={slurm / 'run'}", *settings]) == 0
    path = slurm / "job.sh"
    path.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", path], check=True)
    return path


def test_the_file(slurm, capsys):
    odd = """--data.root=/my "images"/it's $HOME {a}"""
    path = printed(
        slurm, capsys, "--nodes", "2", "--gpus-per-node=2", "--partition=gpu", settings=[odd, "--resume=never"]
    )
    assert [line[8:] for line in path.read_text().splitlines() if line.startswith("#SBATCH ")] == [
        "--job-name=run",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--time=24:00:00",
        "--partition=gpu",
        "--signal=USR1@120",
        "--output=run-%j.out",
        "--open-mode=append",
        "--requeue",
    ]
    assert subprocess.run(["bash", path]).returncode == 3
    assert (slurm / "srun").read_text() == "--kill-on-bad-exit=1 --cpus-per-task=8\n"
    assert (slurm / "rank").read_text().split() == ["3", "4", "1", "2", "node7", "10123"]
    assert (slurm / "python").read_text().splitlines() == [
        *("-m", "ccmim_fast.cli", "pretrain", *SETTINGS, f"--run.dir={slurm / 'run'}", odd, "--run.resume=auto"),
    ]


def test_options(slurm, capsys):
    options = ["--no-requeue", "--time", "01:30:00", "--account=a-b", "--cpus-per-gpu=3"]
    lines = printed(slurm, capsys, *options).read_text().splitlines()
    assert {"#SBATCH --no-requeue", "#SBATCH --time=01:30:00", "#SBATCH --account=a-b"} <= set(lines)
    assert "#SBATCH --cpus-per-task=3" in lines
    assert not any("scontrol requeue" in line or "partition" in line for line in lines)


STOPPED = RunState("stopped", 1, "node7", 2)


@pytest.mark.parametrize("by_submitit", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "again"),
    [
        (None, STOPPED, True),
        (STOPPED, STOPPED._replace(started=3), True),
        # It did not come so far as to say anything: another start would end the same way.
        (STOPPED, STOPPED, False),
        (None, STOPPED._replace(state="done"), False),
        (None, STOPPED._replace(state="failed"), False),
        (None, None, False),
    ],
)
def test_a_stopped_run_is_queued_again(slurm, capsys, monkeypatch, by_submitit, before, after, again):
    if by_submitit:
        handed_in(slurm, monkeypatch)
    else:
        printed(slurm, capsys)
    if before is not None:
        write_state(slurm / "run", before)
    if after is not None:
        write_state(slurm, after)
        (slurm / "state.json").rename(slurm / "said")
    if by_submitit:
        # In place of the task, what follows in the job's file.
        (slurm / "bin" / "srun").write_text(f"#!/bin/bash\n{FAKES['python']}\n")
    path = f"{slurm / 'bin'}:{os.environ['PATH']}"
    assert subprocess.run(["bash", slurm / "job.sh"], env={**os.environ, "PATH": path}).returncode == 3
    assert (slurm / "scontrol").exists() == again
    if again:
        assert (slurm / "scontrol").read_text() == "requeue 20123\n"


def test_the_signal_reaches_the_rank(slurm, capsys):
    """Slurm gives it to the task alone: no shell may stand before the rank."""
    path = printed(slurm, capsys)
    (slurm / "worker.py").write_text(WORKER)
    process = subprocess.Popen(["bash", path])
    deadline = time.monotonic() + 60
    while not (slurm / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int((slurm / "task").read_text()), signal.SIGUSR1)
    assert process.wait(timeout=60) == 143
    assert read_state(slurm / "run").state == "stopped"
    assert (slurm / "scontrol").read_text() == "requeue 20123\n"


def handed_in(slurm, monkeypatch, *options):
    monkeypatch.setenv("PATH", f"{slurm / 'bin'}:{os.environ['PATH']}")
    return main(["submit", *options, "--", *SETTINGS, f"--run.dir={slurm / 'run'}"])


def test_by_submitit(slurm, monkeypatch, capsys):
    options = ["--nodes=2", "--gpus-per-node=2", "--time=01:30:01", "--account=a"]
    assert handed_in(slurm, monkeypatch, *options) == 0
    assert capsys.readouterr().out == f"job 7; what it prints goes to {slurm / 'run' / 'slurm' / '7_0_log.out'}\n"
    lines = (slurm / "job.sh").read_text().splitlines()
    for option in ("nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=8", "time=91", "account=a"):
        assert f"#SBATCH --{option}" in lines
    for option in ("job-name=run", "signal=USR1@120", "requeue"):
        assert f"#SBATCH --{option}" in lines
    command = next(line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --cpus-per-task=8" in command
    assert "submitit.core._submit" in command


@pytest.mark.slow
def test_a_job_on_this_machine(tmp_path):
    """What submitit pickles, and a task makes of its place: a run of one rank that is there again and goes on."""
    settings = [*SETTINGS, f"--run.dir={tmp_path / 'run'}", f"--data.root={tmp_path / 'cache'}", "--run.resume=auto"]
    settings += ["--train.epochs=2"]
    for steps in ("2", "4"):
        more = [*settings, f"--train.max_steps={steps}"]
        job = submit_job(submit.pretrain_rank, load_config(settings, ""), Job(time="00:05:00"), more, cluster="local")
        job.result()
    assert read_state(tmp_path / "run").state == "done"
    assert "step 2/2" in (tmp_path / "run" / "log.txt").read_text()
    assert "epoch 1.50 · step 3/4" in job.stdout()


def test_a_task_ends_with_the_code_of_its_run(monkeypatch):
    """Here the place that it reads is that of a single task."""
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as caught:
        submit.pretrain_rank(["--mask.ratio=2"])
    assert caught.value.code == 2
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("1", "0")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "the settings are missing"),
        (["--config", "demo", "--node=2"], 2, "--node: unknown key; did you mean --nodes?"),
        (["--nodes=0", "--"], 2, "'0' must be a whole number"),
        (["--time=90", "--"], 2, "'90' must be HH:MM:SS"),
        (["--time=00:02:00", "--"], 2, "more than 120 seconds"),
        (["--partition=a\n#SBATCH", "--"], 2, "must be letters"),
        (["--", "--mask.rato=1"], 2, "did you mean --mask.ratio"),
        (["--nodes=3", "--", "--train.batch_size=64"], 2, "world size 3; nearest valid is 63"),
        (["--", "--overwrite"], 2, "run.overwrite=true"),
        (["--", "--resume=/a/checkpoint"], 2, "nearest valid is auto"),
        (["--", "--config=demo", "--run.dir=RUN"], 6, "srun"),
    ],
)
def test_mistakes(argv, code, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *(a.replace("RUN", str(tmp_path)) for a in argv)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_a_job_that_slurm_refuses(slurm, monkeypatch, capsys):
    (slurm / "refuse").touch()
    assert handed_in(slurm, monkeypatch) == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "invalid partition" in lines[0]


def test_without_submitit(slurm, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert handed_in(slurm, monkeypatch) == 6
    assert "pip install 'ccmim_fast[slurm]'; or --print" in capsys.readouterr().err
    printed(slurm, capsys)


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["submit", "--help"])
    assert caught.value.code == 0
    assert "--gpus-per-node" in capsys.readouterr().out
