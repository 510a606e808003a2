"""Images in rows: parquet and Arrow files, as Hugging Face writes them."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from made_containers import encode, image_table, open_images_again, pixels_of, summary, touch_later, write_tar

from ccmim_fast.data.index import storage, tables
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import DataError


def test_hugging_face_parquet(tmp_path):
    datas = [encode(i, 10 + i) for i in range(7)]
    table = image_table(datas, [2, 0, 1, None, 2, -1, 0], ["ant", "bee", "cat"])
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=3)
    pq.write_table(image_table([encode(9)], [1], ["ant", "bee", "cat"]), tmp_path / "train-1.parquet")
    source = open_images(str(tmp_path))
    assert source.class_names == ("ant", "bee", "cat")
    assert source.labels_N.tolist() == [2, 0, 1, -1, 2, -1, 0, 1]
    assert source.sizes_N2[:, 0].tolist() == [*range(10, 17), 8]
    assert [source.encoded(n) for n in (6, 0, 7, 3)] == [datas[6], datas[0], encode(9), datas[3]]
    assert source.name(4) == f"{tmp_path}/train-0.parquet::row 4"


@pytest.mark.parametrize("kind", ["parquet", "file", "stream", "feather"])
@pytest.mark.parametrize("column", ["plain", "struct"])
def test_kinds_of_tables(tmp_path, kind, column):
    datas = [encode(0), None, b"", b"text", encode(4)]
    if column == "struct":
        table = image_table(datas)
    else:
        table = pa.table({"id": [1, 2, 3, 4, 5], "jpg": pa.array(datas, pa.large_binary()), "label": ["a"] * 5})
    path = tmp_path / f"t.{'parquet' if kind == 'parquet' else 'feather' if kind == 'feather' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif kind == "feather":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    source = open_images(str(path))
    assert [reason for _, _, reason in summary(source)] == [
        "",
        "a row without an image",
        "empty file",
        "not an image that Pillow knows",
        "",
    ]
    assert source.labels_N is None  # of text no numbers are made
    assert source.encoded(0) == datas[0]
    assert (source.decode(4) == pixels_of(datas[4])).all()


def test_labels_that_are_no_classes_are_left_out(tmp_path):
    table = pa.table({"image": [encode(0), encode(1)], "label": [2**40, -7]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_images(str(tmp_path)).labels_N is None


def columns_of_images(datas):
    """Return the forms of a column of images, by what they are called."""
    parts = [{"bytes": data, "path": "x"} for data in datas]
    return {
        "view": pa.array(datas, pa.binary_view()),
        "large": pa.array(datas, pa.large_binary()),
        "dictionary": pa.array(datas, pa.binary()).dictionary_encode(),
        "numbers": pa.array([[*data] for data in datas], pa.list_(pa.uint8())),
        "list": pa.array([[data, b"another"] for data in datas], pa.list_(pa.binary())),
        "list of structs": pa.array([[part] for part in parts]),
        "struct of bytes alone": pa.array([{"bytes": data} for data in datas]),
        "struct of a view": pa.array(parts, pa.struct({"bytes": pa.binary_view(), "path": pa.string()})),
    }


@pytest.mark.parametrize("form", columns_of_images([b"x"]))
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_forms_of_a_column_of_images(tmp_path, form, kind):
    datas = [encode(i) for i in range(5)]
    more = {"embedding": [[1, 2]] * 5} if form != "numbers" else {}
    table = pa.table({**more, "picture": columns_of_images(datas)[form]})
    if kind == "parquet":
        rows = 5 if form == "struct of a view" else 2  # Arrow cannot slice such a struct
        try:
            pq.write_table(table, tmp_path / "t.parquet", row_group_size=rows)
        except pa.ArrowNotImplementedError as error:
            pytest.skip(str(error))  # views, up to pyarrow 20
    else:
        feather.write_feather(table, tmp_path / "t.arrow", compression="uncompressed")
    source = open_images(str(tmp_path))
    assert [source.encoded(n) for n in range(5)] == datas


def test_rows_without_bytes_say_what_they_have(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [
        {"bytes": encode(0), "path": "0"},
        {"bytes": None, "path": "images/1.jpg"},
        None,
        {"bytes": b"", "path": None},
    ]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    assert [reason for _, _, reason in summary(open_images(str(tmp_path)))] == [
        "",
        "a row without bytes, only with a path: 'images/1.jpg'",
        "a row without an image",
        "empty file",
    ]


def test_a_gap_among_the_numbers_of_an_image_costs_that_row_alone(tmp_path):
    column = pa.array([[137, None, 3], [*encode(0)], [None, 137], None], pa.list_(pa.uint8()))
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    source = open_images(str(tmp_path))
    assert [reason for _, _, reason in summary(source)] == [
        "a row with a gap among the numbers of its image",
        "",
        "a row without an image",
        "a row without an image",
    ]
    assert source.encoded(1) == encode(0)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_one_name(tmp_path, kind):
    datas = [encode(i) for i in range(3)]
    columns = [[7] * 3, datas, [b"another"] * 3, [2, 1, 0], [0] * 3]
    table = pa.table([pa.array(column) for column in columns], ["x", "image", "image", "label", "label"])
    pq.write_table(table, tmp_path / "t.parquet") if kind == "parquet" else feather.write_feather(
        table, tmp_path / "t.arrow"
    )
    source = open_images(str(tmp_path))
    assert [source.encoded(n) for n in range(3)] == datas
    assert source.labels_N.tolist() == [2, 1, 0]


@pytest.mark.parametrize("limit", [1, 3000])
def test_a_row_group_is_read_in_parts(tmp_path, monkeypatch, limit):
    """As one array it may have more bytes than Arrow's arrays hold; a struct cannot even be read so."""
    monkeypatch.setattr(tables, "_READ_AT_ONCE", limit)
    datas = [encode(i, 30, 30) for i in range(9)]
    pq.write_table(image_table(datas, [0, 1, 2] * 3, ["a", "b", "c"]), tmp_path / "a.parquet", use_dictionary=False)
    source = open_images(str(tmp_path))
    assert [source.encoded(n) for n in (8, 0, 4, 3)] == [datas[n] for n in (8, 0, 4, 3)]
    assert source.labels_N.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("error", [pa.ArrowInvalid("offset overflow"), OSError(5, "Input/output error")])
def test_a_row_group_that_cannot_be_read_is_tried_once(tmp_path, monkeypatch, error):
    pq.write_table(image_table([encode(i) for i in range(9)]), tmp_path / "a.parquet", row_group_size=6)
    tried, read = [], pq.ParquetFile.iter_batches

    def failing(self, rows, groups, *rest, **how):
        tried.append(groups)
        if groups == [0]:
            raise error
        return read(self, rows, groups, *rest, **how)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", failing)
    source = open_images(str(tmp_path))
    assert tried == [[0], [1]]
    assert len(source.excluded_X) == 6
    words = (
        "row group 0 cannot be read: offset overflow" if isinstance(error, pa.ArrowInvalid) else "Input/output error"
    )
    assert source.index.reason(5) == words


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_without_rows_costs_no_image(tmp_path, kind):
    table = image_table([encode(0), encode(1)], [0, 1], ["a", "b"])
    write = pq.write_table if kind == "parquet" else feather.write_feather
    write(table, tmp_path / f"a.{kind}")
    write(table.slice(0, 0), tmp_path / f"b.{kind}")
    source = open_images(str(tmp_path))
    assert (source.labels_N.tolist(), source.class_names) == ([0, 1], ("a", "b"))
    assert source.index.notes == []


def test_groups_in_memory_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_GROUP_BYTES", 10_000)
    datas = [encode(i, 30, 30) for i in range(12)]  # 2.7 kB each
    pq.write_table(image_table(datas), tmp_path / "a.parquet", row_group_size=2)
    source = open_images(str(tmp_path))
    groups = source._storage._groups._results
    for n in (0, 2, 4, 11, 7):
        assert source.encoded(n) == datas[n]
        assert sum(result[0].nbytes for _, result in groups.values()) <= 10_000
    assert len(groups) == 1


def test_labels_agree_by_name(tmp_path):
    names = [["cat", "dog"], ["dog", "cat"], ["emu", "dog", "cat"], None]
    for number, of_these in enumerate(names):
        datas = [encode(10 * number + i) for i in range(len(of_these or "12"))]
        pq.write_table(image_table(datas, [*range(len(datas))], of_these), tmp_path / f"{number}.parquet")
    source = open_images(str(tmp_path))
    found = [source.class_names[label] for label in source.labels_N]
    assert found == ["cat", "dog", "dog", "cat", "emu", "dog", "cat", "0", "1"]  # of numbers nobody knows the names
    (tmp_path / "2.parquet").unlink()
    source = open_images(str(tmp_path))  # what did not change is not read again
    assert [source.class_names[label] for label in source.labels_N] == found[:4] + found[7:]


def test_numbers_alone_mean_the_names_that_all_others_agree_on(tmp_path):
    pq.write_table(image_table([encode(0), encode(1)], [1, 0], ["cat", "dog"]), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [encode(2)], "label": [1]}), tmp_path / "b.parquet")
    source = open_images(str(tmp_path))
    assert (source.class_names, source.labels_N.tolist()) == (("cat", "dog"), [1, 0, 1])


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_names_that_change_are_those_of_the_numbers_beside_them_too(tmp_path, kind):
    def write_names(*names):
        pq.write_table(image_table([encode(0), encode(1)], [0, 1], names), tmp_path / "a.parquet")
        touch_later(tmp_path / "a.parquet")

    if kind == "tar":
        members = [("0.png", encode(2)), ("0.cls", b"0 "), ("1.png", encode(3)), ("1.cls", b"1 ")]
        write_tar(tmp_path / "b.tar", members)
    else:
        pq.write_table(pa.table({"image": [encode(2), encode(3)], "label": [0, 1]}), tmp_path / "b.parquet")
    for names in (("cat", "dog"), ("dog", "cat")):
        write_names(*names)
        source = open_images(str(tmp_path))
        assert (source.class_names, source.labels_N.tolist()) == (names, [0, 1, 0, 1])
    (tmp_path / "a.parquet").unlink()
    for _ in range(2):
        source = open_images(str(tmp_path))
        assert (source.class_names, source.labels_N.tolist()[:2]) == (("0", "1"), [0, 1])
        write_tar(tmp_path / "c.tar", [("0.png", encode(4))])  # now as numbers in the index before


@pytest.mark.parametrize("names", ["ab", {"0": "a"}, 7, ["a", "a"], [["a"], ["b"]], True, None])
def test_names_that_are_no_list_of_names_cost_no_image(tmp_path, names):
    pq.write_table(image_table([encode(0), encode(1)], [0, 1], names), tmp_path / "a.parquet")
    source = open_images(str(tmp_path))
    assert (source.class_names, source.labels_N.tolist()) == (("0", "1"), [0, 1])


@pytest.mark.parametrize(
    "metadata", ["[]", "[" * 100_000, '{"info": 3}', '{"info": {"features": []}}', b"\xff\xfe\x00"]
)
def test_metadata_of_another_kind_cost_no_image(tmp_path, metadata):
    table = image_table([encode(0)], [0], ["a"]).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    assert len(open_images(str(tmp_path))) == 1


def test_metadata_in_utf_16(tmp_path):
    table = image_table([encode(0)], [0], ["a"])
    wide = table.schema.metadata[b"huggingface"].decode().encode("utf-16")
    pq.write_table(table.replace_schema_metadata({"huggingface": wide}), tmp_path / "a.parquet")
    assert open_images(str(tmp_path)).class_names == ("a",)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_unusable_tables_are_told(tmp_path, kind):
    good = tmp_path / f"good.{kind}"
    feather.write_feather(pa.table({"x": [1]}), tmp_path / "numbers.feather")
    pq.write_table(image_table([encode(0)]), tmp_path / "ok.parquet")
    pq.write_table(image_table([encode(0)]), good) if kind == "parquet" else feather.write_feather(
        image_table([encode(0)]), good
    )
    (tmp_path / f"cut.{kind}").write_bytes(good.read_bytes()[:-30])
    (tmp_path / f"empty.{kind}").touch()
    (tmp_path / f"folder.{kind}").mkdir()
    pq.write_table(image_table([encode(0)]).replace_schema_metadata({"huggingface": "{"}), tmp_path / "meta.parquet")
    source = open_images(str(tmp_path))
    reasons = {os.path.basename(note.paths[0]): note.reason for note in source.index.notes}
    assert reasons.keys() == {"numbers.feather", f"cut.{kind}", f"empty.{kind}"}
    assert reasons["numbers.feather"] == "no table of images: no column of images as bytes among x (int64)"
    assert "\n" not in "".join(reasons.values())
    assert usable_count(source) == 3
    with pytest.raises(DataError, match=r"no image in .*cut.*: 1 skipped, the first '.*cut\..*no table of images"):
        open_images(f"{tmp_path}/cut.{kind}")


def test_a_table_that_changes_later_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    datas = [encode(i, 30, 30) + rng.bytes(2000) for i in range(6)]
    pq.write_table(image_table(datas), path, row_group_size=2, compression="none", use_dictionary=False)
    source = open_images(str(path))
    content = bytearray(path.read_bytes())
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    source = open_images_again(source)
    assert source.encoded(0) == datas[0]
    assert source.encoded(5) == datas[5]
    with pytest.raises(DataError, match=r"a\.parquet::row 2' row group 1 cannot be read: ") as error:
        source.decode(2)
    assert "\n" not in str(error.value)
    pq.write_table(image_table(datas[:3]), path)
    with pytest.raises(DataError, match=r"a\.parquet::row 5' is beyond the 3 rows of its table"):
        open_images_again(source).decode(5)
    path.write_text("no table")
    with pytest.raises(DataError, match=r"a\.parquet::row 5' .* is no table of images"):
        open_images_again(source).decode(5)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read '.*a\.parquet::row 5': .*No such file"):
        open_images_again(source).decode(5)


def test_a_table_is_read_alike_by_threads_and_by_a_copy_of_the_process(tmp_path):
    datas = [encode(i, 30) for i in range(40)]
    pq.write_table(image_table(datas), tmp_path / "a.parquet", row_group_size=2)
    source = open_images(str(tmp_path))
    assert source.encoded(0) == datas[0]
    pid = os.fork()
    right = all(source.encoded(n) == datas[n] for n in range(40) for _ in range(3))
    if not pid:
        os._exit(0 if right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert right


def test_feather_of_the_first_version_is_named(tmp_path):
    (tmp_path / "t.feather").write_bytes(b"FEA1" + bytes(64) + b"FEA1")
    with pytest.raises(DataError, match="Feather V1, which is no Arrow file; write it anew"):
        tables.open_table(str(tmp_path / "t.feather"), None)
