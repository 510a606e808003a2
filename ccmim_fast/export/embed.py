"""`ccmim embed`: one vector for each image of a folder, written as they come."""

# B batch, D width, N images

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ccmim_fast.config.parser import Parser
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.evaluation.frozen.features import extract
from ccmim_fast.export.trained import Trained, read_trained
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.models.tokens import tokens_of

SUFFIXES = (".npy", ".arrow")


class Rows(NamedTuple):
    """Of a batch: names, class indices or None, and float32 vectors."""

    names: list[str]
    labels: list[int] | None
    features_BD: np.ndarray


def embed(argv: list[str]) -> None:
    """`ccmim embed RUN FOLDER --out FILE`: the features of images, in the order of their index.

    FILE.npy holds float32 [N, D], and FILE.jsonl beside it the name and class of each row; FILE.arrow holds columns
    `name`, `label` (where the images have classes) and `features`. Images are shown whole, resized to the run's size.
    """
    given = _read(argv)
    out = Path(given.out)
    trained = read_trained(given.run)
    source = open_images(given.folder, trained.config.data.channels, quiet=False)
    width = trained.model.encoder.embed_dim
    with progress_bar("embedding") as report, _written(out) as parts:
        write = _npy if out.suffix == ".npy" else _arrow
        write(parts, usable_count(source), width, source.labels_N is not None, _rows(trained, source, given, report))
    left_out = len(source) - usable_count(source)
    print(f"{given.out}: {usable_count(source)} x {width}{f'; {left_out} images cannot be used' if left_out else ''}")


def _rows(
    trained: Trained, source: IndexedSource, given: argparse.Namespace, report: Callable[[int, int], None]
) -> Iterator[Rows]:
    device = torch.device(given.device)
    precision = choose_precision(given.precision, device)
    model, done = trained.model.to(device), 0
    plain, prefix = tokens_of(model.encoder, model.mean_C, model.std_C), model.encoder.num_prefix_tokens

    def encode(images_BHWC: torch.Tensor) -> torch.Tensor:
        with precision.autocast(device):
            return plain(images_BHWC)

    batches = evaluation_batches(source, tuple(trained.config.data.image_size), given.batch, device, given.workers)
    for batch in batches:
        features_BD, labels_B = extract(encode, [batch], prefix, given.pool)
        names = [source.name(number).encode(errors="replace").decode() for number in batch.host_ids_B.tolist()]
        yield Rows(names, None if labels_B is None else labels_B.tolist(), features_BD.numpy())
        done += len(names)
        report(done, usable_count(source))


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path]:
    """A hidden folder for the parts; they take their places beside each other when all are whole."""
    hidden = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir()
        try:
            yield hidden
            for part in hidden.iterdir():
                os.replace(part, out.with_suffix(part.suffix))
        finally:
            for part in hidden.iterdir():
                part.unlink()
            hidden.rmdir()
    except OSError as error:
        raise MachineError(f"{error.filename or out}: not written: {error.strerror or error}") from None


def _npy(folder: Path, count: int, width: int, labelled: bool, rows: Iterator[Rows]) -> None:
    features_ND = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (count, width))
    place = 0
    with open(folder / "x.jsonl", "w") as names:
        for batch in rows:
            features_ND[place : place + len(batch.names)] = batch.features_BD
            place += len(batch.names)
            for number, name in enumerate(batch.names):
                line = {"name": name} | ({} if batch.labels is None else {"label": batch.labels[number]})
                names.write(json.dumps(line) + "\n")
    features_ND.flush()


def _arrow(folder: Path, count: int, width: int, labelled: bool, rows: Iterator[Rows]) -> None:
    fields = [pa.field("name", pa.string()), *([pa.field("label", pa.int64())] if labelled else [])]
    schema = pa.schema([*fields, pa.field("features", pa.list_(pa.float32(), width))])
    with pa.OSFile(str(folder / "x.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in rows:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(batch.features_BD.reshape(-1)), width)
            columns = [batch.names, *([batch.labels] if labelled else []), vectors]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _read(argv: list[str]) -> argparse.Namespace:
    given = _parser().parse_args(argv)
    if Path(given.out).suffix not in SUFFIXES:
        raise ConfigError(f"--out={given.out!r:.200}: must end in {' or '.join(SUFFIXES)}")
    for name, least in (("batch", 1), ("workers", 0)):
        if getattr(given, name) < least:
            raise ConfigError(f"--{name}={getattr(given, name)}: must be at least {least}")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif given.device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device=cuda: there is no CUDA device; use --device=cpu")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = Parser("ccmim embed", description=embed.__doc__.replace("`", ""), allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("folder", metavar="FOLDER", help="of images, of tars or of tables; see ccmim data")
    parser.add_argument("--out", metavar="FILE", required=True, help=" or ".join(SUFFIXES))
    parser.add_argument("--pool", choices=["avg", "cls"], default="avg", help="mean over the patches, or [CLS]")
    parser.add_argument("--batch", type=int, default=64, help="images at a time; default 64")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0: one per core")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16", "auto"], default="fp32")
    return parser
