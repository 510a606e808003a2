#!/usr/bin/env bash
# torch 2.15.0: FlopCounterMode takes the heads of aten::_efficient_attention_forward for tokens, and tokens for heads.
#
# The operator's inputs are [B, T, N, H] (tokens, heads), those of aten::_scaled_dot_product_* are [B, N, T, H]; the counter
# reads both as [B, N, T, H]. F.scaled_dot_product_attention never shows it, since it calls the latter; xformers and whoever
# else calls the operator itself gets 4 B T N² H instead of 4 B N T² H FLOPs: a quarter at 12 heads and 50 tokens. With fewer
# queries than keys it is no wrong number but an AssertionError, which ends the program that counts. Meta tensors show it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0
cat > "$folder/count.py" << 'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode

B, N, T, H = 2, 12, 50, 64


def counted(queries: int) -> int:
    q, k = (torch.empty(B, tokens, N, H, device="meta", dtype=torch.float16) for tokens in (queries, T))
    with FlopCounterMode(display=False) as counter:
        torch.ops.aten._efficient_attention_forward(q, k, k, None, None, None, None, None, 0.0, 0, False)
    return counter.get_total_flops()


print("torch", torch.__version__.partition("+")[0])
print("true:", 4 * B * N * T * T * H, "counted:", counted(T), "tokens and heads exchanged:", 4 * B * T * N * N * H)
try:
    print("one query:", counted(1))
except AssertionError:
    print("one query: AssertionError")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/count.py")
echo "$seen"
[ "$seen" = "torch 2.15.0
true: 15360000 counted: 3686400 tokens and heads exchanged: 3686400
one query: AssertionError" ]
