"""The images of a folder become features: one vector for each, written as they come."""

# B batch, D width, N images

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.data.index.own import marked
from ccmim_fast.errors import MachineError
from ccmim_fast.evaluation.frozen.features import extract
from ccmim_fast.export.image_batches import ImageBatches, chosen_device
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.models.tokens import tokens_of
from ccmim_fast.runs.claim import folder_made
from ccmim_fast.runs.output import check_new

Rows = Iterator[tuple[dict[str, list], np.ndarray]]  # of each batch: columns `name` and `label`, features [B, D]


class Embedded(NamedTuple):
    """This tuple says how many images have a row, how wide a row is, and how many images cannot be used, and why."""

    images: int
    width: int
    left_out: int
    reason: str  # of the first that does not decode; empty if all that the index has do


def embed_folder(
    run: str,
    folder: str,
    out: Path,
    *,
    pool: str = "avg",
    batch: int = 64,
    workers: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> Embedded:
    """Write the features of images, in the order of their index, to the file `out`.

    An image that does not decode has no row. The arguments are those of `ccmim embed --help`. Raises CcmimError: a
    checkpoint, device or file that cannot be used, or no image that can.
    """
    _check_place(out)
    at = chosen_device(device)
    opened = open_run(run)
    model, config = opened.model.to(at), opened.config.data
    batches = ImageBatches(folder, config.channels, config.image_key, config.max_value)
    encode, autocast = tokens_of(model.encoder, model.mean_C, model.std_C), choose_precision(precision, at).autocast(at)
    width = model.encoder.embed_dim

    def rows() -> Rows:
        for names, images in batches.iterate("embedding", config.image_size, batch, at, workers):
            features_BD, labels_B = extract(encode, [images], model.encoder.num_prefix_tokens, pool, autocast)
            yield {"name": names} | ({} if labels_B is None else {"label": labels_B.tolist()}), features_BD.numpy()

    with _written(out) as parts:
        if out.suffix == ".npy":
            _write_npy(parts, batches.count, width, rows())
        else:
            _write_arrow(parts, width, batches.source.labels_N is not None, rows())
    return Embedded(batches.made, width, batches.left_out, batches.reason)


def _check_place(out: Path) -> None:
    """Raise ConfigError if there is a file `out`, or one that bears the name of that of its rows."""
    for path in (out, out.with_suffix(".jsonl")) if out.suffix == ".npy" else (out,):
        check_new(path, "ccmim embed")


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path]:
    """Yield a hidden folder for the parts, which take their places beside each other when all are whole."""
    label = f"ccmim embed: {str(out)!r:.200}"
    hidden_beside = {"dir": out.parent, "prefix": f".{out.name[:50]}-"}
    try:
        with folder_made(out.parent, label), tempfile.TemporaryDirectory(**hidden_beside) as hidden:
            yield Path(hidden)
            # `out` itself last: it is there when all is.
            for part in sorted(Path(hidden).iterdir(), key=lambda part: part.suffix == out.suffix):
                part.replace(out.with_suffix(part.suffix))
    except OSError as error:
        raise MachineError(f"{error.filename or out}: not written: {error.strerror or error}") from None


def _write_npy(folder: Path, count: int, width: int, rows: Rows) -> None:
    """Write an array of `count` rows at most, and the names of its rows."""
    made = 0
    with open(folder / "x.npy", "wb") as file, open(folder / "x.jsonl", "w") as lines:
        _write_header(file, count, width)
        # Reserved, so that a disk without room is told before the first image and not after the last.
        os.posix_fallocate(file.fileno(), 0, file.tell() + 4 * count * width)
        for columns, features_BD in rows:
            file.write(features_BD.tobytes())
            made += len(features_BD)
            lines.writelines(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))
        file.truncate()
        file.seek(0)
        _write_header(file, made, width)


def _write_header(file: BinaryIO, count: int, width: int) -> None:
    """Write the head of an array [count, width] float32; NumPy makes it equally long for any count."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})


def _write_arrow(folder: Path, width: int, labelled: bool, rows: Rows) -> None:
    label = [("label", pa.int64())] if labelled else []
    columns = [("name", pa.string()), *label, ("features", pa.list_(pa.float32(), width))]
    schema = marked(pa.schema(columns), {"features": width})  # by the mark it is known below a folder of images
    with pa.OSFile(str(folder / "x.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for columns, features_BD in rows:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(features_BD.reshape(-1)), width)
            writer.write_batch(pa.record_batch([*columns.values(), vectors], schema=schema))
