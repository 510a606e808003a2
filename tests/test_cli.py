"""The command: one line and an exit code for every mistake, and what is no run."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ccmim_fast.ablation.variants import ABLATIONS
from ccmim_fast.checkpoints import io
from ccmim_fast.cli import main
from ccmim_fast.commands import COMMANDS, bench, data, runs
from ccmim_fast.errors import ConfigError, say
from ccmim_fast.evaluation.registry import EVALUATIONS
from ccmim_fast.runs.state import read_state, recorded


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["pretrian"], 2, ["pretrian", "nearest: pretrain"]),
        (["pretrain", "--mask.rato=0.5"], 2, ["mask.rato", "mask.ratio"]),
        (["pretrain", "--mask.ratio=1.5"], 2, ["mask.ratio", "1.5"]),
        (["pretrain", "--config", "ccmim_vit_bse"], 2, ["ccmim_vit_bse", "ccmim_vit_base"]),
        (["pretrain", "--data.root=/nowhere/at/all", "--run.dir=RUN"], 3, ["/nowhere/at/all"]),
        (["pretrain", "--train.device=cuda", "--run.dir=RUN"], 6, ["no CUDA device"]),
        (["export", "timm", "/nowhere", "out.safetensors"], 5, ["no complete checkpoint"]),
        (["export"], 2, ["TARGET, RUN, OUT"]),
        (["data", "indx"], 2, ["'indx': no such command", "nearest: index"]),
        (["bench"], 2, ["the benchmark is missing", "throughput"]),
        (["demo", "--data.source=photos"], 2, ["data.source=photos"]),
    ],
)
def test_mistakes_end_in_one_line(argv, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [a.replace("RUN", str(tmp_path / "run")) for a in argv]
    assert main(argv) == code
    # torch logs a line of its own where there is nvcc and no GPU.
    printed = [line for line in capsys.readouterr().err.splitlines() if "No CUDA runtime is found" not in line]
    assert len(printed) == 1
    assert all(word in printed[0] for word in words), printed


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "ccmim: interrupted"),
        (OSError(28, "No space left on device"), 6, "ccmim: No space left on device"),
        (OSError(28, "No space left on device", "runs/a"), 6, "ccmim: 'runs/a': No space left on device"),
        (OSError(36, "File name too long", "runs/a"), 2, "ccmim: 'runs/a': File name too long"),
        (ConfigError("--a=\x1b[31m\n: is\u2028 wrong"), 2, r"ccmim: --a=\x1b[31m : is wrong"),
        (ConfigError("x" * 2000), 2, f"ccmim: {'x' * 1000}..."),
    ],
)
def test_what_ends_any_command_is_one_line(error, code, line, monkeypatch, capsys):
    def fails(argv):
        raise error

    monkeypatch.setattr(runs, "runs", fails)
    assert main(["runs"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fails(argv):
        raise OSError("no number: not the system's")

    monkeypatch.setattr(runs, "runs", fails)
    with pytest.raises(OSError, match="no number"):
        main(["runs"])


def test_help(capsys):
    """Every command of the table is listed."""
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {name:9}" in printed and command.help in printed for name, command in COMMANDS.items())


WITH_HELP = [[name] for name in COMMANDS]
WITH_HELP += [["data", name] for name in data.NAMES] + [["ablate", name] for name in ABLATIONS]
WITH_HELP += [["eval", name] for name in [*EVALUATIONS, "masks"]]


@pytest.mark.parametrize("words", WITH_HELP, ids=" ".join)
def test_every_command_has_help(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: ccmim {' '.join(words)}")
    assert said.err == ""


def test_every_benchmark_is_handed_its_options(monkeypatch):
    """`--help` among them: the script prints it."""
    called, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(bench.subprocess, "run", lambda command, env: called.append(command) or done)
    for name, (script, _) in bench.SCRIPTS.items():
        assert main(["bench", name, "--help"]) == 0
        assert str(called[-1][1]).endswith(f"benchmarks/{script}")
        assert called[-1][2:] == ["--help"]


def test_a_command_imports_what_it_needs_when_it_is_called():
    """`ccmim --help` and those of the quick commands load no torch; nor is another command's file imported."""
    code = "import sys; from ccmim_fast.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print([n for n in sys.modules if n in ('torch', 'timm') or n.startswith('ccmim_fast.commands.')])"
    quick = ["demo", "pretrain", "submit", "runs", "report", "data", "export", "embed", "import", "ablate", "bench"]
    for argv in ([], ["eval", "knn"], ["eval", "masks"], *([name] for name in [*quick, "doctor"])):
        done = subprocess.run([sys.executable, "-c", code, *argv, "--help"], capture_output=True, text=True, check=True)
        own = [f"ccmim_fast.commands.{COMMANDS[argv[0]].place.partition(':')[0]}"] if argv else []
        own += ["ccmim_fast.commands.pretrain"] * (argv == ["submit"])
        assert sorted(ast.literal_eval(done.stdout.splitlines()[-1])) == sorted(own), argv


@pytest.mark.parametrize("state", [{}, {"model": 5, "ema": None}, {"model": {}, "ema": None}, {"model": {}, "ema": 5}])
def test_export_of_what_is_no_run(tmp_path, capsys, state):
    io.save(tmp_path / "checkpoints", 1, state, keep=1)
    assert main(["export", "timm", str(tmp_path), str(tmp_path / "out.safetensors")]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("step_00000001: not a checkpoint of pretraining; name the folder of such a run")
    assert not (tmp_path / "out.safetensors").exists()


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ccmim_fast.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ccmim COMMAND")
    assert done.stderr == ""


def test_a_reader_that_went_away_is_no_traceback():
    """As in `ccmim submit --print ... | head -1`; more than a pipe's buffer is printed."""
    program = "import sys; from ccmim_fast import cli; from ccmim_fast.commands import runs; "
    program += "runs.runs = lambda argv: print('x' * 10**6); sys.exit(cli.main(['runs']))"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("ccmim e", ["eval", "export", "embed"]),
        ("ccmim eval kn", ["knn"]),
        ("ccmim pretrain --mask.strategy imp", ["importance", "importance_sampling"]),
        ("ccmim pretrain --config ccmim_vit_l", ["ccmim_vit_large"]),
        ("ccmim ablate score --see", ["--seeds", "--seed"]),
        ("ccmim data shard --qu", ["--quality"]),
    ],
)
def test_the_shell_completes_a_line(line, completed, tmp_path):
    """As argcomplete's function of the shell asks for it."""
    out = tmp_path / "out"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\t", "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "COMP_TYPE": "9"}
    environment = {**os.environ, **asked, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    subprocess.run([sys.executable, "-m", "ccmim_fast.cli"], env=environment, capture_output=True, check=True)
    assert out.read_text().split() == completed


FULL = Path("/dev/full")  # a device on which no write finds room
PRINTS = "import sys; from ccmim_fast import cli, errors; from ccmim_fast.commands import runs; "


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_log_on_a_full_disk_is_a_line_once_the_work_is_done(tmp_path):
    """`ccmim ... > log`: lines that a run says do not end it; what a command prints at its end is missed."""
    program = (
        "runs.runs = lambda argv: ([errors.say('x' * 5000) for _ in range(9)], open(sys.argv[1], 'w'), print('x')); "
    )
    with open(FULL, "w") as full, open(tmp_path / "errors", "w+") as errors:
        command = [sys.executable, "-c", PRINTS + program + "sys.exit(cli.main(['runs']))", str(tmp_path / "done")]
        done = subprocess.run(command, stdout=full, stderr=errors)
    first, last = (tmp_path / "errors").read_text().splitlines()
    told = "standard output: No space left on device; the work goes on, and lines are missing there"
    assert first == f"ccmim: {told}"
    assert last.startswith("ccmim: ")
    assert "No space left on device" in last
    assert done.returncode == 6
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("closed", ["1", "2", "0", "1 2", "0 1 2"])
def test_closed_streams_are_no_traceback_and_no_file_gets_what_is_printed(tmp_path, closed):
    program = """
import os, sys
from ccmim_fast import cli
from ccmim_fast.commands import runs

def run(argv):
    file = open(sys.argv[1], "w")
    file.write("mine")
    file.flush()
    print("text")
    os.write(1, b"text")

runs.runs = run
sys.exit(cli.main(["runs"]))
"""
    closing = " ".join(f"{number}>&-" for number in closed.split())
    command = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 9 GiB"), "out of the host's memory: Unable to allocate 9 GiB"),
        (MemoryError(), "out of the host's memory: no more was to be had"),
        (RuntimeError("[enforce] can't allocate memory: you tried to allocate 99 bytes"), "out of the host's memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of the device's memory: CUDA out of memory"),
        (
            RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. It is"),
            "(Bus error): the host's memory",
        ),
        (OSError(24, "Too many open files"), "Too many open files"),
        (PermissionError(13, "Permission denied", "a/b"), "'a/b': Permission denied"),
    ],
)
def test_what_the_machine_lacks_is_exit_code_6_in_the_command_and_in_the_run_s_state(
    tmp_path, monkeypatch, capsys, error, words
):
    def fails(argv):
        with recorded(tmp_path, True, bool):
            raise error

    monkeypatch.setattr(runs, "runs", fails)
    assert main(["runs"]) == 6
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    state = read_state(tmp_path)
    assert (state.state, state.exit_code) == ("failed", 6)
    assert state.error in line


def test_what_is_said_holds_no_password_and_commands_no_terminal(capsys):
    say("a\x1b]0;title\x07b\u202e https://me:pass@host/x?token=1 \n\tend")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\\u202e https://host/x?token=*** \n\tend\n"
