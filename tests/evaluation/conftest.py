"""Features that are known to work, and evaluations of them as a user starts them."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from ccmim_fast.commands.eval import evaluate
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream.torch_loader import evaluation_batches

CLASSES, TRAIN, TEST, SIDE = 3, 300, 150, 32
EPOCHS = 30
SETTINGS = [
    "--data.source=shapes",
    f"--data.image_size=[{SIDE},{SIDE}]",
    f"--data.samples={TRAIN}",
    f"--data.test_samples={TEST}",
    f"--data.classes={CLASSES}",
    "--data.test_crop=1",
    "--data.crop_scale=[0.9,1]",
    "--data.flip=false",
    "--data.workers=1",
    "--model.arch=vit_tiny_patch16_224",
    "--train.device=cpu",
    "--train.precision=fp32",
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Folder of the pictures, drawn once."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, cache):
    """A ViT of two blocks under timm's names that was told the labels of these very shapes, those to test on too.

    Its features are known to work, so an evaluation that finds nothing in them is wrong.
    """
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, global_pool="avg", fc_norm=False, **sizes)
    parts = []
    for seed, count in ((0, TRAIN), (1, TEST)):
        source = ShapesSource(seed, count, (SIDE, SIDE), CLASSES, cache_dir=str(cache))
        parts += evaluation_batches(source, (SIDE, SIDE), count, torch.device("cpu"))
    images = torch.cat([((part.images_BHWC / 255 - 0.45) / 0.225).permute(0, 3, 1, 2) for part in parts]).contiguous()
    labels = torch.cat([part.labels_B for part in parts])
    optimizer = torch.optim.AdamW(vit.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(50):
            F.cross_entropy(vit(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    told = {"timm_arguments": json.dumps({"img_size": [SIDE, SIDE]})}
    save_file({name: value for name, value in vit.state_dict().items() if not name.startswith("head.")}, path, told)
    return path


@pytest.fixture(scope="session")
def shared_settings():
    """What every evaluation of the tests is told."""
    return SETTINGS


@pytest.fixture
def evaluated(encoder, cache, tmp_path):
    """`evaluated("knn", "--knn.k=[5]")` -> what result.json holds."""

    def run(name, *settings, checkpoint=encoder, folder="out"):
        where = [f"--data.root={cache}", f"--run.dir={tmp_path / folder}"]
        evaluate([name, str(checkpoint), *SETTINGS, *where, *settings])
        return json.loads((tmp_path / folder / "result.json").read_text())

    return run


@pytest.fixture
def miniature(tmp_path):
    """A folder of ADE20K's layout: five images to train on, three to test on, of three classes side by side.

    Image i is 20 + i pixels high and 24 wide. Its first column is of no class; its grey value says which class the
    other pixels are of.
    """
    root = tmp_path / "ADEChallengeData2016"
    for part, count in (("training", 5), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for index in range(count):
            numbers_HW = np.repeat(np.arange(24, dtype=np.uint8)[None] // 8 + 1, 20 + index, axis=0)
            numbers_HW[:, 0] = 0
            grey = Image.fromarray(60 * numbers_HW)
            grey.convert("RGB").save(root / "images" / part / f"ADE_{part}_{index}.jpg", quality=100)
            Image.fromarray(numbers_HW).save(root / "annotations" / part / f"ADE_{part}_{index}.png")
    names = "1\t.5\t9\t9\twall\n2 \t.3\t9\t9\tsea, ocean\n3\t.2\t9\t9\tbed \n"
    (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{names}")
    return root
