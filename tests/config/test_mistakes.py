"""Every mistake in a file or on the command line is one line with the key, the value and the nearest valid one."""

import os
import textwrap

import pytest
import yaml

from ccmim_fast.config.load import load_config
from ccmim_fast.registry import SCORE_SOURCES

PROG = "ccmim pretrain"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask: {rato: 0.5}", "mask.rato: unknown key in demo.yaml; did you mean mask.ratio?"),
        ("ratio: 0.5", "ratio: unknown key in demo.yaml; did you mean mask.ratio?"),
        ("resume: auto", "resume: unknown key in demo.yaml; did you mean run.resume?"),
        ("msk: {ratio: 0.5}", "msk: unknown key in demo.yaml; did you mean"),
        ("mask: 0.5", "mask: is a section in demo.yaml; its keys are mask.ratio, mask.strategy"),
        ("mask: [ratio]", "mask: is a section in demo.yaml"),
        (
            "mask: {strategy: importnce}",
            "mask.strategy=importnce in demo.yaml: expected one of random, block, importance, importance_sampling; "
            "nearest valid is importance",
        ),
        ("seed: 1.6", "seed=1.6 in demo.yaml: expected a whole number; nearest valid is 2"),
        ("seed: [1]", "seed=[1] in demo.yaml: expected a whole number; nearest valid is 0"),
        ("mask: {ratio: much}", "mask.ratio=much in demo.yaml: expected a number; nearest valid is 0.75"),
        ("mask: {ratio: true}", "mask.ratio=true in demo.yaml: expected a number"),
        ("mask: {ratio: null}", "mask.ratio=null in demo.yaml: expected a number"),
        ("run: {overwrite: null}", "run.overwrite=null in demo.yaml: expected true or false"),
        ("data: {mean: null}", "data.mean=null in demo.yaml: expected a list of numbers"),
        ("mask: {ratio: }", "mask.ratio='' in demo.yaml: expected a number"),
        ("data: {flip: maybe}", "data.flip=maybe in demo.yaml: expected true or false; nearest valid is false"),
        ("data: {image_size: 64}", "data.image_size=64 in demo.yaml: expected a list of 2 whole numbers"),
        ("data: {image_size: [64, 64.5]}", "data.image_size=[64, 64.5] in demo.yaml: expected a list of 2 whole"),
        ("data: {image_size: [64, 64, 3]}", "data.image_size=[64, 64, 3] in demo.yaml: expected a list of 2 whole"),
        ("data: {mean: [a, b]}", "data.mean=[a, b] in demo.yaml: expected a list of numbers"),
        ("data: {mean: [[0.5]]}", "data.mean: nested value in demo.yaml"),
        ("run: {dir: [x]}", "run.dir=[x] in demo.yaml: expected text"),
        ("run: {dir: {x: 1}}", "run.dir: nested value in demo.yaml"),
        ("mask: {ratio: 0.5}\nmask.ratio: 0.6", "mask.ratio: is given twice in demo.yaml"),
        ("mask: {ratio: 0.5}\nmask: {ratio: 0.6}", "not valid YAML in demo.yaml at line 1: mask is given twice"),
        ("mask:\n  ratio: 1\n  ratio: 1", "not valid YAML in demo.yaml at line 2: ratio is given twice"),
        ("seed: 1\nmask: [", "not valid YAML in demo.yaml at line 2"),
        ("[1, 2]", "no settings in demo.yaml"),
        ("5", "no settings in demo.yaml"),
        ("a: 1\n---\nb: 1", "not valid YAML in demo.yaml"),
        ("[" * 5000, "not valid YAML in demo.yaml"),
        ("a: &a [*a]", "not valid YAML in demo.yaml"),
        ("\x00", "not valid YAML in demo.yaml"),
        ("? [a]\n: 1", "not valid YAML in demo.yaml"),
        ("mask: !!python/object/apply:os.mkdir [ran]", "mask: is a section in demo.yaml"),
        ("mask: {ratio: 1.5}", "mask.ratio=1.5: must be in (0, 1)"),
    ],
)
def test_mistakes_in_a_file(load, text, message, tmp_path, error_of):
    assert error_of(load, text).startswith(message)
    assert os.listdir(tmp_path) == ["demo.yaml"]


def test_an_alias_bomb_is_not_printed(load, error_of):
    doublings = ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))
    message = error_of(load, f"seed: [&a0 [x, x], {doublings}]")
    assert message == "seed: nested value in demo.yaml; write one such as 0"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask.rato=0.5"], "--mask.rato: unknown key; did you mean --mask.ratio?"),
        (["--mask.rat", "0.5"], "--mask.rat: unknown key; did you mean --mask.ratio?"),
        (["--resum", "auto"], "--resum: unknown key; did you mean --resume?"),
        (["--confg=demo"], "--confg: unknown key; did you mean --config?"),
        (["--mask={ratio: 0.5}"], "--mask: is a section; its keys are mask.ratio"),
        (["--mask.ratio"], "--mask.ratio: its value is missing; write --mask.ratio=VALUE"),
        (["--resume", "--overwrite"], "--run.resume/--resume: its value is missing"),
        (["--config"], "--config: its value is missing"),
        (["--config=demo", "--config=demo"], "--config=demo: is given twice"),
        (["--print_config=all"], "argument --print_config: ignored explicit argument 'all'"),
        (["--print_config", "x"], "x: unexpected argument; a setting is written --mask.ratio=0.75"),
        (["demo"], "demo: unexpected argument"),
        (["-v"], "-v: unexpected argument"),
        ([""], "'': unexpected argument"),
        (["--mask.ratio=much"], "mask.ratio=much: expected a number; nearest valid is 0.75"),
        (["--mask.ratio="], "mask.ratio='': expected a number"),
        (["--train.epochs=1e2"], "train.epochs=1e2: expected a whole number; nearest valid is 100"),
        (["--seed=" + "1" * 5000], "seed=1111"),
        (["--seed=0x" + "f" * 5000], "seed=0xff"),
        (["--seed=1\n2"], "seed='1\\n2': expected a whole number"),
        (
            ["--score.source=frist"],
            f"score.source=frist: expected one of {', '.join(SCORE_SOURCES)}; nearest valid is first",
        ),
        (["--train.device=cuda:0"], "train.device=cuda:0: expected one of auto, cpu, cuda; nearest valid is cuda"),
        (["--overwrite=maybe"], "run.overwrite=maybe: expected true or false"),
        (["--config", "dmo"], "--config=dmo: no such preset; nearest is demo"),
        (["--config", ""], "--config='': no such preset; nearest is"),
        (["--config", "ccmim_vit_bse.yaml"], "--config=ccmim_vit_bse.yaml: No such file or directory; nearest preset"),
        (["--config", "/"], "--config=/: Is a directory"),
        (["--config", "a\0/b"], "--config='a\\x00/b': embedded null byte"),
        (["--config", "x" * 5000 + ".yaml"], "--config=xxx"),
    ],
)
def test_mistakes_on_the_command_line(argv, message, error_of):
    assert error_of(load_config, argv, PROG).removeprefix(f"{PROG}: ").startswith(message)


def test_unreadable_file(tmp_path, error_of):
    file = tmp_path / "bytes.yaml"
    file.write_bytes(b"seed: \xff\xfe\n")
    assert "not valid YAML" in error_of(load_config, ["--config", str(file)], PROG)


def test_what_is_no_file_or_endless_is_not_read(tmp_path, error_of):
    os.mkfifo(tmp_path / "pipe.yaml")  # nobody writes: reading would wait for ever
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "long.yaml").write_text("seed: 1\n" + "#" * 300_000)
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, words in (
        ("pipe", "is no file"),
        ("folder", "Is a directory"),
        ("long", "is longer than 262,144 bytes"),
        ("zero", "is no file"),
        ("loop", "Too many levels of symbolic links"),
    ):
        path = str(tmp_path / f"{name}.yaml")
        error = error_of(load_config, ["--config", path], PROG)
        assert error.startswith(f"--config={path[:40]}")  # a long path is cut
        assert f".yaml: {words}" in error or f"...: {words}" in error


NESTED = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'])}]\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{NESTED}? *a11\n: 1", "found unhashable key"),
        (f"mask:\n{textwrap.indent(NESTED, '  ')}", "mask.a0: unknown key"),
        ("mask: &m {ratio: *m}", "found unconstructable recursive node"),
        ("{a: " * 20_000, "maximum recursion depth exceeded"),
        ("".join(f"a{i}: 1\n" for i in range(9000)) + "a7: 1", "a7 is given twice"),
        ("mask:\n  ratio: " + "9" * 9000, "mask.ratio=inf: must be"),
        ("data: {mean: [.nan, 0.5, 0.5]}", "data.mean=[.nan, 0.5, 0.5]"),
        ("data: {mean: [nan, 0.5, 0.5]}", "must be in [-1, 1]"),
        ("optim: {base_lr: inf}", "optim.base_lr=inf: must be"),
    ],
)
def test_files_that_grow_when_they_are_read(load, text, words, error_of):
    assert words in error_of(load, text)


@pytest.mark.parametrize("name", ["a\nb", "\u2028", "\udcff", "\x1b[31m"])
def test_strange_names_stay_on_one_line(load, name, tmp_path, error_of):
    error_of(load_config, [f"--{name}=1"], PROG)
    error_of(load_config, [f"--seed={name}"], PROG)
    error_of(load_config, [name], PROG)
    error_of(load_config, ["--config", name], PROG)
    error_of(load_config, ["--config", f"{name}/x.yaml"], PROG)
    (tmp_path / f"{name}.yaml").write_text("sed: 1")
    error_of(load_config, ["--config", f"{name}.yaml"], PROG)
    error_of(load, yaml.safe_dump({name: 1}))
