"""A configuration is what file and command line say, and every mistake in them is one line that helps."""

import dataclasses
import subprocess
import sys

import pytest
import yaml

from ccmim_fast.config import load as load_module
from ccmim_fast.config.keys import build, flatten, settings
from ccmim_fast.config.load import difference, from_yaml, load_config, presets, to_yaml
from ccmim_fast.config.schema import Config, DataConfig, MaskConfig, OptimConfig, RunConfig
from ccmim_fast.errors import ConfigError

PROG = "ccmim pretrain"


def test_nothing_gives_the_defaults(load):
    assert load_config([], PROG) == Config()
    assert (
        load("")
        == load("# a comment\n")
        == load("mask:\n#  ratio: 0.5\n")
        == load("mask: null\ndata: ~")
        == load("---\n")
        == {}
    )


def test_file(load):
    text = """
seed: 3
run: {dir: 007, overwrite: yes}
data:
  image_size: [32, 64]
  mean: [.5, 0.5, 5e-1]
  root: "null"
optim:
  base_lr: 1e-4  # text in YAML 1.1, which wants 1.0e-4
mask.strategy: random
"""
    assert load(text) == {
        "seed": 3,
        "run.dir": "007",
        "run.overwrite": True,
        "data.image_size": (32, 64),
        "data.mean": (0.5, 0.5, 0.5),
        "data.root": "null",
        "optim.base_lr": 1e-4,
        "mask.strategy": "random",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("4095", (4095.0,)), ("[4095, 1, 2]", (4095.0, 1.0, 2.0)), ("null", ()), ("~", ()), ("[]", ()), ("", ())],
)
def test_a_list_that_may_be_empty_is_null_or_one_number(load, text, value):
    assert load(f"data: {{max_value: {text}}}") == ({"data.max_value": value} if value else {})
    assert load_config([f"--data.max_value={text}"], PROG).data.max_value == value
    assert from_yaml(to_yaml(Config(data=DataConfig(max_value=value))), "x").data.max_value == value


@pytest.mark.parametrize(
    ("text", "value"), [("4", 4.0), ("1e-1", 0.1), ("[4, 1]", (4.0, 1.0)), ("[.5,0.5]", (0.5, 0.5))]
)
def test_a_number_may_be_a_schedule_of_two(load, text, value):
    assert load(f"score: {{temperature: {text}}}") == {"score.temperature": value}
    config = load_config([f"--score.temperature={text}"], PROG)
    assert config.score.temperature == value
    assert from_yaml(to_yaml(config), "x") == config


@pytest.mark.parametrize("text", ["[4]", "[4,1,2]", "[]", "four", "[4,x]", ""])
def test_what_is_no_schedule_is_said_in_one_line(text):
    with pytest.raises(ConfigError, match=r"expected a number, or a list of 2 numbers; nearest valid is 1\.0$"):
        load_config([f"--score.temperature={text}"], PROG)


def test_every_type_on_the_command_line():
    argv = ["--seed=1", "--mask.ratio", "0.5", "--data.image_size=[32,64]", "--run.dir", "a b=c", "--data.flip=true"]
    config = load_config([*argv, "--contrast.loss", "align", "--optim.betas=[0, .5]"], PROG)
    found = {key: new for key, _, new in difference(Config(), config)}
    assert found == {
        "seed": 1,
        "mask.ratio": 0.5,
        "data.image_size": (32, 64),
        "run.dir": "a b=c",
        "data.flip": True,
        "contrast.loss": "align",
        "optim.betas": (0.0, 0.5),
    }
    assert isinstance(config.optim.betas[0], float)


def test_command_line_beats_the_file_and_the_last_one_counts(load):
    text = "mask: {ratio: 0.5, strategy: random}"
    assert load(text, "--mask.ratio=0.6", "--mask.ratio=0.7") == {"mask.ratio": 0.7, "mask.strategy": "random"}
    assert load_config(["--mask.ratio=0.6", "--config", "demo.yaml"], PROG).mask.ratio == 0.6


def test_short_spellings_and_bare_flags():
    config = load_config(["--overwrite", "--data.flip", "--run.dir=x"], PROG)
    assert (config.run.overwrite, config.data.flip) == (True, True)
    assert load_config(["--overwrite", "false"], PROG).run.overwrite is False
    assert load_config(["--resume", "auto"], PROG).run.resume == "auto"
    assert load_config(["--resume=runs/a/checkpoints/step_00000001"], PROG).run.resume.startswith("runs/a")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config([], PROG).seed = 1


def test_preset_by_name_and_by_path():
    assert load_config(["--config", "demo"], PROG) == load_config([f"--config={presets()['demo']}"], PROG)
    assert load_config(["--config", "ccmim_vit_large"], PROG).model.arch == "vit_large_patch16_224"


def test_a_bare_name_is_a_preset_whatever_lies_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("seed: 9")
    assert load_config(["--config", "demo"], PROG).seed == 0
    assert load_config(["--config", "./demo"], PROG).seed == 9


def test_presets_of_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "ccmim_fast"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "only.yaml").write_text("seed: 5")
    monkeypatch.setattr(load_module, "__file__", str(package / "config" / "load.py"))
    assert list(presets()) == ["only"]
    assert load_config(["--config", "only"], PROG).seed == 5


def test_yaml_round_trip():
    config = Config(
        seed=2**32 - 1,
        run=RunConfig(dir="null", resume="a/\u00fc '\"#: \n{}"),
        data=DataConfig(root="\udcff/é", image_size=(32, 64), channels=1, mean=(1 / 3,), std=(1e-17,), flip=True),
        optim=OptimConfig(base_lr=1e-4, betas=(0.0, 0.1 + 0.2)),
    )
    assert from_yaml(to_yaml(config), "a checkpoint") == config
    assert from_yaml(to_yaml(Config()), "a checkpoint") == Config()
    for path in presets().values():
        config = load_config(["--config", str(path)], PROG)
        assert from_yaml(to_yaml(config), "a checkpoint") == config


def test_from_yaml_says_where_the_text_stands(error_of):
    assert error_of(from_yaml, "sed: 1", "step_00000001") == "sed: unknown key in step_00000001; did you mean seed?"
    assert "mask.ratio=2.0" in error_of(from_yaml, "mask: {ratio: 2}", "x")


def test_to_yaml_lists_every_setting():
    document = yaml.safe_load(to_yaml(Config()))
    flat = {k if k == "seed" else f"{k}.{n}" for k, v in document.items() for n in (v if isinstance(v, dict) else [k])}
    assert flat == set(settings())


def test_to_yaml_is_readable():
    text = to_yaml(Config(run=RunConfig(dir="é")))
    assert "\n  image_size: [224, 224]\n" in text
    assert "\n  dir: é\n" in text


def test_flatten_and_build_are_inverse():
    config = Config(seed=1, mask=MaskConfig(ratio=0.5))
    assert build(flatten(config)) == config
    assert build({}) == Config()
    with pytest.raises(TypeError):
        build({"mask.rato": 1})


def test_difference():
    a, b = Config(seed=1), Config(mask=MaskConfig(ratio=0.5))
    assert difference(a, b) == [("seed", 1, 0), ("mask.ratio", 0.75, 0.5)]
    assert difference(a, a) == []


def test_print_config(capsys):
    with pytest.raises(SystemExit) as left:
        load_config(["--print_config", "--mask.ratio=0.5", "--config", "demo"], PROG)
    assert left.value.code == 0
    config = from_yaml(capsys.readouterr().out, "output")
    assert config.mask.ratio == 0.5
    assert config.data.source == "shapes"


def test_print_config_prints_no_wrong_one(capsys, error_of):
    assert "mask.ratio" in error_of(load_config, ["--print_config", "--mask.ratio=5"], PROG)
    assert capsys.readouterr().out == ""


def test_help_documents_every_setting(capsys):
    with pytest.raises(SystemExit) as left:
        load_config(["--help"], PROG)
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: ccmim pretrain" in text
    assert "share of patches masked, in (0, 1): some stay visible [share; default: 0.75; MAE]" in text
    assert all(f"--{key}" in text for key in settings())
    for words in ("--resume", "--overwrite", "--print_config", "ccmim_vit_base_official"):
        assert words in text


def test_help_and_key_mistakes_need_no_torch():
    code = (
        "import sys; from ccmim_fast.config.load import load_config\n"
        "try: load_config(['--help'], 'x')\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_base_stands_where_nothing_is_asked_for(tmp_path):
    """The options count more than the file, the file more than the base, and that more than the defaults."""
    base = load_config(["--mask.ratio=0.5", "--seed=3", "--optim.base_lr=0.1"], "ccmim")
    path = tmp_path / "some.yaml"
    path.write_text("seed: 4\noptim: {base_lr: 0.2}\n")
    config = load_config(["--config", str(path), "--optim.base_lr=0.3"], "ccmim", base=base)
    assert (config.mask.ratio, config.seed, config.optim.base_lr) == (0.5, 4, 0.3)
    assert load_config([], "ccmim", base=base) == base


def test_settings_that_were_removed_load_from_files_and_count_for_nothing(load, error_of):
    assert load("fast: {fold_input: false, row_ops: true}\nseed: 1") == {"seed": 1}
    assert load("fast.cls_only: false\nfast: null") == {}
    assert load("target: {hog_bins: 9}") == {}
    assert "target.hog_bins: this setting was removed (HOG has 9 " in error_of(load, "target: {hog_bins: 12}")
    assert from_yaml("fast: {masked_only: false}", "a checkpoint") == Config()
    message = error_of(load_config, ["--fast.fold_input=false"], PROG)
    assert message.startswith("--fast.fold_input: ")
    assert "removed" in message
    assert "fast.fold_inputs: unknown key" in error_of(load, "fast: {fold_inputs: false}")


def test_a_tag_that_an_earlier_version_took_counts_for_nothing():
    assert from_yaml("model: {arch: vit_tiny_patch16_224.augreg_in21k}", "x").model.arch == "vit_tiny_patch16_224"


def test_written_settings_hold_no_password():
    """A URL that is folded over lines would keep one; a resumed run is given its URL again."""
    root = f"https://me:secret@host/{'photos-of-my-holidays/' * 9}/x.tar?token=secret"
    text = to_yaml(load_config([f"--data.root={root}"], PROG))
    assert "secret" not in text.replace("\n", "")
    assert from_yaml(text, "x").data.root == root.replace("me:secret@", "").replace("=secret", "=***")
