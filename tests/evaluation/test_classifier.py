"""Classifiers that evaluations have trained: exported, they give their logits, and `ccmim predict` their classes."""

import csv
import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from made_run import make_run
from PIL import Image
from safetensors.torch import save_file

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.checkpoints.weight_files import read_safetensors
from ccmim_fast.cli import main
from ccmim_fast.commands.eval import evaluate
from ccmim_fast.commands.predict import SUFFIXES
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.evaluation.classifier import open_classifier
from ccmim_fast.export.predict import _WRITERS

SIDE, TEST, CLASSES = 32, 150, 3  # as the fixtures'
NEAR = {"rtol": 0, "atol": 1e-5}
SHORT = ["--train.batch_size=100", "--train.epochs=1", "--optim.warmup_epochs=0", "--run.test_every=100"]
TUNED = [*SHORT, "--optim.base_lr=5e-3", "--augment.auto=", "--augment.mixup=0", "--augment.cutmix=0"]
RUNS = {
    "avg": ["finetune", *TUNED],
    "cls": ["finetune", *TUNED, "--model.pool=cls", "--optim.ema=0.5", "--data.test_crop=0.875"],
    "probe": ["linear", *SHORT, "--head.rates=[1,10]", "--optim.base_lr=100", "--model.pool=cls"],
    "probe avg": ["linear", *SHORT, "--optim.base_lr=100", "--model.pool=avg", "--model.fc_norm=false"],
    "probe fc": ["linear", *SHORT, "--optim.base_lr=100", "--model.pool=avg", "--head.rates=[0.1]"],
    "attentive": ["attentive", *SHORT, "--optim.base_lr=0.25"],
}


@pytest.fixture(scope="module")
def tested(cache, tmp_path_factory):
    """The test images of the shapes as a folder of classes, with one file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    source = ShapesSource(1, TEST, (SIDE, SIDE), CLASSES, cache_dir=str(cache))
    for index in range(TEST):
        path = folder / source.class_names[source.labels_N[index]] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.array(source.decode(index))).save(path)
    (folder / source.class_names[0] / "bad.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def trained(encoder, cache, shared_settings, tmp_path_factory):
    """`trained("avg")` -> the folder of that one of `RUNS`, made once."""
    made = tmp_path_factory.mktemp("trained")

    def run(name):
        folder = made / name.replace(" ", "_")
        if not folder.exists():
            what, *settings = RUNS[name]
            where = [f"--data.root={cache}", f"--run.dir={folder}"]
            evaluate([what, str(encoder), *shared_settings, *where, *settings])
        return folder

    return run


def rows_of(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("avg", "csv"), ("cls", "parquet"), ("probe", "jsonl"), ("probe avg", "tsv"), ("probe fc", "csv")],
)
def test_predictions_are_those_of_the_evaluation(trained, tested, tmp_path, capsys, name, suffix):
    run, out = trained(name), tmp_path / "new" / f"table.{suffix}"
    assert main(["predict", str(run), str(tested), f"--out={out}", "--device=cpu", "--batch=64", "--top=2"]) == 0
    rows = rows_of(out)
    names = ["name", "label", "class", "probability", "class_2", "probability_2"]
    assert list(rows[0]) == names
    assert len(rows) == TEST
    right = sum(row["class"] == row["label"] for row in rows)
    figures = json.loads((run / "result.json").read_text())["figures"]
    figure = {"cls": "accuracy, averaged weights", "probe": max(figures, key=figures.get)}.get(name, "accuracy")
    assert right / TEST == pytest.approx(figures[figure], abs=1e-7)
    said = capsys.readouterr().out
    assert f"150 images, 3 classes, {right} of 150 right ({right / TEST:.2%}); 1 images cannot be used" in said
    assert all(row["name"].split("/")[-2] == row["label"] for row in rows)
    for row in rows:
        first, second = float(row["probability"]), float(row["probability_2"])
        assert 1 >= first >= second >= 0
        assert row["class"] != row["class_2"]


def test_images_of_unknown_classes_are_counted(trained, tmp_path, capsys):
    """They are neither right nor wrong: the share of the others is not told as if it were of all."""
    run, photos = trained("avg"), tmp_path / "photos"
    for number, label in enumerate((open_classifier(str(run)).classes[0], "zebra", "zebra")):
        (photos / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures()[0].numpy()).save(photos / label / f"{number}.png")
    command = ["predict", str(run), str(photos), f"--out={tmp_path / 'x.csv'}", "--device=cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "of 1 right" in said
    assert said.rstrip().endswith(", 2 of classes that the classifier has not")


def test_one_image_is_no_folder(trained, tmp_path, capsys):
    Image.fromarray(pictures()[0].numpy()).save(tmp_path / "one.png")
    (tmp_path / "list.csv").write_text("one.png,a\n")
    for name in ("one.png", "list.csv"):
        assert main(["predict", str(trained("avg")), str(tmp_path / name), f"--out={tmp_path / 'x.csv'}"]) == 3
        said = capsys.readouterr().err
        assert f"{name}' is no tar, table or list" in said
        assert "data.root" not in said


def pictures():
    return torch.randint(0, 256, (4, SIDE, SIDE, 3), dtype=torch.uint8)


def reference(run, images):
    """The logits as the evaluation computes them: timm's modules from the checkpoint, no function of the export."""
    state = io.newest(run / "checkpoints").state
    weights = state["model"]
    if state["ema"] is not None:
        weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES}
    pools = {"global_pool": "avg", "fc_norm": True} if "fc_norm.weight" in weights else {"global_pool": "token"}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes, **pools).eval()
    vit.load_state_dict(weights)
    mean, std = (torch.tensor(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return vit(((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous())


def probed(run, encoder, images, head, name):
    """The logits of a linear probe, step by step; the fresh norm of the mean has no weights yet."""
    from safetensors.torch import load_file

    weights = io.newest(run / "checkpoints").state["model"]
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    vit.load_state_dict(load_file(encoder))
    mean, std = (torch.tensor(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        if name == "probe fc":
            vit.norm = torch.nn.Identity()
        tokens = vit.forward_features(((images / 255 - mean) / std).permute(0, 3, 1, 2))
        x = tokens[:, 0] if name == "probe" else tokens[:, 1:].mean(1)
        x = torch.nn.functional.layer_norm(x, (48,), eps=1e-6) if name == "probe fc" else x
        x = (x - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-6).sqrt()
        return x @ weights[f"linears.{head}.weight"].T + weights[f"linears.{head}.bias"]


def normalised(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return ((images / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["avg", "cls", "probe", "probe avg", "probe fc"])
def test_timm_gives_the_logits(trained, encoder, tmp_path, name):
    """By arguments, strictly, and as a folder; what was exported predicts the same."""
    run, images = trained(name), pictures()
    if name.startswith("probe"):
        figures = json.loads((run / "result.json").read_text())["figures"]
        head = 0 if len(figures) == 1 else int(figures["rate x 10"] > figures["rate x 1"])
        expected = probed(run, encoder, images, head, name)
    else:
        expected = reference(run, images)
    file = tmp_path / "classifier.safetensors"
    assert main(["export", "timm", str(run), str(file)]) == 0
    assert main(["export", "timm", str(run), str(tmp_path / "folder")]) == 0
    weights, about = read_safetensors(str(file))
    by_hand = timm.create_model(about["timm_arch"], num_classes=CLASSES, **json.loads(about["timm_arguments"])).eval()
    by_hand.load_state_dict(weights)
    folder = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert str(run.parent) not in str(about), "places of this machine are told to nobody"
    assert str(encoder) not in str(about)
    classes = json.loads(about["classes"])
    assert folder.pretrained_cfg["label_names"] == classes == list(open_classifier(str(run)).classes)
    for vit in (by_hand, folder, *(open_classifier(str(tmp_path / one)).vit for one in ("folder", file.name))):
        with torch.no_grad():
            torch.testing.assert_close(vit(normalised(images)), expected, **NEAR)


def test_safetensors_under_our_names(trained, tmp_path):
    run, images = trained("avg"), pictures()
    assert main(["export", "safetensors", str(run), str(tmp_path / "out")]) == 0
    with torch.no_grad():
        found = open_classifier(str(tmp_path / "out")).vit(normalised(images))
    torch.testing.assert_close(found, reference(run, images), **NEAR)


@pytest.mark.parametrize("out", ["classifier.safetensors", "folder"])
def test_our_own_export_is_imported_without_its_head(trained, tmp_path, out):
    """A file, or the folder that `ccmim export safetensors` makes; evaluations read both."""
    place = tmp_path / out
    assert main(["export", "safetensors", str(trained("cls")), str(place)]) == 0
    classifier = open_classifier(str(place)).vit.state_dict()
    assert main(["import", str(place), "--out", str(tmp_path / "run")]) == 0
    imported = open_run(str(tmp_path / "run")).model.encoder.state_dict()
    shared = imported.keys() & classifier.keys()
    assert {"cls_token", "blocks.0.attn.qkv.weight", "norm.weight"} <= shared
    assert all(torch.equal(imported[name], classifier[name]) for name in shared - {"pos_embed"})
    read = read_weights(str(place)).tensors
    assert not any("head" in name for name in read)
    assert torch.equal(read["encoder.cls_token"], classifier["cls_token"])


@pytest.mark.parametrize(("name", "kind"), [("cls", "ViT"), ("avg", "Beit")])
def test_transformers_gives_the_logits(trained, tmp_path, name, kind):
    """Of files of another size: the processor shows what the evaluation shows, on a CPU."""
    transformers = pytest.importorskip("transformers")
    run, images = trained(name), torch.randint(0, 256, (2, 80, 64, 3), dtype=torch.uint8)
    (tmp_path / "photos").mkdir()
    for number, one in enumerate(images):
        Image.fromarray(one.numpy()).save(tmp_path / "photos" / f"{number}.png")
    assert main(["export", "hf-vit", str(run), str(tmp_path / "out")]) == 0
    model, said = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    assert type(model) is getattr(transformers, f"{kind}ForImageClassification")
    assert list(model.config.id2label.values()) == list(open_classifier(str(run)).classes)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="torchvision")
    pixels = processor([Image.fromarray(one.numpy()) for one in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels).logits
    table = tmp_path / "table.jsonl"
    assert main(["predict", str(run), str(tmp_path / "photos"), f"--out={table}", "--device=cpu", "--top=1"]) == 0
    found = torch.tensor([row["probability"] for row in rows_of(table)])
    torch.testing.assert_close(logits.softmax(-1).amax(-1), found, rtol=0, atol=1e-6)  # Pillow's pixels: 1e-5 off
    with torch.no_grad():  # and ours again
        torch.testing.assert_close(open_classifier(str(tmp_path / "out")).vit(pixels), logits, **NEAR)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("probe avg", "hf-vit: cannot express a classifier of the mean of tokens that are normed one by one"),
        ("attentive", "an attentive probe is no module of timm's"),
    ],
)
def test_what_has_no_such_form_is_refused(trained, tmp_path, capsys, name, words):
    assert main(["export", "hf-vit", str(trained(name)), str(tmp_path / "out")]) in (2, 5)
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert main(["export", "hf-vitmae", str(trained("avg")), str(tmp_path / "out")]) == 2
    assert "is a classifier, without a decoder; take timm, hf-vit, safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card_tells_classes_and_accuracy(trained, tmp_path):
    run = trained("cls")
    assert main(["export", "timm", str(run), str(tmp_path / "out"), f"--result={run / 'result.json'}"]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    figures = json.loads((run / "result.json").read_text())["figures"]
    for words in (
        f"| test images named right | {figures['accuracy, averaged weights']:.2%} |",
        "| weights | moving average |",
        "| finetune, finetune, accuracy | ",
        "0. disc\n1. square\n2. triangle\n",
        "the central 0.875 of an image's shorter side, cut out and resized to 32 x 32. timm resizes first",
        "| `model.pool` | cls |",
    ):
        assert words in text, words
    assert str(tmp_path) not in text
    assert "cache" not in text


def test_places_that_hold_no_classifier(trained, encoder, tested, tmp_path, capsys):
    """The encoder of a probe that is gone or another, runs of pretraining, other files."""
    make_run(tmp_path / "run")
    run = trained("probe avg")
    state = io.newest(run / "checkpoints").state
    moved, other, old = ({**state} for _ in range(3))
    told = state["classifier"]
    moved["classifier"] = told | {"encoder": told["encoder"] | {"name": str(tmp_path / "gone.safetensors")}}
    other["encoder"] = "0" * 64
    del old["classifier"]
    initial = {**state, "encoder": "timm:vit_tiny_patch16_224"}
    initial["classifier"] = told | {"encoder": told["encoder"] | {"name": "timm:vit_tiny_patch16_224"}}
    for name, made in (("moved", moved), ("other", other), ("old", old), ("initial", initial)):
        io.save(tmp_path / name / "checkpoints", 3, made, keep=1)
    for place, words in (
        (tmp_path / "run", "a run of pretraining, which knows no classes; name the folder of ccmim eval finetune"),
        (encoder, "tells no classes; expected a classifier as ccmim export writes it"),
        (tested, "no complete checkpoint in it"),
        (tmp_path / "moved", "a linear probe needs the encoder that it was trained on: "),
        (tmp_path / "other", "is not the encoder that this linear probe was trained on"),
        (tmp_path / "old", "no classifier that can be taken out"),
        (tmp_path / "initial", "trained on initial weights of vit_tiny_patch16_224, which no file holds"),
    ):
        assert main(["predict", str(place), str(tested), f"--out={tmp_path / 'x.csv'}", "--device=cpu"]) == 5, place
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line, line
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"classes": "5"}, "what it tells of itself is damaged"),
        ({"classes": '["disc"]'}, "3 logits for 1 classes"),
        ({"timm_arguments": '{"img_size": [32, 32], "num_heads": 3}'}, "what it tells of itself is damaged"),
        ({"timm_arguments": '{"img_size": [32, 32], "num_heads": 3, "global_pool": "map"}'}, "its head does not fit"),
        ({"timm_arguments": '{"img_size": [32, 32], "num_heads": 3, "global_pool": {}}'}, "its head does not fit"),
    ],
)
def test_an_export_that_tells_nonsense_of_itself_is_a_line(trained, tested, tmp_path, capsys, told, words):
    file = tmp_path / "classifier.safetensors"
    assert main(["export", "timm", str(trained("avg")), str(file)]) == 0
    weights, about = read_safetensors(str(file))
    save_file(weights, file, about | told)
    assert main(["predict", str(file), str(tested), f"--out={tmp_path / 'x.csv'}", "--device=cpu"]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_head_of_another_kind_is_a_line(trained, tmp_path, capsys, tested):
    """Without a bias, or two heads for an encoder that has one: what is there and what is expected are named."""
    file = tmp_path / "classifier.safetensors"
    assert main(["export", "timm", str(trained("avg")), str(file)]) == 0
    weights, about = read_safetensors(str(file))
    two = weights | {f"head_dist.{kind}": weights[f"head.{kind}"].clone() for kind in ("weight", "bias")}
    for changed, found in (
        ({name: value for name, value in weights.items() if name != "head.bias"}, "head.weight"),
        ({name: value for name, value in weights.items() if not name.startswith("head.")}, "none"),
        (two, "head.bias, head.weight, head_dist.bias, head_dist.weight"),
    ):
        save_file(changed, file, about)
        assert main(["predict", str(file), str(tested), f"--out={tmp_path / 'x.csv'}", "--device=cpu"]) == 5
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"expected head.bias, head.weight, found {found}"), line


def test_a_table_takes_no_others_place(trained, tested, tmp_path, capsys):
    (tmp_path / "x.csv").write_text("mine")
    line = ["predict", str(trained("avg")), str(tested)]
    assert main([*line, f"--out={tmp_path / 'x.csv'}"]) == 2
    assert "exists; remove it, or name another file" in capsys.readouterr().err
    assert (tmp_path / "x.csv").read_text() == "mine"
    assert main([*line, f"--out={tmp_path / 'x.xlsx'}"]) == 2
    assert "must end in .csv, .tsv, .parquet, .jsonl" in capsys.readouterr().err


def test_class_names_that_are_no_text(trained, tested, tmp_path, capsys):
    """Bytes of a folder's name: question marks in every table, and counted as the classes that they are."""
    name = os.fsdecode(b"na\xefve")
    shutil.copytree(tested, tmp_path / "photos")
    (tmp_path / "photos" / "disc").rename(tmp_path / "photos" / name)
    state = io.newest(trained("avg") / "checkpoints").state
    state["classifier"] = state["classifier"] | {"classes": [name, "square", "triangle"]}
    io.save(tmp_path / "run" / "checkpoints", 3, state, keep=1)
    expected = None
    for suffix in _WRITERS:
        out = tmp_path / f"x{suffix}"
        line = ["predict", str(tmp_path / "run"), str(tmp_path / "photos"), f"--out={out}", "--device=cpu", "--top=3"]
        assert main(line) == 0, capsys.readouterr().err
        rows = [(row["label"], {row["class"], row["class_2"], row["class_3"]}) for row in rows_of(out)]
        expected = expected or [(label, {"na?ve", "square", "triangle"}) for label, _ in rows]
        assert {label for label, _ in rows} == {"na?ve", "square", "triangle"}
        assert rows == expected
        assert "of 150 right" in capsys.readouterr().out


def test_a_command_names_every_table_that_is_written():
    assert {*SUFFIXES} == {*_WRITERS}
