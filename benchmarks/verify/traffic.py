"""Count what `divide_tokens` moves to and from the GPU's memory, by its own counters, beside what it has to move.

    python benchmarks/verify/traffic.py [--batch 1024]

Needs Nsight Compute (`ncu`, part of the CUDA toolkit) and the right to read the counters. Exit status 1: more than
`MOST` times the floor; 3: it cannot be counted here, and the line says why.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "benchmarks" / "ops"
MOST = 1.05
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
OP = "divide_tokens"


def launch(batch: int) -> None:
    """Call the op once, as Triton kernels; what `ncu` watches."""
    sys.path.insert(0, str(OPS))
    import registry
    import torch

    case = registry.benchmark(OP).case(registry.Size(batch), torch.device("cuda"), torch.bfloat16)
    case.call(*case.inputs, kernels="triton")
    torch.cuda.synchronize()


def floor(batch: int) -> int:
    """Bytes that the op's forward pass has to move."""
    sys.path.insert(0, str(OPS))
    import registry

    return registry.benchmark(OP).floor(registry.Size(batch))["forward"].bytes


def counted(page: str) -> float:
    """Return the bytes of all launches in ncu's CSV, which holds one row per launch and metric."""
    lines = [line for line in page.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["Metric Name"] in METRICS]
    units = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    return sum(float(row["Metric Value"].replace(",", "")) * units[row["Metric Unit"]] for row in rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--launch", action="store_true", help="call the op, and no more")
    options = parser.parse_args(arguments)
    if options.launch:
        launch(options.batch)
        return 0
    if shutil.which("ncu") is None:
        print("not counted: Nsight Compute (ncu) is not on PATH")
        return 3
    # The warm-up's kernels are other ones: Triton's own names hold the op's.
    watch = ["ncu", "--csv", "--metrics", ",".join(METRICS), "--kernel-name", f"regex:.*{OP.partition('_')[0]}.*"]
    own = [sys.executable, __file__, "--launch", f"--batch={options.batch}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([*watch, *own], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    moved = counted(done.stdout)
    if done.returncode or not moved:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line] or ["no counters"]
        print(f"not counted: {said[0]}")
        return 3
    share = moved / floor(options.batch)
    print(f"{OP}, B = {options.batch}: {moved / 1e6:.0f} MB moved, {share:.2f} x its floor, at most {MOST:.2f}")
    return int(share > MOST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
