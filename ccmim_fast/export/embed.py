"""The images of a folder become features: one vector for each, written as they come."""

# B batch, D width, N images

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.errors import MachineError
from ccmim_fast.evaluation.frozen.features import extract
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.models.tokens import tokens_of

Rows = Iterator[tuple[dict[str, list], np.ndarray]]  # of each batch: columns `name` and `label`, features [B, D]


class Embedded(NamedTuple):
    """This tuple says how many images have a row, how wide a row is, and how many images cannot be used."""

    images: int
    width: int
    left_out: int


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

    The arguments are those of `ccmim embed --help`. Raises CcmimError: a checkpoint, image, device or file that cannot
    be used.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device=cuda: there is no CUDA device; use --device=cpu")
    at = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    opened = open_run(run)
    model, config = opened.model.to(at), opened.config.data
    source = open_images(folder, config.channels, quiet=False, max_value=config.max_value)
    encode, autocast = tokens_of(model.encoder, model.mean_C, model.std_C), choose_precision(precision, at).autocast(at)
    count, width = usable_count(source), model.encoder.embed_dim

    def rows(report: Callable[[int, int], None]) -> Rows:
        done = 0
        for images in evaluation_batches(source, config.image_size, batch, at, workers):
            features_BD, labels_B = extract(encode, [images], model.encoder.num_prefix_tokens, pool, autocast)
            names = [source.name(number).encode(errors="replace").decode() for number in images.host_ids_B.tolist()]
            yield {"name": names} | ({} if labels_B is None else {"label": labels_B.tolist()}), features_BD.numpy()
            done += len(names)
            report(done, count)

    with progress_bar("embedding") as report, _written(out) as parts:
        if out.suffix == ".npy":
            _write_npy(parts, count, width, rows(report))
        else:
            _write_arrow(parts, width, source.labels_N is not None, rows(report))
    return Embedded(count, width, len(source) - count)


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path]:
    """Yield a hidden folder for the parts, which take their places beside each other when all are whole."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as hidden:
            yield Path(hidden)
            for part in Path(hidden).iterdir():
                part.replace(out.with_suffix(part.suffix))
    except OSError as error:
        raise MachineError(f"{error.filename or out}: not written: {error.strerror or error}") from None


def _write_npy(folder: Path, count: int, width: int, rows: Rows) -> None:
    features_ND, place = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (count, width)), 0
    with open(folder / "x.jsonl", "w") as lines:
        for columns, features_BD in rows:
            features_ND[place : place + len(features_BD)] = features_BD
            place += len(features_BD)
            lines.writelines(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))
    features_ND.flush()


def _write_arrow(folder: Path, width: int, labelled: bool, rows: Rows) -> None:
    label = [("label", pa.int64())] if labelled else []
    schema = pa.schema([("name", pa.string()), *label, ("features", pa.list_(pa.float32(), width))])
    with pa.OSFile(str(folder / "x.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for columns, features_BD in rows:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(features_BD.reshape(-1)), width)
            writer.write_batch(pa.record_batch([*columns.values(), vectors], schema=schema))
