"""The check of an index: damage that only decoding finds, resuming, decoders that crash."""

import json
import os
import shutil

import pytest
from unsteady import Broken, Unsteady

from ccmim_fast.data import verify as module
from ccmim_fast.data.index.bad_samples import BadSamples, bad_samples_path, read_bad_samples
from ccmim_fast.data.index.index_file import BAD, INDEXED, VERIFIED, Index
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.verify import kind_of, verify, without_name
from ccmim_fast.errors import DataError, MachineError

CUT = "02.jpg"


@pytest.fixture
def folder(tmp_path, photo_folder, monkeypatch):
    """Return a copy of the photographs in which one is cut behind its header, one is no image and one is gray."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    cut = root / "class0" / CUT
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (root / "class0/text.jpg").write_text("this is no image")
    return root


def ids_of(source, *names):
    return [i for i in range(len(source)) if os.path.basename(source.name(i)) in names]


def test_it_finds_what_a_header_does_not_tell(folder):
    source = open_images(str(folder))
    assert len(source.excluded_X) == 1
    seen = []
    found = verify(source.index, processes=1, report=lambda done, total: seen.append((done, total)))
    again = open_images(str(folder))
    assert again.excluded_X.tolist() == ids_of(source, CUT, "text.jpg") == [number for number, _ in found.bad]
    assert (again.index.status_N == VERIFIED).sum() == 21
    assert found.samples == 23
    assert found.modes == {"RGB": 22, "None": 1}
    assert found.reasons == {
        "image file is truncated (N bytes not processed)": 1,
        "not an image that Pillow knows": 1,
    }
    assert seen[-1] == (22, 22)
    # Reasons hold no path: the folder may be moved with its index.
    assert not any("photos" in again.index.reason(number) for number, _ in found.bad)
    assert again.fingerprint != source.fingerprint


def test_it_goes_on_where_it_was_stopped(folder, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 5)
    source = open_images(str(folder))
    log = f"{source.index.path}.verify"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(source.index, processes=1, report=stop)
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"index": "another state", "done": [20], "bad": []}\n{"cut o')
    with open(log, encoding="utf-8") as file:
        done = json.loads(file.readlines()[1])["done"]  # the first line tells whose log it is
    asked, decode_chunks = [], module._decode_chunks

    def record(opener, chunks, processes):
        asked.extend(number for chunk in chunks for number in chunk)
        return decode_chunks(opener, chunks, processes)

    monkeypatch.setattr(module, "_decode_chunks", record)
    found = verify(Index(source.index.path), processes=1)
    assert len(done) == 5
    assert sorted(done + asked) == [i for i in range(23) if i not in source.excluded_X]
    assert len(found.bad) == 2
    assert not os.path.exists(log)
    asked.clear()
    verify(Index(source.index.path), processes=1)
    assert asked == []


def test_again_decodes_what_was_decoded_or_failed(folder, photograph):
    source = open_images(str(folder))
    verify(source.index, processes=1)
    cut, other = ids_of(source, CUT, "04.jpg")
    size = source.sizes_N2[cut][::-1].tolist()
    photograph.resize(size).save(folder / "class0" / CUT)
    damaged = folder / "class0/04.jpg"
    damaged.write_bytes(damaged.read_bytes()[:700])
    found = verify(Index(source.index.path), processes=1)
    assert cut in dict(found.bad)
    # The repaired file has another length than when it was indexed, so its header is read first.
    repaired = open_images(str(folder), rescan=True)
    assert repaired.index.status_N[cut] == INDEXED
    found = verify(repaired.index, processes=1, again=True)
    assert cut not in dict(found.bad)
    assert other in dict(found.bad)
    index = Index(source.index.path)
    assert index.status_N[cut] == VERIFIED
    assert index.reason(cut) == ""


def test_bad_samples_of_a_run_are_decoded_and_their_records_removed(folder):
    source = open_images(str(folder))
    verify(source.index, processes=1)
    source = open_images(str(folder))
    good, gone = ids_of(source, "06.jpg", "08.jpg")
    bad_samples = BadSamples(source, "skip", 1.0)
    bad_samples.add(good, f"cannot read {source.name(good)!r}: Stale file handle")
    bad_samples.add(gone, f"cannot read {source.name(gone)!r}: No such file or directory")
    (folder / "class0/08.jpg").unlink()
    assert set(read_bad_samples(source.index)) == {good, gone}
    found = verify(source.index, processes=1)
    assert not os.path.exists(bad_samples_path(source.index.path))
    index = Index(source.index.path)
    assert index.status_N[good] == VERIFIED
    assert index.status_N[gone] == BAD
    assert dict(found.bad)[gone] == "No such file or directory"


def test_a_sample_that_ends_its_process_is_found():
    chunks = [list(range(start, start + 4)) for start in range(0, 20, 4)]
    source = Unsteady(bad=(1, 10), deadly=(9,))
    found = {tuple(chunk): bad for chunk, bad in module._decode_chunks(source.open, chunks, 1)}
    assert sorted(found) == [tuple(chunk) for chunk in chunks]
    assert sorted(pair for bad in found.values() for pair in bad) == [
        (1, "it is bad"),
        (9, "its decoder crashed"),
        (10, "it is bad"),
    ]


def test_a_process_that_never_starts_marks_nothing():
    with pytest.raises(MachineError, match="no process to decode"):
        list(module._decode_chunks(Broken().open, [[0, 1]], 1))


def test_a_place_that_cannot_be_written_is_one_line(folder):
    source = open_images(str(folder))
    os.symlink("/nowhere/at/all", f"{source.index.path}.verify")
    with pytest.raises(DataError, match=r"cannot write '.*\.verify': "):
        verify(source.index, processes=1)


@pytest.mark.parametrize(
    ("reason", "bare", "kind"),
    [
        ("cannot decode '/a/b 7.jpg': broken at 12", "broken at 12", "broken at N"),
        ('cannot read "/a/it\'s.jpg": No such file', "No such file", "No such file"),
        (r"cannot decode '/a/it\'s \"x\".jpg': cut (6 bytes)", "cut (6 bytes)", "cut (N bytes)"),
        ("'a::b.jpg' has 5 bytes, and 6 when it was indexed", "has 5 bytes, and 6 when it was indexed", None),
        ("9 x 9 pixels are more than 1,000.5", "9 x 9 pixels are more than 1,000.5", "N x N pixels are more than N"),
        ("cannot find 'x': here", "cannot find 'x': here", None),
        ("says 'x' at the end", "says 'x' at the end", "says 'x' at the end"),
    ],
)
def test_reasons_without_what_differs(reason, bare, kind):
    assert without_name(reason) == bare
    if kind is not None:
        assert kind_of(reason) == kind
