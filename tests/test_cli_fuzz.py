"""Random and mutated command lines of every command end in order, or in one line with an exit code (fault 27).

What would train, measure or submit is not begun: it counts as `begun` that it was about to.
"""

import contextlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from fuzzed import KEYS, SCRAPS, changed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ccmim_fast import cli, errors
from ccmim_fast.checkpoints import io as checkpoints
from ccmim_fast.commands import COMMANDS, bench
from ccmim_fast.errors import StoppedError

CASES = 800  # with those of tests/config/test_fuzz.py 2,000
BEGUN = StoppedError.exit_code
CODES = (0, 2, 3, 4, 5, 6, BEGUN)

# Of each command some that work, to be spoiled.
WORKING = [
    ["pretrain", "--config", "demo", "--run.dir=new"],
    ["pretrain", "--data.root=images", "--train.batch_size=2", "--mask.ratio", "0.5", "--overwrite"],
    ["demo", "--run.dir=new", "--train.epochs=2"],
    ["submit", "--nodes", "2", "--gpus-per-node=8", "--print", "--", "--config", "demo", "--train.batch_size=256"],
    ["submit", "--print", "--", "--config", "demo", "--run.dir=\udcff"],
    ["submit", "--time", "1:00:00", "--no-requeue", "--partition=gpu", "--", "--config", "demo"],
    ["runs"],
    ["runs", "runs"],
    ["report", "runs/good", "--out", "page.html", "--images=1"],
    ["report", "runs/good", "runs/bad", "--moments", "0", "--title", "\udcff"],
    ["data", "index", "images", "--channels", "3"],
    ["data", "index", "all.tar", "--index", "made.index"],
    ["data", "verify", "images", "--workers", "1", "--again"],
    ["data", "shard", "images", "out", "--side", "16", "--quality=80", "--seed", "1", "--shard-bytes=4096"],
    ["data", "stats", "images", "--images", "2", "--workers=1"],
    ["data", "bench", "images", "--image-size", "16", "--batch", "2", "--device", "cpu"],
    ["export", "timm", "runs/good", "encoder.safetensors"],
    ["export", "safetensors", "runs/bad", "encoder.safetensors"],
    ["export", "hf-vit", "runs/good", "new", "--push", "me/model", "--dry-run"],
    ["embed", "runs/good", "images", "--out", "features.npy", "--batch=2", "--pool", "cls", "--device", "cpu"],
    ["predict", "runs/tuned", "images", "--out", "classes.csv", "--top=2", "--device", "cpu"],
    ["import", "weights.pth", "--arch", "vit_tiny_patch16_224", "--out", "new", "--decoder.depth=1"],
    ["eval", "knn", "timm:vit_tiny_patch16_224", "--data.source=shapes", "--knn.k=[5]", "--run.dir=new"],
    ["eval", "linear", "timm:vit_tiny_patch16_224", "--config", "linear", "--data.source", "shapes", "--overwrite"],
    ["eval", "finetune", "runs/good", "--config=finetune_large", "--data.root=images", "--resume", "auto"],
    ["eval", "masks", "runs/good", "images", "--moments=2", "--masks", "images", "--measure", "4", "--mask.ratio=0.5"],
    ["eval", "masks", "timm:vit_tiny_patch16_224", "--drawn=2", "--data.source=shapes", "--run.dir=new"],
    ["ablate", "score", "--seeds", "1", "--jobs=1", "--only", "all", "bank", "--runs", "r", "--out", "t"],
    ["bench", "throughput", "--batch", "2"],
    ["doctor"],
    ["--help"],
]
ODD = ("file", "images/a.png", "nowhere/at/all", "memory://x", "--run.dir=\udcff", "--data.root=", "--index=images")
NAMES = sorted({word for line in WORKING for word in line} | {*ODD})
words = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(SCRAPS),
    changed(st.sampled_from(NAMES)),
    st.sampled_from(KEYS).map("--{}".format),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(SCRAPS)).map("--{0[0]}={0[1]}".format),
    st.text(max_size=8),
)


@st.composite
def spoiled(draw):
    line = list(draw(st.sampled_from(WORKING)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(1, len(line)))
        line[at : at + draw(st.integers(0, 2))] = draw(st.lists(words, max_size=2))
    return line


def possible(line):
    """What a shell can give: bytes without NUL. And nothing outside of the folder: no path begins at the root."""
    line = [
        os.fsdecode(word.replace("\0", "").replace("\ud800", "").encode("utf-8", "surrogateescape")) for word in line
    ]
    return [re.sub(r"(^|=)/+", r"\1", word) for word in line]


command_lines = st.one_of(spoiled(), spoiled(), spoiled(), st.lists(words, max_size=4)).map(possible)


def make_folder(folder: Path) -> None:
    (folder / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (24, 20), (ord(name), 0, 0)).save(folder / "images" / f"{name}.png")
    (folder / "images" / "bad.jpg").write_text("no image")
    with tarfile.open(folder / "all.tar", "w") as tar:
        tar.add(folder / "images", "images")
    (folder / "file").write_text("text")
    torch.save({"patch_embed.proj.weight": torch.zeros(192, 3, 16, 16)}, folder / "weights.pth")
    weights = {"decoder.embed.weight": torch.zeros(4, 1), "decoder.blocks.0.x": torch.zeros(64)}
    progress = {"step": 1, "seen": 4, "samples": 4, "images": ""}
    good = {"model": weights, "ema": None, "progress": progress, "config": "decoder: {dim: 4, depth: 1, num_heads: 1}"}
    told = {"encoder": {"name": "x", "arch": "vit_tiny_patch16_224"}, "classes": ["a", "b"]}
    head = {"head.weight": torch.zeros(2, 4), "head.bias": torch.zeros(2)}
    tuned = good | {"model": head, "config": "model: {pool: cls}", "encoder": "x", "classifier": told}
    for name, state in (("good", good), ("bad", {"model": 5}), ("tuned", tuned)):
        checkpoints.save(folder / "runs" / name / "checkpoints", 1, state, keep=1)
        (folder / "runs" / name / "config.yaml").write_text("run: {log_every: 1}\n" if name == "good" else "[" * 9)
        (folder / "runs" / name / "metrics.jsonl").write_text(json.dumps({"kind": "train", "epoch": 1}) + "\n{")


def begin(*args, **options):
    raise StoppedError("begun")


def called(argv: list[str]) -> tuple[int, str]:
    """Exit code and what was said on standard error, both streams being as strict as real ones."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as left:
            code = left.code
    out.flush()
    err.flush()
    return code, err.buffer.getvalue().decode()


def test_fault_27_command_lines(monkeypatch):
    seen = Counter()
    for name in (
        *("engine.pretraining.fit", "ablation.demo.run_demo", "commands.submit.submit_job", "ablation.run.run_all"),
        *("data.throughput.measure_throughput", "data.verify.verify", "doctor.parts.gpus"),
        *("evaluation.run.Job", "evaluation.masks.subject.build_model"),
        *("checkpoints.run.build_model", "evaluation.classifier.with_head"),
        *("export.imported.build_model", "export.hub.push"),
    ):
        monkeypatch.setattr(f"ccmim_fast.{name}", begin)
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=begin))

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(command_lines)
    def run(argv):
        code, said = called(argv)
        assert code in CODES, (argv, said)
        if code:
            *told, said = said.splitlines(keepends=True)
            assert all(" left out: " in line for line in told), (argv, told)  # of the folder's damaged image
            assert said.startswith("ccmim: "), (argv, said)
            assert len(said) <= len("ccmim: ") + errors.LINE + len("...\n"), argv
            assert said.strip().isprintable(), (argv, said)
        seen[argv[0] if argv and argv[0] in COMMANDS else "", code] += 1

    with tempfile.TemporaryDirectory() as outer:
        # Below, so that `../..` is ours, too.
        folder = Path(outer) / "a" / "b"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        make_folder(folder)
        for command in COMMANDS:  # whatever is drawn
            run = example([command, "--no-such-option"])(run)
        for line in WORKING:
            run = example(line)(run)
        run()
        monkeypatch.undo()
    assert sum(seen.values()) >= CASES
    for command in COMMANDS:
        codes = {code for name, code in seen if name == command}
        assert 2 in codes, command
        assert codes & {0, BEGUN}, f"no line of {command} got through: the test tests little of it"
