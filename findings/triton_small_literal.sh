#!/usr/bin/env bash
# Triton 3.3.1: tl.maximum(x, 1e-38) of a float32 x is computed in float64; in Triton 3.9.0 it is float32.
#
# A Python number beside a tensor takes the tensor's type, one expects, and `x + 1e-38` does in both. `tl.maximum` makes a
# tensor of the number first, and a number below float32's smallest normal one, 1.1755e-38, becomes float64 there; so does
# the result, and what follows. Nothing says so: the kernel is slow (1/32 to 1/64 of the rate), or does not compile where
# what follows has no float64 form. A limit of 1.2e-38 is float32 in both. Compiled ahead of time: no GPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/literal.py" << 'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def limited(p):
    tl.store(p, tl.sqrt(tl.maximum(tl.load(p), 1e-38)))


@triton.jit
def limited_by_a_normal_number(p):
    tl.store(p, tl.sqrt(tl.maximum(tl.load(p), 1.2e-38)))


@triton.jit
def added(p):
    tl.store(p, tl.sqrt(tl.load(p) + 1e-38))


def has_float64(kernel) -> bool:
    built = triton.compile(ASTSource(kernel, {"p": "*fp32"}, {}), target=GPUTarget("cuda", 80, 32))
    return "f64" in built.asm["ttir"]


print("triton", triton.__version__, *map(has_float64, (limited, limited_by_a_normal_number, added)))
PYTHON
for version in 3.3.1 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "triton==$version" setuptools
    TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/literal.py" 2> /dev/null
done | tee "$folder/seen"
[ "$(cat "$folder/seen")" = "triton 3.3.1 True False False
triton 3.9.0 False False False" ]
