"""The command `ccmim`. Every user's mistake ends in one line on standard error and its own exit code."""

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ccmim_fast.config.keys import nearest
from ccmim_fast.errors import CcmimError, ConfigError, MachineError

USAGE = """usage: ccmim COMMAND [--config FILE_OR_PRESET] [--section.key=value ...]

commands:
  demo      pretrain ccMIM and MAE on made images, compare them, write a report
  pretrain  pretrain a vision transformer on your images
  submit    the same as a job of Slurm: ccmim submit [options] -- SETTINGS
  runs      list runs, how each stands and what it logged last: ccmim runs [FOLDER]
  report    compare runs in one offline HTML page: ccmim report RUN [RUN ...] [options]
  data      index, check, gather and measure images: ccmim data index|verify|shard|stats|bench ROOT [options]
  eval      measure a checkpoint: ccmim eval knn|logreg|linear|attentive|finetune|transfer|
            detection|segmentation|masks CHECKPOINT [settings]
  export    write a run's weights for another library: ccmim export TARGET RUN OUT [options]
  embed     features of a folder's images: ccmim embed RUN FOLDER --out FEATURES.npy|.arrow [options]
  import    published weights as a checkpoint: ccmim import FILE --arch NAME --out RUN [settings]
  ablate    train variants side by side, several seeds, one table: ccmim ablate score | strategy | lambda | decoder
  bench     measure, in a checkout: ccmim bench throughput|ladder|attention|data|bank|soak|scaling|ops [options]
  doctor    show what this machine has, and what to install for more

ccmim COMMAND --help lists the settings of a command."""


def demo(argv: list[str]) -> None:
    """`ccmim demo [settings]`: the preset `demo`, changed by the settings."""
    from ccmim_fast.commands.demo import run_demo
    from ccmim_fast.config.load import load_config

    given = argv if any(a.startswith("--config") for a in argv) else ["--config", "demo", *argv]
    run_demo(load_config(given, "ccmim demo"))


def pretrain(argv: list[str]) -> None:
    """`ccmim pretrain [settings]`."""
    from ccmim_fast.config.load import load_config
    from ccmim_fast.engine.pretraining import fit

    config = load_config(argv, "ccmim pretrain")
    if config.data.source != "shapes":
        fit(config)
        return
    from ccmim_fast.evaluation.masks.objects import object_figures

    fit(config, more=object_figures)


def submit(argv: list[str]) -> None:
    """`ccmim submit [options] -- SETTINGS`: `ccmim pretrain SETTINGS` as a job of Slurm."""
    from ccmim_fast.commands.submit import submit as run

    run(argv)


def runs(argv: list[str]) -> None:
    """`ccmim runs [FOLDER]`: the run folders below FOLDER."""
    from ccmim_fast.runs.listing import print_runs

    print_runs(argv)


def evaluate(argv: list[str]) -> None:
    """`ccmim eval NAME CHECKPOINT [settings]`: a checkpoint by a published protocol; or what it looks at and hides."""
    if argv[:1] == ["masks"]:
        from ccmim_fast.evaluation.masks.command import masks

        masks(argv[1:])
        return
    from ccmim_fast.evaluation.command import evaluate as run

    run(argv)


def export(argv: list[str]) -> None:
    """`ccmim export TARGET RUN OUT`: a run's weights as another library loads them."""
    from ccmim_fast.export.command import export as run

    run(argv)


def import_weights(argv: list[str]) -> None:
    """`ccmim import FILE --arch NAME --out OUT [settings]`: published weights as a checkpoint of ours."""
    from ccmim_fast.export.imported import import_weights as run

    run(argv)


def embed(argv: list[str]) -> None:
    """`ccmim embed RUN FOLDER --out FILE`: features of a folder's images."""
    from ccmim_fast.export.embed import embed as run

    run(argv)


def report(argv: list[str]) -> None:
    """`ccmim report RUN [RUN ...] [options]`: a page that compares runs."""
    from ccmim_fast.commands.report import report as run

    run(argv)


def data(argv: list[str]) -> None:
    """`ccmim data index|verify|shard|stats|bench ROOT [options]`."""
    from ccmim_fast.commands.data import COMMANDS as OF_DATA

    if argv and argv[0] in ("-h", "--help"):
        print("\n".join([data.__doc__, "", *(command.__doc__ for command in OF_DATA.values())]).replace("`", ""))
        return
    if not argv or argv[0] not in OF_DATA:
        asked = f"{argv[0]!r:.80}: no such command" if argv else "which command"
        raise ConfigError(f"ccmim data: {asked}; one of {', '.join(OF_DATA)}")
    OF_DATA[argv[0]](argv[1:])


def ablate(argv: list[str]) -> None:
    """`ccmim ablate score|strategy|lambda|decoder [options] [settings]`: variants side by side."""
    from ccmim_fast.ablation.command import ablate

    print(ablate(argv))


BENCHMARKS = {
    "throughput": "throughput.py",
    "ladder": "ladder.py",
    "attention": "attention.py",
    "data": "data.py",
    "bank": "bank.py",
    "soak": "soak.py",
    "scaling": "scaling.py",
    "ops": "ops/bench.py",
}


def bench(argv: list[str]) -> None:
    """`ccmim bench throughput|ladder|attention|data|bank|soak|scaling|ops [options]`: a script of benchmarks/."""
    if not argv or argv[0] not in BENCHMARKS:
        asked = f"{argv[0]!r:.80}: no such benchmark" if argv else "which benchmark"
        raise ConfigError(f"ccmim bench: {asked}; one of {', '.join(BENCHMARKS)}")
    root = Path(__file__).resolve().parents[1]
    script = root / "benchmarks" / BENCHMARKS[argv[0]]
    if not script.is_file():
        raise MachineError("ccmim bench: benchmarks/ is not in the wheel; git clone the repository and run it there")
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script, *argv[1:]], env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(done.returncode)


def doctor(argv: list[str]) -> None:
    """`ccmim doctor`: a table of device and libraries, each tried."""
    from ccmim_fast.commands.doctor import print_report

    print_report(argv)


_LINE = 1000  # characters; a line of ours has 400 at most, and the user's words in it are without end

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "pretrain": pretrain,
    "submit": submit,
    "runs": runs,
    "report": report,
    "data": data,
    "eval": evaluate,
    "export": export,
    "embed": embed,
    "import": import_weights,
    "ablate": ablate,
    "bench": bench,
    "doctor": doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code (see `errors.py`)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be bytes that are no text: they are printed as they are, in every locale.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        if argv[0] not in COMMANDS:
            raise ConfigError(f"{argv[0]!r:.80}: no such command; nearest: {nearest(argv[0], COMMANDS)}")
        COMMANDS[argv[0]](argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # A reader that went away (`| head`) is nobody's mistake. What is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except CcmimError as error:
        return _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _end("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        # What no command has an advice for, but no mistake of ours: a full disk, too many open files, a lost right.
        if error.errno is None:
            raise
        where = f"{error.filename!r}: " if error.filename is not None else ""
        kind = ConfigError if error.errno == errno.ENAMETOOLONG else MachineError
        return _end(f"{where}{error.strerror}", kind.exit_code)
    return 0


def _end(line: str, code: int) -> int:
    """Print one line that a terminal shows as it is, whatever words of the user are in it."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(line.split()))
    print(f"ccmim: {line if len(line) <= _LINE else line[:_LINE] + '...'}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
