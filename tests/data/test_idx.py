"""IDX files, as MNIST's: the table that `ccmim data idx` writes has their pixels and their labels."""

import errno
import gzip
import struct

import numpy as np
import pytest

from ccmim_fast.cli import main
from ccmim_fast.data.idx import write_table
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.errors import DataError

IMAGES_NHW = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
LABELS = bytes([3, 0, 9, 3, 3, 1, 0])


def idx(shape, content, kind=8):
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


IMAGES = idx((7, 5, 3), IMAGES_NHW.tobytes())


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_labels(tmp_path, monkeypatch, capsys, pack, channels):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").write_bytes(pack(IMAGES))
    (tmp_path / "labels").write_bytes(pack(idx((7,), LABELS)))
    out = tmp_path / "set.parquet"
    assert main(["data", "idx", str(tmp_path / "images"), str(out), f"--labels={tmp_path / 'labels'}"]) == 0
    assert capsys.readouterr().out == f"7 images; train on them with --data.root={str(out)!r}\n"
    source = open_images(str(out), channels, "", False, False, "")
    assert source.labels_N.tolist() == list(LABELS)
    for number, image_HW in enumerate(IMAGES_NHW):
        assert np.array_equal(source.decode(number), np.repeat(image_HW[..., None], channels, 2))


def test_without_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").write_bytes(IMAGES)
    assert main(["data", "idx", str(tmp_path / "images"), str(tmp_path / "set.parquet")]) == 0
    assert len(open_images(str(tmp_path / "set.parquet"), 1, "", False, False, "").index) == 7


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (None, None, "No such file or directory"),
        (b"", None, "is no IDX file"),
        (b"\x89PNG\r\n\x1a\n" + 20 * b"\0", None, "is no IDX file"),
        (IMAGES[:9], None, "is cut off in its header"),
        (IMAGES[:-1], None, "[7, 5, 3] are 105 bytes, and 104 are there"),
        (IMAGES + b"\0", None, "[7, 5, 3] are 105 bytes, and 106 are there"),
        (gzip.compress(IMAGES)[:-12], None, "cannot read"),
        (gzip.compress(IMAGES)[:30] + b"\xff\xff\xff" + gzip.compress(IMAGES)[33:], None, "cannot read"),
        (idx((7,), LABELS), None, "type 0x08 of 1 dimensions; images [N, H, W] are of type 0x08 and 3"),
        (idx((1, 2, 1), bytes(8), kind=0x0D), None, "type 0x0d of 3 dimensions"),
        (idx((1, 2**31, 2**31), b""), None, "pixels are more than"),
        (idx((3, 0, 5), b""), None, "no pixels: 0 x 5"),
        (IMAGES, IMAGES, "type 0x08 of 3 dimensions; labels [N] are of type 0x08 and 1"),
        (IMAGES, idx((6,), LABELS[:6]), "has 6 labels"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, capsys, images, labels, words):
    for name, content in {"images": images, "labels": labels}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    given = [] if labels is None else [f"--labels={tmp_path / 'labels'}"]
    assert main(["data", "idx", str(tmp_path / "images"), str(tmp_path / "set.parquet"), *given]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "set.parquet").exists()


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "images").write_bytes(IMAGES)
    (tmp_path / "set.parquet").write_text("mine")
    assert main(["data", "idx", str(tmp_path / "images"), str(tmp_path / "set.parquet")]) == 3
    assert "File exists" in capsys.readouterr().err
    assert (tmp_path / "set.parquet").read_text() == "mine"
    assert main(["data", "idx", str(tmp_path / "images"), str(tmp_path / "set.tar")]) == 2
    assert "must end in .parquet" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(table, file, **options):
        file.write(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ccmim_fast.data.idx.pq.write_table", full)
    (tmp_path / "images").write_bytes(IMAGES)
    with pytest.raises(DataError, match="No space left on device"):
        write_table(str(tmp_path / "images"), "", str(tmp_path / "set.parquet"))
    assert not (tmp_path / "set.parquet").exists()
