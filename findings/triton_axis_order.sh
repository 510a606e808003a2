#!/usr/bin/env bash
# Triton 3.3.1 and 3.6.0: the lanes of a warp lie along the first axis of a tensor of three, in 3.9.0 along the second.
#
# Entry (k * 32 + s) * 8 + i of a tensor [4, 32, 8] is value i of lane s in chunk k: one expects the 32 lanes of a warp
# along s, so that a chunk is one load of 512 bytes in a row, and a sum over k adds registers. Axes whose neighbours are
# no neighbours in memory are equal to the compiler, and it takes the first of them: threadsPerWarp is [4, 8, 1], order
# [2, 0, 1]. Nothing says so; a kernel that counts on registers of a lane is slow, or spills. As [4, 256], two axes, the
# layout is the same in all three versions. Compiled ahead of time: no GPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/axes.py" << 'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def three_axes(p):
    lane = tl.arange(0, 4)[:, None, None] * 32 + tl.arange(0, 32)[None, :, None]
    entry = lane * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(p + entry, tl.load(p + entry) * 2)


@triton.jit
def two_axes(p):
    entry = tl.arange(0, 4)[:, None] * 256 + tl.arange(0, 256)[None, :]
    tl.store(p + entry, tl.load(p + entry) * 2)


def threads(kernel) -> str:
    """Return how the 32 threads of the warp are spread over the axes."""
    source = ASTSource(kernel, {"p": "*fp16"}, {}, {(0,): [["tt.divisibility", 16]]})
    built = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    return " ".join(dict.fromkeys(re.findall(r"threadsPerWarp = (\[[\d, ]+\])", built.asm["ttgir"])))


print("triton", triton.__version__, threads(three_axes), threads(two_axes))
PYTHON
for version in 3.3.1 3.6.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "triton==$version" setuptools
    TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/axes.py" 2> /dev/null
done | tee "$folder/seen"
[ "$(cat "$folder/seen")" = "triton 3.3.1 [4, 8, 1] [1, 32]
triton 3.6.0 [4, 8, 1] [1, 32]
triton 3.9.0 [1, 32, 1] [1, 32]" ]
