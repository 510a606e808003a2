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
_ANY_BATCH = {"images": {0: torch.export.Dim("batch")}}
# Protocol buffers, of which an ONNX file is one, end at 2^31 bytes; what is larger has its weights in a file beside it.
_ONE_FILE = 1.9e9


def export_onnx(run: OpenedRun, out: Path) -> list[Path]:
    """Write `images` -> `tokens` of any batch, see `Tokens`. Raises MachineError: onnx or onnxscript is missing."""
    check_installed("export onnx", ("onnx", "onnxscript"), "export")
    file = out / "model.onnx" if out.is_dir() else out
    with _quiet():
        program = torch.onnx.export(
            *_tokens_and_example(run),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["tokens"],
            dynamic_shapes=_ANY_BATCH,
            verbose=False,
        )
        for node in chain(program.model.graph, *program.model.functions.values()):
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine
        program.model.metadata_props.update(about(run))
        beside = sum(p.nbytes for p in run.model.encoder.parameters()) > _ONE_FILE
        program.save(file, external_data=beside)
    return [file, file.with_name(f"{file.name}.data")] if beside else [file]


def export_program(run: OpenedRun, out: Path) -> list[Path]:
    """Write `Tokens` of any batch, for `torch.export.load(FILE).module()`; `about.json` in it says what the file is."""
    file = out / "model.pt2" if out.is_dir() else out
    with _quiet():
        program = torch.export.export(*_tokens_and_example(run), dynamic_shapes=_ANY_BATCH)
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, file, extra_files={"about.json": json.dumps(about(run))})
    return [file]


def _tokens_and_example(run: OpenedRun) -> tuple[Tokens, tuple[Tensor]]:
    data = run.config.data
    # More than one: a batch of one would be taken for a constant.
    example_BCHW = torch.zeros(2, data.channels, *data.image_size)
    return Tokens(run.model.encoder, data.mean, data.std).eval(), (example_BCHW,)


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
