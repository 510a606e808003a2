"""Images, tars and tables that the tests of containers make."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pyarrow as pa
from PIL import Image


def encode(seed, height=8, width=9, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def write_tar(path, members, **kwargs):
    """members: (name, bytes or a tar type), in order."""
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) > 1:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "0.png"
                tar.addfile(info)


def summary(source):
    """(location, label, reason) of each row."""
    labels = [-1] * len(source) if source.labels_N is None else source.labels_N.tolist()
    return [(source.index.location(n), labels[n], source.index.reason(n)) for n in range(len(source))]


def touch_later(path):
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)


def huggingface(features):
    return {"huggingface": json.dumps({"info": {"features": features}})}


def image_table(datas, labels=None, names=None):
    """As Hugging Face writes it."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array([data if data is None else {"bytes": data, "path": "x"} for data in datas], kind)}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"_type": "ClassLabel", "names": names}
    return pa.table(columns).replace_schema_metadata(huggingface(features))


def open_images_again(source):
    """Another process's view: no file is open."""
    return type(source)(source.index)
