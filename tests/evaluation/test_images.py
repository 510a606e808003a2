"""What is left out of an evaluation's two sets: told before it begins, the same on all ranks, no end of a run."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_containers import write_tar
from PIL import Image
from ranks_launcher import run_ranks

from ccmim_fast import cli
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.images import with_classes

COLOURS = {"blue": (20, 30, 200), "green": (30, 180, 40), "red": (200, 30, 20)}
LINE = ["--data.image_size=[32,32]", "--data.workers=1", "--train.device=cpu", "--train.precision=fp32"]
TRAINS = ["--train.batch_size=6", "--train.epochs=1", "--optim.warmup_epochs=0", "--run.log_every=1"]
BY_NAME = {"knn": ["--knn.k=[1]"], "logreg": [], "views": ["--knn.k=[1]"]}
BY_NAME |= {"linear": TRAINS, "finetune": [*TRAINS, "--augment.auto="]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """Four images to train on and three to test on of each of three colours."""
    for part, count in (("train", 4), ("val", 3)):
        for name in COLOURS:
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for number in range(count):
                paint(name, number).save(tmp_path / "set" / part / name / f"{number}.png")
    return tmp_path / "set"


def paint(name, number):
    return Image.new("RGB", (48, 40), tuple(level + number for level in COLOURS[name]))


def spoil(path):
    """Cut the pixels off: the header stays, so that nobody notices when the file is indexed."""
    path.write_bytes(path.read_bytes()[:60])


def run(root, name, *settings, code=0):
    line = ["eval", name, "timm:test_vit", f"--data.root={root}", f"--run.dir={root.parent / 'out'}"]
    assert cli.main([*line, *LINE, *BY_NAME[name], *settings]) == code
    result = root.parent / "out" / "result.json"
    return json.loads(result.read_text()) if result.is_file() else None


@pytest.mark.parametrize("name", BY_NAME)
def test_images_that_do_not_decode_are_left_out_of_the_figures(root, name, capsys, monkeypatch):
    """One of nine to test on, one of twelve to train on; told before the first step."""
    for path in (root / "val" / "red" / "1.png", root / "train" / "blue" / "2.png"):
        spoil(path)
    result = run(root, name, "--data.max_bad=0.2")
    [(why, said)] = result["left_out"]["test"].items()
    assert (said["images"], said["of"]) == (1, 9)
    assert said["first"].endswith("val/red/1.png")
    for figure in result["figures"].values():
        assert figure * 8 == pytest.approx(round(figure * 8))
    said = capsys.readouterr().out
    assert said.count(f"left out: 1 of 9 images to test on {why}, the first") == 1
    if name in ("linear", "finetune"):
        assert why == "that cannot be read"
        assert said.index("images to test on") < said.index("step 1")
        assert "sample 2 is left out: cannot decode" in said
    else:
        assert result["left_out"]["train"][why]["images"] == 1
    assert f"1 of 9 images to test on {why}" in (root.parent / "out" / "result.md").read_text()


@pytest.mark.parametrize("name", ["knn", "linear"])
@pytest.mark.parametrize("setting", ["--data.on_error=error", "--data.max_bad=0.1"])
def test_too_many_bad_ones_end_the_command_before_the_folder(root, name, setting, capsys, monkeypatch):
    for number in range(2):
        spoil(root / "val" / "red" / f"{number}.png")
    run(root, name, setting, code=3)
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"cannot decode .*val/red/\d\.png", line)
    assert name == "knn" or not (root.parent / "out").exists()


def test_one_that_goes_bad_later_is_left_out_too(root, monkeypatch, capsys):
    """Read when the evaluation begins, gone when it is tested."""
    decode = IndexedSource.decode
    reads = []

    def once(self, index):
        if self.name(index).endswith("val/green/0.png"):
            reads.append(index)
            if len(reads) > 1:
                raise DataError("green: gone")
        return decode(self, index)

    monkeypatch.setattr(IndexedSource, "decode", once)
    result = run(root, "linear")
    assert result["left_out"] == {
        "train": {},
        "test": {"that failed while they were shown": {"images": 1, "of": 9, "first": str(root / "val/green/0.png")}},
    }
    figure = result["figures"]["accuracy"] * 8
    assert figure == pytest.approx(round(figure))
    assert capsys.readouterr().out.count("that failed while they were shown") == 1


def test_a_neighbour_less_where_a_training_image_fails(root):
    spoil(root / "train" / "red" / "0.png")
    assert run(root, "knn", "--knn.k=[1,11,12]", "--data.max_bad=0.2")["figures"].keys() == {"k=1", "k=11"}


def test_a_class_that_training_does_not_know_is_told(root, capsys):
    """As is one whose only training image cannot be used; order and number of classes are those of the training set."""
    shutil.copytree(root / "val" / "red", root / "val" / "black")
    shutil.rmtree(root / "train" / "blue")
    result = run(root, "knn")
    assert result["chance"] == 1 / 2
    [(why, said)] = result["left_out"]["test"].items()
    assert why == "of 2 classes that training does not know ('black', 'blue')"
    assert said == {"images": 6, "of": 12, "first": str(root / "val/black/0.png")}
    assert result["figures"] == {"k=1": 1.0}
    assert "left out: 6 of 12 images to test on of 2 classes" in capsys.readouterr().out


def table(path, names, labels):
    """A table as Hugging Face's datasets write one, which names its classes."""
    images = []
    for place, label in enumerate(labels):
        colour = "red" if label is None or not 0 <= label < len(names) else names[label]
        file = path.with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        paint(colour, place).save(file)
        images.append(file.read_bytes())
        file.unlink()
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    columns = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    pq.write_table(columns.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


def test_tables_with_classes_in_another_order_and_rows_without_one(tmp_path, capsys):
    """None and -1 are no label; the number of a class is another in the other table."""
    root = tmp_path / "set"
    table(root / "train" / "0.parquet", ["blue", "green", "red"], [0, 1, 2, 0, 1, 2, None, -1])
    table(root / "val" / "0.parquet", ["red", "blue", "green"], [0, 1, 2, None, -1, -1, 0])
    result = run(root, "knn")
    assert result["figures"] == {"k=1": 1.0}
    assert result["images"] == "6 images of 3 classes to train on, 4 images of 3 classes to test on"
    assert {part: said["without a label"]["images"] for part, said in result["left_out"].items()} == {
        "train": 2,
        "test": 3,
    }
    assert capsys.readouterr().out.count("without a label, the first") == 2


def test_a_tar_and_a_list_without_some_labels(tmp_path, root):
    file = (root / "train" / "red" / "0.png").read_bytes()
    for part in ("train", "val"):
        members = []
        for number in range(6):
            label = b"none" if number == 4 else b"%02d" % (number % 2)
            members += [(f"{number}.png", file), (f"{number}.cls", label)]
        (tmp_path / "tars" / part).mkdir(parents=True)
        write_tar(tmp_path / "tars" / part / "0.tar", members)
    assert run(tmp_path / "tars", "linear", "--train.batch_size=5")["images"].startswith(
        "5 images of 2 classes to train on, 5 images of 2"
    )
    shutil.rmtree(tmp_path / "out")
    lines = [f"set/train/{name}/{n}.png\t{name}" for name in COLOURS for n in range(4)]
    (tmp_path / "train.tsv").write_text("\n".join([*lines, "set/val/red/0.png"]))
    (tmp_path / "val.tsv").write_text("set/val/red/1.png\tred\nset/val/blue/0.png\n")
    result = run(tmp_path / "train.tsv", "logreg", f"--data.test={tmp_path / 'val.tsv'}")
    assert result["images"] == "12 images of 3 classes to train on, 1 images of 3 classes to test on"


def one_class(root):
    for name in ("blue", "red"):
        shutil.rmtree(root / "train" / name)


def other_classes(root):
    for name in COLOURS:
        (root / "val" / name).rename(root / "val" / name.upper())


def nothing_to_read(root):
    for path in root.glob("val/*/*.png"):
        spoil(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_class, "of one class alone, 'green'"),
        (other_classes, "its own classes: 'BLUE'"),
        (nothing_to_read, "none of the .*images"),
    ],
)
@pytest.mark.parametrize("name", BY_NAME)
def test_what_cannot_be_an_evaluation_is_one_line_and_leaves_nothing(root, change, words, name, capsys):
    change(root)
    run(root, name, "--data.max_bad=1", code=3)
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(words, line)
    assert change is nothing_to_read or not (root.parent / "out").exists()


@pytest.mark.parametrize("name", ["knn", "logreg", "linear"])
def test_one_image_of_each_class(root, name):
    for path in [*root.glob("train/*/[1-3].png"), *root.glob("val/*/[1-3].png")]:
        path.unlink()
    result = run(root, name, *["--train.batch_size=3"] * (name == "linear"))
    assert result["images"] == "3 images of 3 classes to train on, 3 images of 3 classes to test on"
    assert name == "linear" or set(result["figures"].values()) == {1.0}


@pytest.mark.parametrize(
    ("name", "setting", "near"),
    [
        ("knn", "--knn.k=[1,3,1]", "[1, 3]"),
        ("logreg", "--logreg.c=[0.1,1e-1]", "[0.1]"),
        ("linear", "--head.rates=[1,1.0,2]", "[1.0, 2.0]"),
        ("linear", "--optim.milestones=[0.5,0.5]", "[0.5]"),
    ],
)
def test_a_list_that_names_a_number_twice(root, name, setting, near, capsys):
    """It would count twice, or one of two equal names would be lost."""
    run(root, name, setting, code=2)
    assert f"must be a list that names each number once; nearest valid is {near}" in capsys.readouterr().err


def test_a_presets_warm_up_is_of_a_shorter_run_the_same_share(root, capsys):
    """10 of 90 epochs; one that the user names is refused where the run is shorter."""
    line = ["eval", "linear", "timm:test_vit", f"--data.root={root}", f"--run.dir={root.parent / 'out'}", *LINE]
    line += ["--train.batch_size=6", "--train.epochs=1"]
    assert cli.main([*line, "--optim.warmup_epochs=2"]) == 2
    assert "optim.warmup_epochs=2.0: must be at most the length of the run, 1 epochs" in capsys.readouterr().err
    assert cli.main(line) == 0
    result = json.loads((root.parent / "out" / "result.json").read_text())
    assert result["config"]["optim.warmup_epochs"] == pytest.approx(10 / 90)
    assert any(deviation.startswith("optim.warmup_epochs: 0.111") for deviation in result["deviations"])


def test_labels_that_are_no_class_are_no_crash():
    """A label at or above the number of names, as a damaged or hostile index has."""
    train, test = ShapesSource(0, 6, (32, 32), 3), ShapesSource(1, 6, (32, 32), 3)
    train.labels_N, test.labels_N = np.array([0, 1, 2, 3, -7, 0]), np.array([2**31 - 1, 0, 1, 2, 2, -1])
    train, test = with_classes(train, test, ("a", "b"))
    assert train.excluded_X.tolist() == [3, 4]
    assert test.excluded_X.tolist() == [0, 5]
    assert usable_count(test) == 4
    test.labels_N = np.full(6, -1)
    with pytest.raises(DataError, match="b: none of its 6 images is usable and of a class of a; its own classes: "):
        with_classes(train, test, ("a", "b"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_ranks_leave_out_the_same_and_wait_for_nobody(root, name):
    """One bad image is of one rank alone, and of three test images one rank of four has none."""
    for path in [*root.glob("val/red/*.png"), *root.glob("val/blue/[01].png"), root / "val" / "green" / "2.png"]:
        path.unlink()
    spoil(root / "val" / "green" / "0.png")
    out = root.parent / "out"
    line = ["eval", name, "timm:test_vit", f"--data.root={root}", f"--run.dir={out}", *LINE, *BY_NAME[name]]
    more = ["--train.batch_size=8"] if name in ("linear", "finetune") else []
    run_ranks(4, "-m", "ccmim_fast.cli", *line, *more, "--data.max_bad=0.5")
    result = json.loads((out / "result.json").read_text())
    [said] = result["left_out"]["test"].values()
    assert (said["images"], said["of"]) == (1, 3)
    for figure in result["figures"].values():
        assert figure * 2 == pytest.approx(round(figure * 2))
