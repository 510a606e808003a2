"""Bad data, row by row of the list of faults: with both loaders a run goes on, or ends with one line."""

import io
import itertools
import json
import os
import tarfile
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader
from ccmim_fast.data.index import indexed
from ccmim_fast.data.index.bad_samples import bad_samples_path, read_bad_samples
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.errors import DataError

needs_dali = pytest.mark.skipif(not dali_loader.is_installed(), reason="DALI is not installed")
both = pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
SIZE = (24, 32)


def make_loader(source, kind, batch=8, max_bad=0.5, on_error="skip", seed=0, **division):
    data = DataConfig(loader=kind, image_size=SIZE, workers=2, flip=True, max_bad=max_bad, on_error=on_error)
    return build_loader(source, data, seed, batch, **division)


def take(loader, batches, cursor=0):
    with closing(loader.stream(cursor)) as stream:
        return list(itertools.islice(stream, batches))


def ids_of(batches):
    return [number for batch in batches for number in batch.ids_B.tolist()]


def fill(folder, photograph, count, suffix="jpg"):
    folder.mkdir(exist_ok=True)
    for index in range(count):
        crop = photograph.crop((index, index, index + 90 + index, index + 120 - index))
        crop.save(folder / f"{index:02d}.{suffix}")
    return folder


def spoil(path, how):
    """Make an image that was indexed unusable."""
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "smaller":
        Image.new("RGB", (50, 40)).save(path)
    else:
        size, kept = len(data), {"zeros": 0.9, "cut": 0.6, "empty": 0, "noise": 0.5, "text": 0}[how]
        start = data[: int(kept * size)]
        filling = {"zeros": b"\0", "noise": b"?", "text": b"t"}.get(how, b"")
        path.write_bytes(start + filling * (size - len(start)))


def assert_accounted(source, loader, batches):
    """Check that every sample of one epoch was loaded, or failed now, or was known as bad."""
    seen, failed, known = set(ids_of(batches)), set(loader.bad_samples.reasons), set(source.excluded_X.tolist())
    assert seen | failed | known == set(range(len(source)))
    assert not seen & (failed | known)
    assert not failed & known


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.ids_B.tolist() == other.ids_B.tolist()
        assert batch.epochs_B.tolist() == other.epochs_B.tolist()
        assert torch.equal(batch.images_BHWC, other.images_BHWC)


def assert_full(batches, size):
    for batch in batches:
        assert isinstance(batch, Batch)
        assert batch.images_BHWC.shape == (size, *SIZE, 3)
        assert batch.images_BHWC.dtype == torch.uint8
        assert len(batch.ids_B) == len(batch.epochs_B) == size


# Rows 1 and 2: damaged files


@both
def test_a_disk_that_fails_for_a_moment_leaves_no_mark(tmp_path, photograph, kind, monkeypatch):
    source = open_images(str(fill(tmp_path / "images", photograph, 22)))
    expected = take(make_loader(source, kind, batch=11), 2)
    read = indexed.Storage.read

    def failing(self, location, *where):
        if location == "05.jpg":
            raise OSError(5, "Input/output error")
        return read(self, location, *where)

    with monkeypatch.context() as patch:
        patch.setattr(indexed.Storage, "read", failing)
        loader = make_loader(source, kind, batch=11)
        assert_accounted(source, loader, take(loader, 2))
        assert list(loader.bad_samples.reasons) == [5]
        assert "Input/output error" in loader.bad_samples.reasons[5]
    assert read_bad_samples(source.index) == {}
    assert_same(take(make_loader(source, kind, batch=11), 2), expected)


@both
def test_damaged_files_are_replaced_counted_and_marked(tmp_path, photograph, kind):
    folder = fill(tmp_path / "images", photograph, 22)
    (folder / "zero.jpg").touch()
    (folder / "text.jpg").write_text("no image")
    for name in ("03.jpg", "11.jpg"):  # before it is indexed: their headers are whole
        spoil(folder / name, "cut")
    source = open_images(str(folder))
    assert sorted(source.index.location(n) for n in source.excluded_X) == ["text.jpg", "zero.jpg"]
    loader = make_loader(source, kind, batch=11)
    first = take(loader, 2)
    assert_full(first, 11)
    assert_accounted(source, loader, first)
    assert {source.index.location(n) for n in loader.bad_samples.reasons} == {"03.jpg", "11.jpg"}
    assert all("truncated" in reason for reason in loader.bad_samples.reasons.values())
    assert read_bad_samples(source.index) == loader.bad_samples.reasons

    longer = take(make_loader(source, kind, batch=11), 6)
    again = open_images(str(folder))
    assert again.fingerprint == source.fingerprint
    tried = []
    again.decode = lambda number: (tried.append(number), IndexedSource.decode(again, number))[1]
    again.encoded = lambda number: (tried.append(number), IndexedSource.encoded(again, number))[1]
    known = make_loader(again, kind, batch=11)
    assert known.bad_samples.known.keys() == loader.bad_samples.reasons.keys()
    assert_same(take(known, 6), longer)  # records of bad samples change nothing of what is loaded
    assert_same(first, longer[:2])
    assert not set(tried) & loader.bad_samples.reasons.keys()  # they are not even read
    with open(bad_samples_path(source.index.path)) as file:
        assert sorted(json.loads(line)["id"] for line in file) == sorted(loader.bad_samples.reasons)  # a line each
    assert_same(take(make_loader(again, kind, batch=11), 3, cursor=33), longer[3:])


@needs_dali
@pytest.mark.parametrize("how", ["cut", "zeros", "noise", "text", "empty", "smaller", "gone"])
def test_both_loaders_show_the_same_when_files_go_bad(tmp_path, photograph, how):
    folder = fill(tmp_path / "images", photograph, 24)
    source = open_images(str(folder))
    for index in (2, 3, 9, 17, 23):
        spoil(folder / f"{index:02d}.jpg", how)
    streams, failed = [], []
    for kind in ("torch", "dali", "torch"):
        loader = make_loader(source, kind, batch=6, seed=3)
        streams.append(take(loader, 8))
        assert_full(streams[-1], 6)
        assert_accounted(source, loader, streams[-1][:4])
        failed.append(dict(sorted(loader.bad_samples.reasons.items())))
        assert [*failed[-1]] == [2, 3, 9, 17, 23]
        os.unlink(bad_samples_path(source.index.path))
    assert_same(streams[0], streams[2])
    assert ids_of(streams[0]) == ids_of(streams[1])
    assert failed[0] == failed[1] == failed[2]
    for batch, other in zip(*streams[:2]):
        assert (batch.images_BHWC.int() - other.images_BHWC.int()).abs().float().mean() < 2


@both
@pytest.mark.parametrize("how", ["cut", "noise", "smaller", "gone"])
def test_on_error_error_names_the_file(tmp_path, photograph, kind, how):
    folder = fill(tmp_path / "images", photograph, 12)
    source = open_images(str(folder))
    spoil(folder / "07.jpg", how)
    with pytest.raises(DataError, match=r"07\.jpg'.*; data\.on_error=skip goes on without it") as error:
        take(make_loader(source, kind, batch=4, on_error="error"), 3)
    assert "\n" not in str(error.value)
    assert not os.path.exists(bad_samples_path(source.index.path))


@both
def test_too_many_bad_samples_stop_the_run(tmp_path, photograph, kind):
    folder = fill(tmp_path / "images", photograph, 20)
    (folder / "zz.jpg").touch()
    source = open_images(str(folder))
    with pytest.raises(DataError, match=r"1 of 21 samples cannot be used, more than data\.max_bad=0\.01; ccmim data"):
        make_loader(source, kind, max_bad=0.01)
    for index in (4, 12):
        spoil(folder / f"{index:02d}.jpg", "cut")
    with pytest.raises(DataError, match=r"3 of 21 samples .* data\.max_bad=0\.1, the last '.*\.jpg' has ") as error:
        take(make_loader(source, kind, batch=5, max_bad=0.1), 4)
    assert "\n" not in str(error.value)
    assert_full(take(make_loader(source, kind, batch=5, max_bad=0.15), 4), 5)


@both
def test_only_bad_fallbacks_is_an_error(tmp_path, photograph, kind):
    folder = fill(tmp_path / "images", photograph, 6)
    source = open_images(str(folder))
    for path in folder.iterdir():
        spoil(path, "gone")
    with pytest.raises(DataError, match=r"cannot be used") as error:
        take(make_loader(source, kind, batch=2, max_bad=1.0), 1)
    assert "\n" not in str(error.value)


@needs_dali
def test_what_only_dali_cannot_decode_is_loaded_all_the_same(tmp_path, photograph):
    source = open_images(str(fill(tmp_path / "images", photograph, 24)))
    expected = take(make_loader(source, "torch", batch=4), 12)
    spoiled = open_images(source.index.origin)
    whole = spoiled.encoded(0)
    bad = {expected[step].ids_B[step % 4].item() for step in (0, 1, 2, 5)}
    spoiled.read = lambda number: whole[:700] if number in bad else IndexedSource.read(spoiled, number)
    loader = make_loader(spoiled, "dali", batch=4)
    found = take(loader, 12)
    assert ids_of(found) == ids_of(expected)
    for batch, other in zip(found, expected):
        assert (batch.images_BHWC.int() - other.images_BHWC.int()).abs().float().mean() < 2
    assert loader.bad_samples.reasons == {}
    assert not os.path.exists(bad_samples_path(source.index.path))


@needs_dali
def test_dali_goes_on_after_each_file_that_stops_it(tmp_path, photograph, monkeypatch):
    folder = fill(tmp_path / "images", photograph, 24)
    source = open_images(str(folder))
    for index in (1, 5, 6, 7, 20):
        spoil(folder / f"{index:02d}.jpg", "cut")
        path = folder / f"{index:02d}.jpg"
        path.write_bytes(path.read_bytes().ljust(int(source.index.bytes_N[index]), b"\xff"))
    monkeypatch.setattr(indexed, "has_end", lambda data: True)  # nothing is found before DALI meets it
    for seed in range(3):
        loader = make_loader(source, "dali", batch=4, seed=seed)
        batches = take(loader, 12)
        assert_full(batches, 4)
        assert set(loader.bad_samples.reasons) <= {1, 5, 6, 7, 20}
        assert set(ids_of(batches[:6])) | set(loader.bad_samples.reasons) == set(range(24))


# Row 3: kinds of pixels


@needs_dali
def test_kinds_of_pixels_look_the_same(tmp_path, photograph):
    small = photograph.resize((120, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.asarray(small.convert("L"), dtype=np.uint16) * 257)
    for name, image, how in (
        ("cmyk.jpg", small.convert("CMYK"), {}),
        ("gray.jpg", small.convert("L"), {}),
        ("la.png", small.convert("LA"), {}),
        ("palette.png", small.quantize(64), {}),
        ("rgba.png", small.convert("RGBA"), {}),
        ("wide.png", wide, {}),
        ("wide.tif", wide, {}),
        ("turned.jpg", small, {"exif": exif}),
        ("progressive.jpg", small, {"progressive": True}),
        ("photo.webp", small, {}),
        ("one.png", small.convert("1"), {}),
        ("photo.bmp", small, {}),
    ):
        image.save(tmp_path / name, **how)
    source = open_images(str(tmp_path))
    assert len(source.excluded_X) == 0
    expected, found = (take(make_loader(source, kind, batch=12), 2) for kind in ("torch", "dali"))
    for batch, other in zip(expected, found):
        assert batch.ids_B.tolist() == other.ids_B.tolist()
        for number, image, same in zip(batch.ids_B.tolist(), batch.images_BHWC, other.images_BHWC):
            assert (image.int() - same.int()).abs().float().mean() <= 2, source.name(number)


# Row 4: extreme sizes


@both
def test_extreme_sizes_are_loaded_or_skipped_with_the_reason(tmp_path, kind):
    for index, size in enumerate([(1, 1), (1, 5000), (5000, 1)]):
        for suffix in ("jpg", "png"):
            Image.new("RGB", size, (50 * index, 0, 0)).save(tmp_path / f"{index}.{suffix}", quality=95)
    Image.new("1", (11000, 11000)).save(tmp_path / "large.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.tif", compression="group4")
    source = open_images(str(tmp_path))
    assert [source.index.location(n) for n in source.excluded_X] == ["bomb.tif", "large.png"]
    assert all("pixels" in source.index.reason(n) for n in source.excluded_X)
    loader = make_loader(source, kind, batch=6)
    batches = take(loader, 2)
    assert_full(batches, 6)
    assert_accounted(source, loader, batches[:1])
    assert loader.bad_samples.reasons == {}
    for batch in batches:
        assert (batch.images_BHWC[:, 0, 0, 0].int() - 50 * (batch.ids_B // 2)).abs().max() <= 2


# Row 5: too little


@both
def test_too_few_images_are_one_line_before_anything_is_read(tmp_path, photograph, kind):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image in '.*empty': nothing in it ends in") as error:
        open_images(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)
    folder = fill(tmp_path / "few", photograph, 5)
    (folder / "bad.jpg").touch()
    source = open_images(str(folder))
    with pytest.raises(DataError, match=r"^5 images are fewer than train\.batch_size=6; set train\.batch_size=5 or"):
        make_loader(source, kind, batch=6)
    assert_full(take(make_loader(source, kind, batch=5), 3), 5)
    with pytest.raises(DataError, match=r"batch_size=8; at least 8 images are needed"):
        make_loader(source, kind, batch=8, world_size=8)


# Row 6: what happens to files meanwhile


@both
def test_a_file_removed_while_training_is_replaced(tmp_path, photograph, kind):
    folder = fill(tmp_path / "images", photograph, 12)
    (folder / "loop").symlink_to(folder)
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = open_images(str(folder))
    assert len(source) == 12
    loader = make_loader(source, kind, batch=4)
    with closing(loader.stream(0)) as stream:
        first = next(stream)
        gone = first.ids_B[0].item()
        (folder / f"{gone:02d}.jpg").unlink()
        rest = list(itertools.islice(stream, 8))
    assert_full(rest, 4)
    assert loader.bad_samples.reasons.keys() == {gone}
    assert "No such file" in loader.bad_samples.reasons[gone]
    assert gone not in ids_of(rest)


# Row 7: names


@both
def test_odd_names_load_and_are_marked(tmp_path, photograph, kind):
    root = os.path.join(os.fsencode(tmp_path), b"d\xe9r\n")
    os.mkdir(root)
    names = [b"caf\xc3\xa9.jpg", b"latin\xe9.jpg", b"a b\nc.jpg", b"x" * 251 + b".jpg", b"'\"`$(ls).jpg", b"z.jpg"]
    for name in names:
        photograph.save(os.path.join(root, name), format="JPEG")
    source = open_images(os.fsdecode(root))
    path = Path(os.fsdecode(os.path.join(root, b"latin\xe9.jpg")))
    spoil(path, "noise")
    loader = make_loader(source, kind, batch=6)
    batches = take(loader, 2)
    assert_full(batches, 6)
    assert_accounted(source, loader, batches[:1])
    assert read_bad_samples(source.index) == loader.bad_samples.reasons
    assert all(reason.isprintable() for reason in loader.bad_samples.reasons.values())


# Rows 8 and 9: tars


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg_of(photograph, index):
    buffer = io.BytesIO()
    photograph.crop((index, index, index + 90 + index, index + 110)).save(buffer, "JPEG")
    return buffer.getvalue()


@both
def test_a_cut_tar_with_unsafe_members_loads(tmp_path, photograph, kind):
    datas = [jpeg_of(photograph, index) for index in range(10)]
    names = ["../x.jpg", "/x.jpg", *(f"c/{index}.jpg" for index in range(2, 9)), "c/2.jpg"]
    write_tar(tmp_path / "a.tar", zip(names, datas))
    with tarfile.open(tmp_path / "a.tar") as tar:
        os.truncate(tmp_path / "a.tar", tar.getmembers()[8].offset_data + 100)
    source = open_images(str(tmp_path / "a.tar"))
    assert [source.index.reason(n).split()[0] for n in source.excluded_X] == ["a", "a", "cut"]
    assert "cut or damaged" in source.index.notes[0].reason
    middle = int(source.index.offsets_N[4])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[middle : middle + 500] = bytes(500)  # damaged after it was indexed
    (tmp_path / "a.tar").write_bytes(content)
    loader = make_loader(source, kind, batch=6)
    batches = take(loader, 2)
    assert_full(batches, 6)
    assert_accounted(source, loader, batches[:1])
    assert [*loader.bad_samples.reasons] == [4]
    assert "a.tar::c/4.jpg" in loader.bad_samples.reasons[4]


@both
def test_fewer_tars_than_ranks_give_every_rank_as_much(tmp_path, photograph, kind):
    write_tar(tmp_path / "a.tar", [(f"{index}.jpg", jpeg_of(photograph, index)) for index in range(13)])
    source = open_images(str(tmp_path / "a.tar"))
    per_rank = [take(make_loader(source, kind, batch=4, rank=rank, world_size=4), 13) for rank in range(4)]
    assert [len(batches) for batches in per_rank] == [13] * 4
    for batches in per_rank:
        assert_full(batches, 1)
    seen = [number for step in zip(*per_rank) for batch in step for number in batch.ids_B.tolist()]
    for epoch in range(4):
        assert sorted(seen[13 * epoch : 13 * epoch + 13]) == list(range(13))  # whatever the epoch's last step holds


# Anything


def valid_images(photograph):
    images = {}
    for index, (name, how) in enumerate(
        {
            "a.jpg": {"quality": 80},
            "b.jpg": {"progressive": True},
            "c.png": {},
            "d.webp": {},
            "e.tif": {"compression": "tiff_lzw"},
            "f.tiff": {},
            "g.jpg": {"quality": 95, "exif": turned()},
            "h.png": {"optimize": True},
        }.items()
    ):
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}.get(name.split(".")[1], "TIFF")
        photograph.crop((0, 0, 40 + index, 50 - index)).save(buffer, kind, **how)
        images[name] = buffer.getvalue()
    return images


def turned():
    exif = Image.Exif()
    exif[0x0112] = 8
    return exif


damages = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["flip", "byte", "cut", "zeros", "header"]),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=12,
)


def damaged(images, faults):
    images = {name: bytearray(data) for name, data in images.items()}
    for number, place, how, value in faults:
        data = images[sorted(images)[number]]
        at = int(place * len(data))
        if not data:
            continue
        if how == "cut":
            del data[at:]
        elif how == "flip":
            data[at] ^= 1 << value % 8
        elif how == "zeros":
            data[at : at + value] = bytes(len(data[at : at + value]))
        else:
            data[min(at, len(data) - 1) if how == "byte" else int(place * min(len(data), 64))] = value
    return images


@both
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(faults=damages, later=st.booleans())
def test_no_damage_does_more_than_cost_its_sample(photograph, kind, faults, later):
    # A thread of a loader that was left may record one more bad sample while the folder goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        check_damage(folder, valid_images(photograph), faults, later, kind)


def check_damage(folder, images, faults, later, kind):
    """Damage files before they are indexed, or after."""

    def write(contents):
        for name, data in contents.items():
            with open(os.path.join(folder, "images", name), "wb") as file:
                file.write(data)

    os.mkdir(os.path.join(folder, "images"))
    write(images if later else damaged(images, faults))
    try:
        source = open_images(os.path.join(folder, "images"), path=os.path.join(folder, "i.arrow"))
        if later:
            write(damaged(images, faults))
        usable = len(source) - len(source.excluded_X)
        loader = make_loader(source, kind, batch=usable, max_bad=1.0)
        batches = take(loader, 2)
    except DataError:
        return  # nothing usable is left
    assert len(source) == len(images)
    assert_full(batches, usable)
    assert_accounted(source, loader, batches[:1])


@both
def test_a_loader_that_is_left_leaves_no_threads(tmp_path, photograph, kind):
    source = open_images(str(fill(tmp_path / "images", photograph, 12)))
    take(make_loader(source, kind, batch=4), 2)
    before = threading.active_count()
    for _ in range(3):
        take(make_loader(source, kind, batch=4), 2)
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
