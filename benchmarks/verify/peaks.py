"""Hold the peak of a step's memory on this GPU against what the presets' headers predict.

    python benchmarks/verify/peaks.py [--only-run]

A preset for one GPU is held within `WITHIN`. Of one for many, one GPU's share is measured alone, without a group's
buckets, and only shown. What does not fit is left out with a line. Exit status 1: a peak is further off.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import stated, step_memory

from ccmim_fast.config.load import presets
from ccmim_fast.ranks.session import Session

WITHIN = 0.05


def verdict(peak_gb: float, stated_gb: float, gpus: int) -> str:
    """Return how a measured peak compares with the header's, in words; `FAILED` is one of them where it is wrong."""
    share = peak_gb / stated_gb
    if gpus > 1:
        return f"{share:.3f} x the header's {stated_gb:g} GB, which is for one of {gpus} GPUs"
    return f"{share:.3f} x the header's {stated_gb:g} GB: {'passed' if abs(share - 1) <= WITHIN else 'FAILED'}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("peaks", description=__doc__.split("\n")[0])
    parser.add_argument("--only-run", action="store_true", help="the demo's preset alone, and nothing is held")
    options = parser.parse_args(arguments)
    total, failed = torch.cuda.get_device_properties(0).total_memory / 1e9, False
    for preset in ["demo"] if options.only_run else sorted(presets()):
        layout = stated(preset)
        if layout.peak_gb > 0.9 * total:
            print(f"{preset}: {layout.peak_gb:g} GB do not fit into {total:.1f} GB", flush=True)
            continue
        found = step_memory(preset, layout.images, Session(0, 1, torch.device("cuda"))).peak / 1e9
        said = verdict(found, layout.peak_gb, layout.gpus)
        failed |= "FAILED" in said
        print(f"{preset}: {layout.images} images, {found:.2f} GB, {said}", flush=True)
    return int(failed and not options.only_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
