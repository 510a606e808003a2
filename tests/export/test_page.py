"""docs/export.md: its commands and its Python run in order, and every reader finds our tokens."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from made_run import make_run
from PIL import Image
from tiny import images, tiny_model

from ccmim_fast.checkpoints.convert import to_flat
from ccmim_fast.cli import main
from ccmim_fast.evaluation.classifier import Logits, open_classifier
from ccmim_fast.models.tokens import tokens_of

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SQUARE = {"image_size": (32, 32)}


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch):
    for library in ("transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, _ = make_run(tmp_path / "runs" / "mine", data=SQUARE, model={"depth": 1})
    (picture,) = images(1, (32, 32))
    (tmp_path / "photos").mkdir()
    for path in ("photo.png", "photos/a.png"):
        Image.fromarray(picture.numpy()).save(path)
    tune = [
        "--data.source=shapes",
        "--data.samples=24",
        "--data.test_samples=12",
        "--data.classes=3",
        "--data.root=shapes",
    ]
    tune += ["--data.image_size=[32,32]", "--data.test_crop=1", "--train.batch_size=12", "--train.epochs=1"]
    tune += ["--optim.warmup_epochs=0", "--train.device=cpu", "--run.tensorboard=false"]
    assert main(["eval", "finetune", "runs/mine", *tune]) == 0
    # As many heads as MAE has.
    like = {"model": {"num_heads": 12}, "decoder": {"dim": 64, "num_heads": 16}, "contrast": {"loss": "none"}}
    mae, _ = tiny_model(torch.float32, data=SQUARE, **like)
    torch.save({"model": to_flat(mae.state_dict())}, "mae.pth")
    with torch.no_grad():
        expected = tokens_of(model.encoder, model.mean_C, model.std_C)(picture[None])

    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names, checked = {}, 0
    for kind, text in blocks:
        if kind == "bash":
            for line in text.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
            continue
        names.pop("tokens", None)
        with torch.no_grad():
            exec(text, names)
        if "tokens" in names:
            torch.testing.assert_close(torch.as_tensor(names["tokens"]), expected, rtol=0, atol=1e-5)
            checked += 1
    assert checked == 4
    of = open_classifier("runs/mine/eval/finetune")
    with torch.no_grad():
        logits = Logits(of.vit, of.encoder.mean, of.encoder.std)(picture.permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(names["logits"], logits, rtol=0, atol=1e-5)
    session = names["onnxruntime"].InferenceSession("classifier.onnx")
    (found,) = session.run(["logits"], {"images": names["images"]})
    torch.testing.assert_close(torch.from_numpy(found), logits, rtol=0, atol=1e-5)
    assert names["name"] == of.classes[int(logits.argmax())] == of.classes[int(names["label"])]
    assert f",{names['name']}," in Path("classes.csv").read_text().splitlines()[1]
    assert names["new"].vit.embeddings.position_embeddings.any()
    assert names["new"].decoder.decoder_pos_embed.any()
    assert not Path("out/onnx/model.onnx.data").exists()
    assert names["loss"] > 0
    torch.testing.assert_close(torch.tensor(names["features"]), expected[:, 1:].mean(1), rtol=0, atol=1e-5)
