#!/usr/bin/env bash
# torch 2.7.1: on CPUs FSDP2 adds the gradients of its ranks where it says that it averages them.
#
# One expects the gradient of fully_shard to be the mean over ranks, as DDP's is, or an error. gloo's all_reduce refuses
# ReduceOp.AVG, but its reduce_scatter_tensor takes AVG and returns the sum, and FSDP2 calls that. AdamW hides it, since
# a factor common to all gradients leaves its steps alone; the norm, clipping and SGD do not. torch 2.15.0 averages.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/average.py" << 'PYTHON'
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


def rank_main(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    scattered, reduced = torch.zeros(1), torch.ones(1) * (rank + 1)
    dist.reduce_scatter_tensor(scattered, torch.ones(2) * (rank + 1), op=dist.ReduceOp.AVG)
    try:
        dist.all_reduce(reduced, op=dist.ReduceOp.AVG)
        said = f"{reduced.item():.1f}"
    except RuntimeError:
        said = "RuntimeError"
    model = nn.Linear(1, 2, bias=False)
    nn.init.ones_(model.weight)
    fully_shard(model)
    model(torch.ones(1, 1) * (rank + 1)).sum().backward()
    gradient = model.weight.grad.full_tensor()[0].item()
    if rank == 0:
        version = torch.__version__.partition("+")[0]
        print(f"{version} of 1 and 2: reduce_scatter {scattered.item():.1f}, all_reduce {said}, FSDP2 {gradient:.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_main, nprocs=2)
PYTHON
for version in 2.7.1 2.15.0; do
    "$folder/venv/bin/pip" install --quiet "torch==$version" numpy
    "$folder/venv/bin/python" "$folder/average.py" 2> /dev/null
done | tee "$folder/seen"
diff - "$folder/seen" << 'EXPECTED'
2.7.1 of 1 and 2: reduce_scatter 3.0, all_reduce RuntimeError, FSDP2 3.0
2.15.0 of 1 and 2: reduce_scatter 1.5, all_reduce 1.5, FSDP2 1.5
EXPECTED
