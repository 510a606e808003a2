"""Images in rows: parquet and Arrow files, as Hugging Face writes them."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from made_containers import encode, image_table, open_images_again, pixels_of, summary

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
