"""Every command in a code block of README.md and docs/ is carried out, page by page in a folder of its own.

As it is written, with the paths that a reader puts in, and with TINY settings behind a run's own: the last one counts.
What is only parsed, by the parser of the command itself, and why:

- torchrun with several processes (eight models on two cores): its options, the settings, and that the batch divides;
- `ccmim bench`, `ccmim ablate` (minutes to hours; tests/benchmarks and tests/ablation run them small);
- `ccmim eval`, `ccmim import` (of ImageNet, of published weights; tests/evaluation and tests/export run them small),
  and `ccmim predict`, which needs a classifier of the first;
  `ccmim eval masks` is carried out on the page's own run;
- `make` (installs, or runs this suite): `make -n`; `pytest` and `python` with a file: that it is there;
- `ccmim submit` is carried out with --print: there is no Slurm.

docs/export.md is carried out, its Python too, by tests/export/test_page.py.
"""

import gzip
import importlib.util
import re
import shlex
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccmim_fast.ablation.variants import ABLATIONS
from ccmim_fast.cli import main
from ccmim_fast.commands import COMMANDS, ablate, data, eval, import_, predict
from ccmim_fast.commands.bench import SCRIPTS
from ccmim_fast.config.evaluation import EvalConfig, validate_evaluation
from ccmim_fast.config.load import load_config, make_config
from ccmim_fast.config.validate import validate
from ccmim_fast.evaluation.protocols import FOLDER
from ccmim_fast.evaluation.run import protocol_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HERE = [page for page in PAGES if page.name != "export.md"]
BLOCK = r"^```(?P<language>\w*)\n(?P<fenced>.*?)^```|(?P<indented>(?:^    [^\n]*\n)+)"
STARTS = ("ccmim", "make", "torchrun", "pytest", "python", "pip")
TINY = [
    *("--data.image_size=[32,32]", "--data.loader=torch", "--data.workers=1", "--model.patch_size=16"),
    *("--model.embed_dim=48", "--model.depth=2", "--model.num_heads=3", "--decoder.dim=32", "--decoder.num_heads=4"),
    *("--heads.dim=16", "--train.batch_size=4", "--train.max_steps=8", "--train.epochs=4", "--optim.warmup_epochs=1"),
    *("--train.device=cpu", "--train.precision=fp32", "--run.tensorboard=false"),
]


def commands_of(text):
    """The commands in the code blocks of a page, in order, each as words; what they print is left out."""
    lines = []
    for block in re.finditer(BLOCK, text, re.MULTILINE | re.DOTALL):
        if block["language"] not in (None, "", "bash", "sh", "console"):
            continue
        lines += (block["fenced"] or block["indented"]).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [shlex.split(line, comments=True) for line in lines if re.match(rf"(?:{'|'.join(STARTS)}) ", line + " ")]


def python_of(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def filled(words, images):
    """With a reader's path to images, and without the dots that stand for settings of his own."""
    words = [word.removesuffix(")") if word.startswith("...") else word for word in words]
    filled = []
    for word in words:
        if word == "..." and filled[-1] == "--data.root":
            filled.append(str(images))
        elif word == "..." and filled[-1] == "--only":
            filled.pop()
        elif word == "...":
            has = {"--config", "--data.root"} & set(words)
            filled += [part for part in ("--config", "ccmim_vit_base") if "--config" not in has]
            filled += [part for part in ("--data.root", str(images)) if "--data.root" not in has]
        else:
            filled.append(word.replace("/path/to/images", str(images)))
    return filled


def carry_out(words, images):
    """Run one command; a failure names it."""
    if words[0] == "torchrun":
        parse_torchrun(words[1:])
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] in ("pytest", "python", "pip"):
        for path in (word for word in words[1:] if "/" in word):
            assert (ROOT / path).exists(), path
    elif words[1] in ("bench", "ablate", "eval", "import", "predict") and not is_carried_out(words):
        parse_only(words[1], words[2:])
    elif "--print_config" in words:
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert ended.value.code == 0
    else:
        assert main(made_small(words[1:], images)) == 0, shlex.join(words)


def is_carried_out(words):
    """`ccmim eval masks` of a run of the page; other weights are published ones."""
    return words[1:3] == ["eval", "masks"] and words[3].startswith("runs/")


def made_small(words, images):
    command, *rest = words
    if command == "pretrain":
        return [command, *rest, *TINY]
    if command == "submit" and "--print" not in rest:
        return [command, "--print", *rest]
    if command == "report":
        for name in rest[: rest.index("--out")] if "--out" in rest else rest:
            if not Path(name).exists():
                shutil.copytree("runs/mine", name)
    if "wells" in rest:  # five bands of 12 bits
        Path("wells").mkdir()
        for number in range(4):
            np.save(
                f"wells/{number}.npy", np.random.default_rng(number).integers(0, 3978, (40, 40, 5), dtype=np.uint16)
            )
    if command == "data" and rest[0] == "idx":  # twelve pictures, as the real ones are compressed
        write_idx(rest[1], 0x0803, np.zeros((12, 28, 28), np.uint8))
        write_idx(rest[rest.index("--labels") + 1], 0x0801, np.arange(12, dtype=np.uint8) % 10)
    if command == "data" and rest[0] == "composite":
        write_pictures(*rest[1:3])
        return [command, *rest, "--samples", "4", "--test", "2"]
    if command == "data" and rest[0] == "bench":
        return [command, *rest, "--batch", "8", "--image-size", "32", "--workers", "1"]
    return words


def write_idx(path, magic, array):
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes())


def write_pictures(cutouts, backgrounds):
    """Two squares without a rim, of one class, and two backgrounds."""
    for number in range(2):
        picture = np.zeros((40, 40, 4), np.uint8)
        picture[5:35, 5:35] = (number, 9, 9, 255)
        for folder, pixels_HWC in ((Path(cutouts, "squares"), picture), (Path(backgrounds), picture[..., :3])):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_HWC).save(folder / f"{number}.png")


def parse_torchrun(words):
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert given.module
    assert given.training_script == "ccmim_fast.cli"
    command, *settings = given.training_script_args
    if command == "eval":
        parse_only(command, settings)
        return
    assert command == "pretrain"
    validate(load_config(settings, "ccmim pretrain"), int(given.nproc_per_node))


def parse_only(command, words):
    if command == "bench":
        path = ROOT / "benchmarks" / SCRIPTS[words[0]][0]
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.parse(words[1:])
        return
    if command == "eval" and words[0] == "masks":
        make_config(eval.parser_of("masks").parse_args(words[1:]).settings)
        return
    if command == "eval":
        given = eval.parser_of(words[0]).parse_args(words[1:])
        make_config(protocol_of(words[0], given.settings)[1], EvalConfig, validate_evaluation, FOLDER)
        return
    if command == "import":
        given = import_.parser().parse_args(words)
        make_config({**given.settings, "model.arch": given.arch})
        return
    if command == "predict":
        predict.parser().parse_args(words)
        return
    assert words[0] in ABLATIONS
    make_config({"config": "demo", **ablate.parser_of(words[0]).parse_args(words[1:]).settings})


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of two classes, which the pages call `photos` or `/path/to/images`; the current folder is its parent."""
    monkeypatch.chdir(tmp_path)
    for path in (str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "ops")):
        monkeypatch.syspath_prepend(path)
    folder = tmp_path / "photos"
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40 + i, 50, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"class{i % 2}" / f"{i}.jpg")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in HERE if commands_of(p.read_text())], ids=lambda page: page.name)
def test_commands(page, images):
    for words in commands_of(page.read_text()):
        carry_out(filled(words, images), images)


def test_commands_are_found():
    """Fenced, as a session with its output, indented, with a comment; not the lines of other languages or of words."""
    text = "\n".join(
        [
            "words",
            "```\nccmim runs   # all\n$ ccmim data stats 'a b'\nof 39 images:\n```",
            "    ccmim pretrain ... \\\n      --resume auto",
            "",
            "```yaml\nmake: 1\n```\n```python\nmake x\n```",
        ]
    )
    assert commands_of(text) == [
        ["ccmim", "runs"],
        ["ccmim", "data", "stats", "a b"],
        ["ccmim", "pretrain", "...", "--resume", "auto"],
    ]
    found = [words for page in PAGES for words in commands_of(page.read_text())]
    assert {"pretrain", "data", "runs", "export", "doctor", "submit"} <= {w[1] for w in found if w[0] == "ccmim"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_in_words_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for command in re.findall(r"`ccmim ([^`]+)`", text):
        name, *rest = command.split()
        assert name in COMMANDS, command
        if name == "bench" and rest:
            assert rest[0] in SCRIPTS, command
        if name == "data" and rest:
            assert rest[0] in data.NAMES, command


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in HERE if python_of(p.read_text())], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """With random weights of a ViT-B as the file that `ccmim export` writes."""
    import timm
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("vit_base_patch16_224", num_classes=0).state_dict(), "encoder.safetensors")
    for code in python_of(page.read_text()):
        exec(code, {})
