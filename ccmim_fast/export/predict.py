"""The images of a folder get classes: a row of a table for each, written as they come."""

# B batch, H height, W width, C channels, K classes, T classes named for an image

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ccmim_fast.data.index.decode import BYTE
from ccmim_fast.errors import MachineError, NumericsError, as_text
from ccmim_fast.evaluation.classifier import Logits, open_classifier
from ccmim_fast.export.image_batches import ImageBatches, chosen_device
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.runs.output import check_new, new_file

Columns = dict[str, list[Any]]  # of a batch, by name


class Predicted(NamedTuple):
    """This tuple says how many images have a row, and how many of those whose class is known got it."""

    images: int
    classes: int
    labelled: int  # images whose own class is known
    known: int  # of these with a class of the classifier's
    right: int
    left_out: int
    reason: str  # of the first that does not decode; empty if all that the index has do


def predict_folder(
    run: str,
    folder: str,
    out: Path,
    *,
    top: int = 5,
    batch: int = 64,
    workers: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> Predicted:
    """Write the classes of images, in the order of their index, to the file `out`, whole or not at all.

    An image that does not decode has no row. The arguments are those of `ccmim predict --help`. Raises CcmimError: a
    classifier, device or file that cannot be used, no image that can, or logits that are not finite.
    """
    check_new(out, "ccmim predict")
    at = chosen_device(device)
    of = open_classifier(run)
    data, encoder = of.config.data, of.encoder
    batches = ImageBatches(folder, len(encoder.mean), data.image_key, encoder.max_value)
    if of.rounds_to_uint8:
        batches.source.dtype = BYTE
    logits, autocast = Logits(of.vit, encoder.mean, encoder.std).to(at), choose_precision(precision, at).autocast(at)
    top, labelled, known, right = min(top, len(of.classes)), 0, 0, 0

    def rows() -> Iterator[Columns]:
        nonlocal labelled, known, right
        for names, images in batches.iterate("predicting", data.image_size, batch, at, workers, data.test_crop):
            with torch.inference_mode(), autocast:
                logits_BK = logits(images.images_BHWC.permute(0, 3, 1, 2) / 255).float()
            if not logits_BK.isfinite().all():
                raise NumericsError(f"the logits of {names[0]!r:.200} or of images behind it are not finite")
            shares_BT, chosen_BT = (part.cpu().numpy() for part in logits_BK.softmax(-1).topk(top))
            columns: Columns = {"name": names}
            if images.labels_B is not None:
                labels = _own_classes(images.labels_B.tolist(), batches.source.class_names)
                labelled += sum(map(bool, labels))
                known += sum(label in of.classes for label in labels)
                right += sum(label == of.classes[one] for label, one in zip(labels, chosen_BT[:, 0]))
                columns["label"] = [as_text(label) for label in labels]
            for place in range(top):
                suffix = f"_{place + 1}" if place else ""
                columns[f"class{suffix}"] = [as_text(of.classes[one]) for one in chosen_BT[:, place]]
                columns[f"probability{suffix}"] = shares_BT[:, place].tolist()
            yield columns

    try:
        with new_file(out, "ccmim predict") as partial, _WRITERS[out.suffix](partial) as write:
            for columns in rows():
                write(columns)
    except OSError as error:
        raise MachineError(f"{error.filename or out}: not written: {error.strerror or error}") from None
    return Predicted(batches.made, len(of.classes), labelled, known, right, batches.left_out, batches.reason)


def _own_classes(labels_B: list[int], names: tuple[str, ...]) -> list[str]:
    return [names[label] if 0 <= label < len(names) else "" for label in labels_B]


@contextmanager
def _text_table(file: Path) -> Iterator[Callable[[Columns], None]]:
    """Yield what writes rows of text, separated as the name of the file says, below a line of names."""
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",", lineterminator="\n")

        def write(columns: Columns) -> None:
            if not stream.tell():
                writer.writerow(columns)
            writer.writerows(zip(*columns.values()))

        yield write


@contextmanager
def _lines(file: Path) -> Iterator[Callable[[Columns], None]]:
    """Yield what writes a JSON object a row."""
    with open(file, "w", encoding="utf-8") as stream:
        yield lambda columns: stream.writelines(
            json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values())
        )


@contextmanager
def _parquet(file: Path) -> Iterator[Callable[[Columns], None]]:
    """Yield what writes the rows of a batch as a group."""
    writer: pq.ParquetWriter | None = None

    def write(columns: Columns) -> None:
        nonlocal writer
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


_WRITERS = {".csv": _text_table, ".tsv": _text_table, ".jsonl": _lines, ".parquet": _parquet}
