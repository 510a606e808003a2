"""`ccmim ablate`: what is run, what is kept, and what its tables say."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from ccmim_fast.ablation import run as run_module
from ccmim_fast.ablation import runs as runs_module
from ccmim_fast.ablation.run import equal_time
from ccmim_fast.ablation.runs import (
    Run,
    finished,
    flops_per_image,
    labelled_images,
    measure_features,
    measure_run,
    run_all,
)
from ccmim_fast.ablation.table import difference, markdown, plot, views_markdown
from ccmim_fast.ablation.variants import ABLATIONS, lambda_of, score_variants
from ccmim_fast.build.model import build_model
from ccmim_fast.cli import main
from ccmim_fast.commands.ablate import ablate
from ccmim_fast.config.load import load_config, to_yaml
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.evaluation.frozen.views import VIEWS

TINY = [
    "--config=demo",
    "--data.samples=24",
    "--data.classes=2",
    "--data.image_size=[32,32]",
    "--model.embed_dim=48",
    "--model.num_heads=3",
    "--model.depth=2",
    "--decoder.dim=32",
    "--train.batch_size=8",
    "--train.epochs=4",
    "--optim.warmup_epochs=1",
]


VIEW_KEYS = [f"{name}{view}" for name in ("knn", "logreg") for view in VIEWS if view]


def figures(variant, seed, auroc, rate=100.0, epochs=8):
    keys = ("auroc_all", "leakage", "knn", "logreg", "recons")
    looks = [{"epoch": epoch, "auroc": auroc} for epoch in (2, 4)]
    base = {"variant": variant, "seed": seed, "epochs": epochs, "auroc": auroc, "images_per_second": rate}
    return {**base, **dict.fromkeys(keys, 0.5), "looks": looks}


@pytest.fixture
def few_images(monkeypatch):
    """Fewer than a thousand to look at."""
    monkeypatch.setattr(runs_module, "PROBED", 24)
    monkeypatch.setattr("ccmim_fast.ablation.runs.HELD_OUT", 24)


@pytest.mark.slow
def test_a_run_is_measured_on_its_way_and_kept(few_images, tmp_path):
    options = (*TINY, f"--data.root={tmp_path / 'shapes'}", "--score.source=bank")
    run = Run("bank, grid 8", 3, (*options, "--score.grid=8"))
    folder = tmp_path / run.folder_name
    assert run.folder_name == "bank--grid-8-seed3"
    found = measure_run(run, folder, threads=2, test="")
    assert [look["epoch"] for look in found["looks"]] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for value in found["looks"][-1].values())
    assert found["auroc"] == found["looks"][-1]["auroc"]
    assert {"knn", "logreg", *VIEW_KEYS, "images_per_second"} <= found.keys()
    seconds = [look["seconds"] for look in found["looks"]]
    assert seconds == sorted(seconds)
    kept = load_config(["--config", str(folder / "config.yaml")], "test")
    assert (kept.seed, kept.score.grid, kept.run.dir) == (3, 8, str(folder))
    # Again: read, not run. So a figure that somebody changed comes back changed.
    (folder / "summary.json").write_text(json.dumps({**found, "knn": 2.0}))
    assert run_all([run], tmp_path, jobs=1)[0]["knn"] == 2.0
    # Of other settings they are no one's figures.
    with pytest.raises(ConfigError, match="was run with other settings"):
        run_all([run._replace(options=(*run.options, "--train.epochs=2"))], tmp_path, jobs=1)


@pytest.mark.slow
def test_the_command_writes_a_table(tmp_path, capsys):
    settings = [*TINY, f"--data.root={tmp_path / 'shapes'}", "--data.samples=32"]
    options = ["--only", "random", "all", "bank", "--seeds", "1", "--jobs", "2"]
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out" / "table")]
    ablate(["score", *options, *where, *settings])
    path, text = tmp_path / "out" / "table.md", (tmp_path / "out" / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:5]] == ["random", "all", "bank"]
    assert "bank - all, auroc:" in text
    assert "| kNN | average | [CLS] | both | average (visible) |" in text
    assert "--seeds 1" in text
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["runs"]) >= 3
    assert (tmp_path / "out" / "table.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "random, seed 0: auroc 0.500" in printed
    assert printed.endswith(f"{path}\n")


@pytest.mark.slow
def test_images_of_a_user_have_accuracies_and_no_objects(tmp_path):
    for part, count in (("train", 20), ("val", 8)):
        source = ShapesSource(part == "val", count, (32, 32), 2)
        for i in range(count):
            folder = tmp_path / part / source.class_names[source.labels_N[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.decode(i)).save(folder / f"{i}.png")
    settings = [*TINY, "--data.source=images", f"--data.root={tmp_path / 'train'}", "--train.batch_size=4"]
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "table")]
    options = ["--only", "MAE", "NCE, lambda 0.2", "--seeds", "1", *where]
    ablate(["lambda", *options, "--test", str(tmp_path / "val"), *settings])
    text = (tmp_path / "table.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("|"))
    assert head == "| | epochs | kNN | logistic regression | L_recons | img/s |"
    assert "NCE, lambda 0.2 - MAE, logreg:" in text
    assert "auroc" not in text


@pytest.fixture
def user_images(tmp_path):
    """Two classes to train on; to test on one of them, one that training does not know, and a file that is cut."""
    for part, names in (("train", ("cat", "dog")), ("val", ("dog", "owl"))):
        for number, name in enumerate(2 * names):
            path = tmp_path / part / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (60 * number, 20, 90)).save(path)
    path = tmp_path / "val" / "dog" / "9.png"
    path.write_bytes((tmp_path / "val" / "dog" / "0.png").read_bytes()[:60])
    settings = [*TINY, "--data.source=images", f"--data.root={tmp_path / 'train'}", "--train.batch_size=4"]
    return load_config(settings, "test"), settings, tmp_path


def test_accuracies_are_of_what_has_a_class_and_can_be_read(user_images):
    config, _, folder = user_images
    train, held_out = labelled_images(config, str(folder / "val"))
    assert train.class_names == held_out.class_names == ("cat", "dog")
    assert [len(ids_X) for ids_X in held_out.left_out.values()] == [2]
    figures = measure_features(build_model(config).eval(), config, train, held_out)
    # Two of three dogs can be read.
    assert all(2 * figure == round(2 * figure) for figure in figures.values())


def test_images_without_classes_end_an_ablation_before_its_first_run(user_images, monkeypatch):
    _, settings, folder = user_images
    monkeypatch.setattr("ccmim_fast.ablation.run.run_all", lambda *_: pytest.fail("a run was begun"))
    where = ["--runs", str(folder / "runs"), "--out", str(folder / "table"), "--seeds=1"]
    (folder / "flat").mkdir()
    (folder / "val" / "dog" / "0.png").rename(folder / "flat" / "0.png")
    with pytest.raises(DataError, match=r"--test=\S+flat: its images have no labels"):
        ablate(["lambda", *where, "--test", str(folder / "flat"), *settings])
    for path in (folder / "val" / "dog").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"--test=\S+val: none of its 2 images is usable and of a class of data\.root"):
        ablate(["lambda", *where, "--test", str(folder / "val"), *settings])


def test_variants_change_what_they_say():
    base = load_config(["--config=demo"], "test")
    found = {name: load_config(["--config=demo", *options], "test") for name, options in score_variants(base).items()}
    assert [name for name in found if name.startswith("block")] == ["block 1", "block 2", "block 3"]
    assert found["block 2"].score.block == 2
    assert found["MAE"].contrast.loss == "none"
    assert found["bank, momentum 0.9"].score.momentum == 0.9
    assert found["bank, unseen random"].score.unseen == "random"
    large = score_variants(load_config(["--config=ccmim_vit_large", "--data.root=."], "test"))
    assert [name for name in large if name.startswith("block")][-1] == "block 23"
    different = {str(config) for config in found.values()}
    assert len(different) == len(found)


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_variant_is_another_run_that_is_valid(name):
    ablation = ABLATIONS[name]
    variants = ablation.variants(load_config(["--config=demo"], "test"))
    found = [load_config(["--config=demo", *options], "test") for options in variants.values()]
    assert len({str(config) for config in found}) == len(found)
    named = {*ablation.lines, *(variant for pair in ablation.compared for variant in pair)}
    assert named <= variants.keys()


def test_the_papers_ablations():
    """Table 5's ways to divide, Figure 2's two losses from no regularisation to lambda 1."""
    base = load_config(["--config=demo"], "test")
    divided = [load_config(["--config=demo", *o], "test") for o in ABLATIONS["strategy"].variants(base).values()]
    strategies = ["random", "random", "block", "importance", *["importance_sampling"] * 2]
    assert [config.mask.strategy for config in divided] == strategies
    assert [config.contrast.loss for config in divided] == ["none", *["nce"] * 5]
    contrasts = [load_config(["--config=demo", *o], "test") for o in ABLATIONS["lambda"].variants(base).values()]
    by_loss = {(config.contrast.loss, config.contrast.weight) for config in contrasts}
    assert by_loss == {("none", 0.2), ("nce", 0.0)} | {
        (loss, w) for loss in ("nce", "align") for w in (0.1, 0.2, 0.5, 0.8, 1.0)
    }
    depths = [load_config(["--config=demo", *o], "test") for o in ABLATIONS["decoder"].variants(base).values()]
    assert [config.decoder.depth for config in depths] == [1, 2, 4, 8]


def test_an_ablation_of_the_division_is_of_the_named_settings():
    """Whatever the base has: a variant changes one setting, and MAE is MAE."""
    base = ["--config=demo", "--mask.hints=0.2", "--mask.importance=[0.1,0.9]", "--score.temperature=[3,2]"]
    variants = ABLATIONS["division"].variants(load_config(base, "test"))
    found = {}
    for name, options in variants.items():
        config = load_config([*base, *options], "test")
        found[name] = (config.mask.hints, config.mask.importance, config.score.temperature)
    plain = (0.0, 1.0, 1.0)
    assert found == {
        **dict.fromkeys(("MAE", "random", "bank"), plain),
        **{f"hints {share}": (share, 1.0, 1.0) for share in (0.1, 0.3)},
        **{f"importance {share}": (0.0, share, 1.0) for share in (0.25, 0.5, 0.75)},
        **{f"temperature {number}": (0.0, 1.0, float(number)) for number in (2, 4)},
        "importance 0 to 0.5": (0.0, (0.0, 0.5), 1.0),
        "temperature 4 to 1": (0.0, 1.0, (4.0, 1.0)),
    }
    for name in ("score", "strategy", "teacher"):  # theirs are valid on that base, too
        for options in ABLATIONS[name].variants(load_config(base, "test")).values():
            load_config([*base, *options], "test")


@pytest.mark.slow
def test_a_failed_run_ends_the_others(few_images, tmp_path):
    """Not after all that are waiting; one or two of them may have begun."""
    options = (*TINY, f"--data.root={tmp_path / 'shapes'}")
    bad = Run("bad", 0, (*options, "--score.gird=8"))
    with pytest.raises(ConfigError, match=r"score\.gird"):
        run_all([bad, *(Run("good", seed, options) for seed in range(4))], tmp_path / "runs", jobs=1)
    assert len(list((tmp_path / "runs").glob("good*"))) < 4


def test_slower_variants_get_the_banks_time():
    flops = {"bank": 1e9, "all": 1.6e9, "first": 1.02e9, "random": 0.9e9, "all, temperature 2": 1.6e9}
    assert equal_time(flops, 20, "bank") == {"all": 12, "all, temperature 2": 12}


def test_a_step_is_counted_as_its_losses_and_tokens_say():
    """Of the demo: without the teacher, with a third of its tokens, with all."""
    bank = ["--config=demo", "--score.source=bank"]
    none, third, whole = (
        flops_per_image([*bank, *more])
        for more in (["--mask.strategy=random", "--contrast.loss=none"], ["--teacher.tokens=0.3333"], [])
    )
    # The teacher's three whole blocks of 48 tokens, and their embedding; 16 tokens have a third of the products.
    products = 2 * 12 * 128**2 * 3
    assert whole - third == pytest.approx(products * 32, rel=0.2)
    assert none < third
    # Of runs that a CPU cannot carry out, too.
    on_cuda = ["--train.device=cuda", "--train.precision=fp16", "--train.attention=xformers", "--train.kernels=triton"]
    assert flops_per_image([*bank, *on_cuda, "--train.cuda_graph=true", "--data.loader=dali"]) == whole


def test_figures_over_seeds(tmp_path):
    found = [figures("all", 0, 0.8), figures("all", 1, 0.9), figures("bank", 1, 0.95), figures("bank", 0, 0.82)]
    assert "| all | 8 | 0.850 ± 0.071 |" in markdown(found)
    mean, deviation = difference(found, "bank", "all", "auroc")
    assert (mean, deviation) == (pytest.approx(0.035), pytest.approx(0.0212, abs=1e-4))
    plot(found, ABLATIONS["score"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_all_views_stand_in_tables_of_their_own():
    """Also beside runs of an older version, whose figures are of the average alone."""
    whole = [{**figures("all", seed, 0.8), **dict.fromkeys(VIEW_KEYS, 0.25 + seed / 10)} for seed in (0, 1)]
    tables = views_markdown(whole).split("\n\n")
    head = "average | [CLS] | both | average (visible) | [CLS] (visible) | both (visible) |"
    assert [table.splitlines()[0] for table in tables] == [f"| logistic regression | {head}", f"| kNN | {head}"]
    assert tables[0].splitlines()[2] == f"| all | 0.500 ± 0.000 |{' 0.300 ± 0.071 |' * 5}"
    assert views_markdown([*whole, figures("bank", 0, 0.9)]) == ""
    assert "[CLS] (visible)" not in markdown(whole)


def test_lambdas_are_points_of_two_curves(tmp_path):
    names = ["MAE", "lambda 0", *(f"{loss}, lambda {x}" for loss in ("NCE", "align") for x in (0.1, 0.2))]
    assert [lambda_of(name) for name in names] == [
        None,
        None,
        ("NCE", 0.1),
        ("NCE", 0.2),
        ("align", 0.1),
        ("align", 0.2),
    ]
    found = [figures(name, seed, 0.8) for name in names for seed in (0, 1)]
    plot(found, ABLATIONS["lambda"], tmp_path / "lambda.png")
    assert (tmp_path / "lambda.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "ccmim ablate: the ablation is missing; one of score, strategy, lambda, decoder"),
        (["scores"], "'scores': no such ablation; nearest: score; one of score"),
        (["strategy", "--seeds", "0"], "--seeds: '0' must be a whole number from 1 on"),
        (["score", "--only", "bnk"], "--only='bnk': no such variant; one of: MAE; random"),
        (["lambda", "--test=elsewhere"], "--test=elsewhere: data.source=shapes makes its own; nearest is images"),
        (["lambda", "--data.source=images", "--data.root=.", "--test=gone"], "--test=gone: no such folder"),
        (["decoder", "--score.gird=8"], "score.gird"),
        (["decoder", "--seed", "3"], "--seed: each run has its own; use --seeds N"),
        (["decoder", "--run.dir=here"], "--run.dir: each run has its own; use --runs DIR"),
    ],
)
def test_mistakes_are_one_line(argv, said):
    with pytest.raises(ConfigError) as caught:
        ablate(argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def finished_run(tmp_path, settings):
    """A run of the file `settings`, as it stands when it is done."""
    run = Run("all", 0, ("--config", str(settings), "--train.epochs=4"))
    folder = tmp_path / run.folder_name
    folder.mkdir()
    config = load_config([*run.options, "--seed=0", f"--run.dir={folder}", "--overwrite"], "test")
    (folder / "config.yaml").write_text(to_yaml(config))
    figures = {"images_per_second": 1.0, "looks": [], "options": list(run.options), "test": ""}
    (folder / "summary.json").write_text(json.dumps(figures))
    return run, folder


def test_a_file_of_settings_that_changed_makes_it_another_run(tmp_path):
    settings = tmp_path / "x.yaml"
    settings.write_text("optim: {warmup_epochs: 1}\ndata: {root: 'https://me:pass@host/x'}\nmask: {ratio: 0.5}")
    run, folder = finished_run(tmp_path, settings)
    assert finished(run, folder, "")["images_per_second"] == 1.0
    settings.write_text(settings.read_text().replace("0.5", "0.6"))
    with pytest.raises(ConfigError, match=r"was run with other settings \(mask\.ratio\); choose another --runs"):
        finished(run, folder, "")
    settings.write_text(settings.read_text().replace("0.6", "0.5").replace("pass", "other"))
    assert finished(run, folder, "")
    with pytest.raises(ConfigError, match=r"was run with other settings \(seed\)"):
        finished(run._replace(seed=1), folder, "")
    with pytest.raises(ConfigError, match=r"was run with other settings \(--test\)"):
        finished(run, folder, "other")


def test_a_table_takes_no_other_file_s_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("mine")
    assert main(["ablate", "score", "--out", "notes", *TINY]) == 2
    assert "--out=notes: notes.md exists and is no ablation's; name another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
    Path("notes.json").write_text(json.dumps({"environment": {}, "runs": []}))
    run_module._check_out(Path("notes"))


@pytest.mark.parametrize(("name", "text"), [("summary.json", "{"), ("summary.json", "[]"), ("config.yaml", "\0")])
def test_damaged_records_of_a_done_run_are_one_line(tmp_path, name, text):
    (tmp_path / "x.yaml").write_text("optim: {warmup_epochs: 1}")
    run, folder = finished_run(tmp_path, tmp_path / "x.yaml")
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=r"its summary\.json or config\.yaml is damaged .*; remove it"):
        finished(run, folder, "")
