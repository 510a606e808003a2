"""Plant faults in the kernels, one at a time, and see each caught by a test. Run by hand, minutes:

    python tests/ops/mutations.py [--only TEXT]

The package and its tests are copied to a temporary folder first; the checkout is not touched. Exit status 1 if a fault
survives, or if its text is no longer in the file exactly once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """`old` in `kernels/ccmim_kernels/<file>` becomes `new`; `tests` (a file of tests/ops and a -k expression) fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


FAULTS = [
    Fault(
        "Philox: another counter word",
        "sample_partition/triton_impl.py",
        "tl.philox(key, counter, id_low, id_high, epoch + zero)",
        "tl.philox(key, counter, id_high, id_low, epoch + zero)",
        ("test_sample_partition.py", "same_partition"),
    ),
    Fault(
        "one epoch for all images",
        "sample_partition/triton_impl.py",
        "tl.load(epochs_ptr + image)",
        "tl.load(epochs_ptr)",
        ("test_sample_partition.py", "epoch_may_be"),
    ),
    Fault(
        "one epoch for all images",
        "divide_tokens/triton_impl.py",
        "tl.load(epochs_ptr + image)",
        "tl.load(epochs_ptr)",
        ("test_divide_tokens.py", "has_its_epoch"),
    ),
    Fault(
        "Gumbel noise: the inner logarithm rounded to float32",
        "sample_partition/triton_impl.py",
        "gumbel = (-tl.log(-tl.log(uniform))).to(tl.float32)",
        "gumbel = -tl.log((-tl.log(uniform)).to(tl.float32))",
        ("test_philox.py", "kernel"),
    ),
    Fault(
        "uniform noise added, not subtracted",
        "sample_partition/triton_impl.py",
        "gumbel - uniform_weight * uniform",
        "gumbel + uniform_weight * uniform",
        ("test_sample_partition.py", "same_partition and uniform"),
    ),
    Fault(
        "ties by the highest index",
        "sample_partition/triton_impl.py",
        "tl.cumsum(equal, 0) <= room",
        "tl.cumsum(equal, 0) > tl.sum(equal) - room",
        ("test_sample_partition.py", "extreme"),
    ),
    Fault(
        "-0.0 is less than 0.0",
        "sample_partition/triton_impl.py",
        "tl.where(keys == 0.0, 0.0, keys).to(tl.int32",
        "keys.to(tl.int32",
        ("test_sample_partition.py", "extreme"),
    ),
    Fault(
        "NaN by its bits",
        "sample_partition/triton_impl.py",
        "tl.where(keys != keys, 4294967295, ordered)",
        "ordered",
        ("test_sample_partition.py", "nan"),
    ),
    Fault(
        "half of the keys' bits ignored",
        "sample_partition/triton_impl.py",
        "for step in range(32):",
        "for step in range(16):",
        ("test_sample_partition.py", "same_partition and importance"),
    ),
    Fault(
        "blocks: height rounded down",
        "sample_partition/triton_impl.py",
        "tl.floor(tl.sqrt(area * aspect) + 0.5)",
        "tl.floor(tl.sqrt(area * aspect))",
        ("test_sample_partition.py", "same_partition and block"),
    ),
    Fault(
        "LayerNorm: deviations between tiles of columns left out",
        "divide_tokens/triton_impl.py",
        " + step * step * (start * share)",
        "",
        ("test_divide_tokens.py", "gold"),
    ),
    Fault(
        "LayerNorm: masked columns counted",
        "divide_tokens/triton_impl.py",
        "x = tl.where(inside[None, :], x - mean_new[:, None], 0.0)",
        "x = x - mean_new[:, None]",
        ("test_divide_tokens.py", "gold"),
    ),
    Fault(
        "dropped [CLS] row of the masked set",
        "divide_tokens/triton_impl.py",
        "copy_prefix(prefix_ptr, masked_ptr, P, D, BLOCK_D)",
        "copy_prefix(prefix_ptr, masked_ptr, 0, D, BLOCK_D)",
        ("test_divide_tokens.py", "equals_reference"),
    ),
    Fault(
        "wrong stride between tokens",
        "divide_tokens/triton_impl.py",
        "source = tokens_ptr + (row.to(tl.int64) * stride_l)[:, None]",
        "source = tokens_ptr + (row.to(tl.int64) * D)[:, None]",
        ("test_divide_tokens.py", "strided"),
    ),
    Fault(
        "missing mask over columns",
        "gather_tokens/triton_impl.py",
        "x = tl.load(source + column, mask=taken & (column < D), other=0.0)\n        tl.store(target + column, x, "
        "mask=(row < L)[:, None] & (column < D))",
        "x = tl.load(source + column, mask=taken & (column < D), other=0.0)\n        tl.store(target + column, x, "
        "mask=(row < L - 1)[:, None] & (column < D))",
        ("test_gather_tokens.py", "gradients"),
    ),
    Fault(
        "gradient of the prefix 1 % off",
        "gather_tokens/op.py",
        "sum(0, dtype=torch.float32).to(dtype)",
        "sum(0, dtype=torch.float32).mul(1.01).to(dtype)",
        ("test_gather_tokens.py", "gradients"),
    ),
    Fault(
        "mask token's gradient takes a visible row",
        "restore_tokens/triton_impl.py",
        "mask=(place >= K)[:, None]",
        "mask=(place >= K - 1)[:, None]",
        ("test_restore_tokens.py", "gradients"),
    ),
    Fault(
        "positions off by one row",
        "restore_tokens/triton_impl.py",
        "position = tl.load(positions_ptr + (row * D)[:, None]",
        "position = tl.load(positions_ptr + (tl.maximum(row - 1, 0) * D)[:, None]",
        ("test_restore_tokens.py", "gradients"),
    ),
    Fault(
        "softmax over the padding too",
        "cls_row/triton_impl.py",
        'row = tl.where(valid, row, float("-inf"))',
        "row = row",
        ("test_cls_row.py", "test_kernel"),
    ),
    Fault(
        "sum over heads, not mean",
        "cls_row/triton_impl.py",
        "total + mean / N",
        "total + mean",
        ("test_cls_row.py", "test_kernel"),
    ),
    Fault(
        "biased variance",
        "masked_patch_loss/triton_impl.py",
        "(length - 1).to(tl.float32)",
        "length.to(tl.float32)",
        ("test_masked_patch_loss.py", "gold"),
    ),
    Fault(
        "loss gradient 1 % off",
        "masked_patch_loss/op.py",
        "2 * grad / residual_BMP.numel()",
        "2.02 * grad / residual_BMP.numel()",
        ("test_masked_patch_loss.py", "underflow"),
    ),
    Fault(
        "HOG: border repeated, not reflected",
        "hog_target/triton_impl.py",
        "tl.where(y == 0, 1, y - 1)",
        "tl.where(y == 0, 0, y - 1)",
        ("test_hog_target.py", "gold"),
    ),
    Fault(
        "HOG: the last pixel of a cell left out",
        "hog_target/triton_impl.py",
        "(pixel < cell * cell)[:, None]",
        "(pixel < cell * cell - 1)[:, None]",
        ("test_hog_target.py", "every_pixel"),
    ),
    Fault(
        "Eq. 7: the student's own similarity counted",
        "info_nce/triton_impl.py",
        "left_out = (key >= last)[None, :] | (own & (row < excluded)[:, None])",
        "left_out = (key >= last)[None, :]",
        ("test_info_nce.py", "gold and not 2048"),
    ),
    Fault(
        "Eq. 7: gradient 1 % off",
        "info_nce/triton_impl.py",
        "(grad_B / tau).contiguous()",
        "(1.01 * grad_B / tau).contiguous()",
        ("test_info_nce.py", "gold and not 2048"),
    ),
    Fault(
        "log-sum-exp not rescaled to the new maximum",
        "info_nce/triton_impl.py",
        "total = total * tl.exp(largest - finite) +",
        "total = total +",
        ("test_info_nce.py", "many_tiles"),
    ),
]


def is_caught(fault: Fault, copy: Path) -> bool | None:
    """Whether the fault's tests fail on it; None where the text to replace is not there once."""
    path = copy / "kernels" / "ccmim_kernels" / fault.file
    sound = path.read_text()
    if sound.count(fault.old) != 1:
        return None
    path.write_text(sound.replace(fault.old, fault.new))
    file, expression = fault.tests
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", expression]
    environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, f"tests/ops/{file}"], cwd=copy, env=environment, capture_output=True, check=False)
    path.write_text(sound)
    # 1: tests ran and some failed. Anything else (none selected, pytest's own error) is no catch.
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="faults whose description or file holds this text")
    only = parser.parse_args().only
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("kernels", "ccmim_fast", "configs", "tests", "benchmarks", "pyproject.toml"):
            copy_of = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy_of(ROOT / part, copy / part)
        for fault in FAULTS:
            if only not in fault.what and only not in fault.file:
                continue
            caught = is_caught(fault, copy)
            word = {True: "caught", False: "SURVIVED", None: "TEXT NOT FOUND"}[caught]
            wrong += caught is not True
            print(f"{word:14} {fault.file.split('/')[0]:18} {fault.what}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
