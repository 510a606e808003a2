"""Two run folders that the code of commit ac1f32c wrote and stopped half-way, and what that code did with them.

    PYTHONPATH=.:kernels python tests/old_runs.py make FOLDER     writes them, in a checkout of ac1f32c
    PYTHONPATH=.:kernels python tests/old_runs.py use FOLDER OUT  goes on with copies of them, evaluates them, and
                                                                  writes to OUT (JSON) what came of it

`tests/assets/runs_ac1f32c/` holds the folders, without the machine's name, and, as used.json, what ac1f32c itself
made of them. `bank` has a score bank and averaged weights, `mae` neither.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from bit_equality import ENVIRONMENT, figures_of, machine, skip_measuring, sums_of

# Three epochs of four steps, 4 x 4 patches; few weights, as these files are in the repository.
COMMON = [
    "--data.source=shapes",
    "--data.samples=32",
    "--data.image_size=[16,16]",
    "--data.loader=torch",
    "--data.workers=1",
    "--data.crop_scale=[0.6,1.0]",
    "--model.arch=vit_tiny_patch16_224",
    "--model.patch_size=4",
    "--model.embed_dim=8",
    "--model.depth=2",
    "--model.num_heads=2",
    "--decoder.dim=8",
    "--decoder.depth=1",
    "--decoder.num_heads=2",
    "--heads.dim=8",
    "--score.grid=4",
    "--optim.base_lr=0.1",
    "--optim.warmup_epochs=1",
    "--train.batch_size=8",
    "--train.epochs=3",
    "--train.precision=fp32",
    "--train.device=cpu",
    "--run.log_every=1",
    "--run.keep=1",
    "--run.tensorboard=false",
]
STOPPED = 6  # steps, in the middle of the second epoch
RUNS = {
    "bank": ["--optim.ema_decay=0.8"],
    "mae": ["--mask.strategy=random", "--contrast.loss=none", "--score.source=first"],
}
RECORDED = ("knn", "timm", "resume")
SHAPES = ["--data.source=shapes", "--data.image_size=[16,16]", "--data.samples=120", "--data.test_samples=120"]


def make(folder: Path) -> None:
    """Write the runs into `folder`, which is new."""
    folder.mkdir(parents=True)
    os.chdir(folder)  # so that no path of this machine stands in the settings
    for name, changed in RUNS.items():
        called(["pretrain", *COMMON, *changed, f"--train.max_steps={STOPPED}", f"--run.dir={name}"])
        _replace(folder / name / "state.json", host="elsewhere")
        _replace(folder / name / "environment.json", system="Linux")


def _replace(file: Path, **values: str) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=1) + "\n")


def use(runs: Path) -> dict[str, Any]:
    """Evaluate a copy of each run, then go on with it to the end, in a new process.

    Returns:
        machine: see `bit_equality.machine`.
        runs: by name, see `used`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "used.json"
        _in_new_process("here", runs, out)
        return json.loads(out.read_text())


def used(run: Path, folder: Path) -> dict[str, Any]:
    """What each command made of a copy of `run`; of one that failed, its error.

    Args:
        run: is not changed.
        folder: for what is written.
    """
    copy = shutil.copytree(run, folder / run.name)
    commands = {
        "knn": lambda: _knn(copy),
        "timm": lambda: _timm(copy, folder / f"{run.name}.safetensors"),
        "other_settings": lambda: called([*_going_on(copy), "--mask.ratio=0.5"], code=2),
        "other_model": lambda: called([*_going_on(copy), "--decoder.dim=16"], code=5),
    }
    if run.name == "bank":
        commands |= {
            "runs": lambda: called(["runs", str(folder)]),
            "masks": lambda: _masks(copy),
            "report": lambda: _report(copy, folder / "report.html"),
        }
    commands["resume"] = lambda: _resume(copy)  # the last one, as it adds a checkpoint
    found = {}
    for name, command in commands.items():
        try:
            found[name] = command()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found


def called(argv: list[str], code: int = 0) -> str:
    """Return what `ccmim` prints, its errors too; raises RuntimeError where it ends with another exit code."""
    from ccmim_fast.cli import main

    printed = io.StringIO()
    sys.argv = ["ccmim", *argv]  # that environment.json keeps
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            ended = main(argv)
        except SystemExit as end:
            ended = end.code or 0
    if ended != code:
        raise RuntimeError(f"exit code {ended}, expected {code}, of ccmim {' '.join(argv)}:\n{printed.getvalue()}")
    return printed.getvalue()


def _going_on(run: Path) -> list[str]:
    config = run / "config.yaml"
    return ["pretrain", f"--config={config}", f"--run.dir={run}", "--run.resume=auto", "--train.max_steps=0"]


def _resume(run: Path) -> dict[str, Any]:
    called(_going_on(run))
    return {**figures_of(run), "sha256": sums_of(run)}


def _knn(run: Path) -> dict[str, float]:
    called(["eval", "knn", str(run), *SHAPES, "--knn.k=[3,10]", "--train.device=cpu", "--train.precision=fp32"])
    return json.loads((run / "eval" / "knn" / "result.json").read_text())["figures"]


def _masks(run: Path) -> dict[str, Any]:
    called(["eval", "masks", str(run), "--drawn=1", "--measure=16", "--train.device=cpu"])
    return json.loads((run / "eval" / "masks" / "result.json").read_text())


def _timm(run: Path, file: Path) -> str:
    from safetensors.torch import load_file

    called(["export", "timm", str(run), str(file)])
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        total.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def _report(run: Path, file: Path) -> str:
    called(["report", str(run), f"--out={file}"])
    return file.read_text()


def _in_new_process(*words: str | Path) -> None:
    ran = subprocess.run(
        [sys.executable, __file__, *words],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ran.returncode:
        raise RuntimeError(f"old_runs.py {words[0]} ended with exit code {ran.returncode}:\n{ran.stdout[-3000:]}")


def main(argv: list[str]) -> None:
    command, runs = argv[0], Path(argv[1]).resolve()
    if command == "make":
        _in_new_process("make-here", runs)
    elif command == "make-here":
        make(runs)
    elif command == "use":
        found = use(runs)
        kept = {name: {one: of_run[one] for one in RECORDED} for name, of_run in found["runs"].items()}
        Path(argv[2]).write_text(json.dumps({**found, "runs": kept}, indent=1) + "\n")
    else:
        skip_measuring()
        with tempfile.TemporaryDirectory() as folder:
            found = {name: used(runs / name, Path(folder)) for name in RUNS}
        Path(argv[2]).write_text(json.dumps({"machine": machine(), "runs": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
