#!/usr/bin/env bash
# torch 2.15.0: onednn.qlinear_prepack reads a weight in the order of its memory, whatever its strides, without a word.
#
# One expects an operator to compute with the numbers that a tensor has, or to refuse a layout: a weight that comes as the
# transpose of a [in, out] matrix has the same numbers as its contiguous copy. The product of 8 bits is another one, of the
# right shape. contiguous() before it is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
cat > "$folder/prepack.py" << 'PYTHON'
import torch

drawn = torch.Generator().manual_seed(0)
weight = torch.randint(-127, 128, (64, 32), dtype=torch.int8, generator=drawn)
x = torch.randint(0, 256, (8, 32), dtype=torch.uint8, generator=drawn)
zero = torch.zeros(64, dtype=torch.int32)
expected = (x.double() - 128) @ weight.double().T
print(torch.__version__.partition("+")[0])
for name, one in (("contiguous", weight), ("transposed", weight.T.contiguous().T)):
    packed = torch.ops.onednn.qlinear_prepack(one, None)
    scales = (torch.ones(64), zero, None, 1.0, 0, torch.float32, "none", [], "")
    found = torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, packed, *scales)
    print(f"{name}: equal numbers {torch.equal(one, weight)}, right product {torch.equal(found.double(), expected)}")
PYTHON
"$folder/venv/bin/python" "$folder/prepack.py" 2> /dev/null | tee "$folder/seen"
diff - "$folder/seen" << 'EXPECTED'
2.15.0
contiguous: equal numbers True, right product True
transposed: equal numbers True, right product False
EXPECTED
