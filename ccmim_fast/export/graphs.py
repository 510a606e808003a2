"""The encoder becomes a graph without Python: ONNX, or a file of torch.export."""

# B batch, C channels, H height, W width

import contextlib
import io
import json
import logging
import warnings
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.evaluation.encoders import Tokens
from ccmim_fast.evaluation.registry import check_installed
from ccmim_fast.export.plain import about

OPSET = 20  # of ONNX; the first with Gelu as an operator
# With an end: without one torch 2.7 finds that a classifier takes any number of images but 2^63 - 1, and refuses it.
_ANY_BATCH = {"images": {0: torch.export.Dim("batch", max=2**31 - 1)}}
# Protocol buffers, of which an ONNX file is one, end at 2^31 bytes; what is larger has its weights in a file beside it.
_ONE_FILE = 1.9e9


def export_onnx(run: OpenedRun, out: Path) -> list[Path]:
    """Write `images` -> `tokens` of any batch, see `Tokens`. Raises MachineError: onnx or onnxscript is missing."""
    return write_onnx(_tokens(run), run.config.data.image_size, "tokens", about(run), out)


def export_program(run: OpenedRun, out: Path) -> list[Path]:
    """Write `Tokens` of any batch, for `torch.export.load(FILE).module()`; `about.json` in it says what the file is."""
    return write_program(_tokens(run), run.config.data.image_size, about(run), out)


def _tokens(run: OpenedRun) -> Tokens:
    return Tokens(run.model.encoder, run.config.data.mean, run.config.data.std)


def write_onnx(
    module: Tokens, image_size: tuple[int, int], output: str, facts: dict[str, str], out: Path
) -> list[Path]:
    """Write a module as a graph `images` [B, C, H, W] -> `output`, any B. Raises MachineError: a package is missing."""
    check_installed("export onnx", ("onnx", "onnxscript"), "export")
    file = out / "model.onnx" if out.is_dir() else out
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            _example(module, image_size),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[output],
            dynamic_shapes=_ANY_BATCH,
            verbose=False,
        )
        for node in chain(program.model.graph, *program.model.functions.values()):
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine
        program.model.metadata_props.update(facts)
        beside = sum(p.nbytes for p in module.parameters()) > _ONE_FILE
        program.save(file, external_data=beside)
    return [file, file.with_name(f"{file.name}.data")] if beside else [file]


def write_program(module: Tokens, image_size: tuple[int, int], facts: dict[str, str], out: Path) -> list[Path]:
    """Write a module of images [B, C, H, W], any B, as a file of torch.export with `facts` in it."""
    file = out / "model.pt2" if out.is_dir() else out
    with _quiet():
        program = torch.export.export(module.eval(), _example(module, image_size), dynamic_shapes=_ANY_BATCH)
        for part in program.graph_module.modules():
            for node in part.graph.nodes if isinstance(part, GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, file, extra_files={"about.json": json.dumps(facts)})
    return [file]


def _example(module: Tokens, image_size: tuple[int, int]) -> tuple[Tensor]:
    # More than one: a batch of one would be taken for a constant.
    return (torch.zeros(2, len(module.mean_C11), *image_size),)


@contextlib.contextmanager
def _quiet():
    """Silence the exporters' own progress and advice to their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
