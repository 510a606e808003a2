"""Published weights as a checkpoint of ours, to evaluate, to export, to pretrain on."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.published import TIMM, Published, read_published
from ccmim_fast.checkpoints.state import Progress, capture
from ccmim_fast.config.load import load_config
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.export.plain import write_weights
from ccmim_fast.export.trained import Trained
from ccmim_fast.models.build import build_model
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_fast.runs.folder import describe_run, open_run_folder

_NEW = ("decoder", "projector", "predictor")  # parts that a file may lack as a whole: they start anew
_SHOWN = 4  # names in one line


def import_weights(file: str, arch: str, out: str, settings: Sequence[str]) -> tuple[Path, list[str]]:
    """Make a checkpoint of published weights.

    Args:
        file: MAE's or the authors' ccMIM .pth; timm's .pth or .safetensors of an encoder; our own .safetensors; or
            timm:ARCH.TAG, which timm downloads.
        arch: timm's name of the architecture; "": `file` tells it.
        out: a new run folder, or a .safetensors in our names.
        settings: options of `ccmim pretrain`; sizes are read off the weights.

    Returns:
        The checkpoint's or the file's path, and the parts of the model that `file` lacks as a whole, which start anew.

    Raises:
        ConfigError: no architecture is known, or a setting is wrong.
        CheckpointError: a weight is missing, unexpected or of another shape.
    """
    found = read_published(file)
    if arch and not file.startswith(TIMM):
        found = found._replace(arch=arch)
    if not found.arch:
        raise ConfigError(f"ccmim import: {file!r:.200} does not tell its architecture; add --arch NAME")
    config = load_config([*derived(found, settings), *settings], "ccmim import FILE --arch NAME --out OUT")
    torch.manual_seed(config.seed)
    model = build_model(config)
    new = fill_(model, found.tensors, file)
    return _write(model, config, out), new


def derived(of: Published, given: Sequence[str]) -> list[str]:
    """Settings that the weights tell, as options: sizes, and the method where no file of settings is given.

    Raises:
        ConfigError: timm does not know the architecture.
    """
    weights, arch = of.tensors, of.arch
    try:
        with torch.device("meta"):
            own = timm.create_model(arch, num_classes=0, class_token=True, global_pool="token")
    except Exception as error:  # whatever timm raises on a name or class that is none of these
        raise ConfigError(f"--arch={arch!r:.80}: {' '.join(str(error).split())[:200]}") from None
    found: dict[str, object] = {"model.arch": arch}
    found |= {"model.num_heads": of.num_heads} if of.num_heads else {}
    found |= {"data.mean": list(of.mean), "data.std": list(of.std)} if of.mean and of.std else {}
    kernel = weights.get("encoder.patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        dim, channels, patch, _ = kernel.shape
        told = {"patch_size": patch, "embed_dim": dim, "depth": _blocks(weights, "encoder.blocks.")}
        owned = {"patch_size": own.patch_embed.patch_size[0], "embed_dim": own.embed_dim, "depth": len(own.blocks)}
        # Only what differs: a run that goes on from here is compared setting by setting.
        found |= {f"model.{key}": value for key, value in told.items() if value != owned[key]}
        found |= {"data.channels": channels} if channels != 3 else {}
        positions = weights.get("encoder.pos_embed")
        if positions is not None and positions.ndim == 3:
            side = math.isqrt(positions.shape[1] - (0 if own.no_embed_class else own.num_prefix_tokens))
            height, width = of.image_size or (side * patch, side * patch)
            found["data.image_size"] = f"[{height},{width}]"
    if "decoder.embed.weight" in weights:
        found["decoder.dim"] = len(weights["decoder.embed.weight"])
        found["decoder.depth"] = _blocks(weights, "decoder.blocks.")
    if "projector.3.weight" in weights:
        found["heads.dim"] = len(weights["projector.3.weight"])
    if not any(option.startswith("--config") for option in given):
        found |= _method(weights)
    return [f"--{key}={value}" for key, value in found.items()]


def fill_(model: CCMIM, weights: dict[str, Tensor], name: str) -> list[str]:
    """Load strictly; returns the parts that `weights` lack as a whole, which stay as they are.

    Raises:
        CheckpointError: one line with the names that are missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    new = [part for part in _NEW if hasattr(model, part) and not any(key.startswith(f"{part}.") for key in weights)]
    kept = {key: value for key, value in own.items() if key.partition(".")[0] in new}
    shared = weights.keys() & own.keys()
    wrong = {
        "missing": own.keys() - weights.keys() - kept.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another shape": {key for key in shared if own[key].shape != weights[key].shape},
    }
    if any(wrong.values()):
        said = "; ".join(f"{words}: {_named(keys)}" for words, keys in wrong.items() if keys)
        raise CheckpointError(f"{name}: not the weights of this model: {said}")
    model.load_state_dict(weights | kept)
    return new


def _method(weights: dict[str, Tensor]) -> dict[str, str]:
    parts = {name.partition(".")[0] for name in weights}
    if "predictor" in parts:
        return {"contrast.loss": "align"}
    if "decoder" in parts and "projector" not in parts:
        return {"contrast.loss": "none", "mask.strategy": "random"}  # MAE
    return {}


def _blocks(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _named(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _write(model: CCMIM, config: Config, out: str) -> Path:
    if out.endswith(".safetensors"):
        about = Trained(model, config, step=0, samples=0, averaged=False, run=Path(out).parent).about()
        return write_weights(model.state_dict(), about, Path(out))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=out))
    folder = open_run_folder(config)
    describe_run(folder, config, torch.device("cpu"))
    # No moments yet; the rate and the decay are those of the run that goes on.
    of = config.optim
    optimizer = build_optimizer("adamw", model, lr=of.base_lr, weight_decay=of.weight_decay, betas=of.betas)
    state = capture(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, Progress(0, 0, 0, ""), config)
    return io.save(folder / "checkpoints", 0, state, keep=1)
