"""The model card and the way to the hub, whose client is a made one here."""

import json

import pytest
from made_run import make_run

from ccmim_fast.cli import main
from ccmim_fast.export import hub


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run", data={"root": "/home/me/secret"}, mask={"ratio": 0.6})
    return str(tmp_path / "run")


class MadeHub:
    def __init__(self):
        self.calls = []

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))

    def upload_folder(self, **options):
        self.calls.append(("upload", options))


@pytest.fixture
def made_hub(monkeypatch):
    made = MadeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    return made


def test_the_card_tells_of_the_run(run, tmp_path):
    result = {"evaluation": "knn", "protocol": "knn_dino", "figures": {"top1": 0.4567}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    out = tmp_path / "out"
    assert main(["export", "timm", run, str(out), "--result", str(tmp_path / "result.json")]) == 0
    text = (out / "README.md").read_text()
    for words in (
        "library_name: timm",
        "vit_tiny_patch16_224, pretrained with ccMIM",
        "60% of an image's patches",
        "commit abc123",
        "| optimizer steps | 7 |",
        "| image size | 32 x 48, 3 channels |",
        "| `model.embed_dim` | 48 |",
        "| recons | 0.4 |",
        "| knn, knn_dino, top1 | 0.4567 |",
        'timm.create_model("local-dir:out", pretrained=True)',
        "mean [0.485, 0.456, 0.406]",
    ):
        assert words in text, words
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "The run holds no evaluation" not in text


def test_a_dry_run_uploads_nothing(run, tmp_path, capsys, made_hub):
    out = tmp_path / "out"
    assert main(["export", "timm", run, str(out), "--push", "me/model", "--private", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would go to me/model, private" in said
    assert all(name in said.split("would go")[1] for name in ("README.md", "config.json", "model.safetensors"))
    assert not made_hub.calls
    assert 'create_model("hf-hub:me/model"' in (out / "README.md").read_text()


def test_push(run, tmp_path, capsys, made_hub):
    out = tmp_path / "out"
    assert main(["export", "safetensors", run, str(out), "--push", "me/model"]) == 0
    (create, upload) = made_hub.calls
    assert create == ("create", "me/model", {"private": False, "exist_ok": True})
    assert (upload[1]["repo_id"], upload[1]["folder_path"]) == ("me/model", out)
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/model\n")


def test_a_push_that_fails_is_one_line(run, tmp_path, capsys, made_hub):
    def refuse(*args, **options):
        raise OSError("no network")

    made_hub.upload_folder = refuse
    out = tmp_path / "out"
    assert main(["export", "timm", run, str(out), "--push", "me/model"]) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "not uploaded: no network" in line
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["out", "--push", "model"], "must be OWNER/NAME"),
        (["x.safetensors", "--push", "me/model"], "needs a folder"),
        (["out", "--dry-run"], "are for --push"),
        (["out", "--result", "nowhere.json"], "no result of an evaluation"),
    ],
)
def test_mistakes(run, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "timm", run, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
