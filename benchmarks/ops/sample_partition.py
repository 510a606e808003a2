"""This benchmark times `sample_partition` by scores with Gumbel noise."""

# B batch, L patches

import torch
from registry import BYTE, FULL, ID, Case, Passes, Size, Work, empty, ids, made

import ccmim_kernels
from ccmim_kernels.triton_impl import sample_partition as launchers
from ccmim_kernels.triton_impl.launch import ROW_SIZES


def partition_bytes(s: Size) -> int:
    """Count three index tensors, of K, M and L = K + M columns, a mask, and a flag per image.

    And the indices of the teacher's patches, unless it sees all that are masked.
    """
    teacher = s.teacher if s.teacher < s.masked else 0
    return s.batch * ((2 * s.patches + teacher) * ID + s.patches * BYTE + BYTE)


def tensors_of(partition: ccmim_kernels.Partition) -> tuple[torch.Tensor, ...]:
    """Return each tensor of a partition once: the teacher's patches may be the masked ones."""
    return tuple({id(tensor): tensor for tensor in partition}.values())


def floor(s: Size) -> Passes:
    return {"forward": Work(s.batch * (s.patches * FULL + ID) + partition_bytes(s))}


def case(s: Size, device: torch.device) -> Case:
    def call(logits_BL, ids_B, *, kernels, **options):
        options = {"keep": s.keep, "teacher": s.teacher, "grid": s.grid, "kernels": kernels, **options}
        return tensors_of(ccmim_kernels.sample_partition(logits_BL, ids_B, seed=0, epoch=0, **options))

    inputs = (made(s.batch, s.patches, device=device), torch.arange(s.batch, device=device))
    return Case(call, inputs, variants=({"strategy": "block"}, {"important": s.masked // 2}))


def launches() -> None:
    for size in ROW_SIZES:
        for logits, strategy in ((empty(2, size), "importance_sampling"), (None, "block")):
            # Whether the teacher sees all is an argument like the others: no kernel of its own.
            sampling = {"keep": size // 4, "seed": 0, "epochs_B": ids(2), "strategy": strategy, "noise": "gumbel"}
            sampling |= {"block_min": 16, "teacher": size // 4, "temperature": (1.0, 1.0), "epochs": 1}
            for important in (size - size // 4, 1) if logits is not None else (1,):
                launchers.sample_partition(
                    logits, ids(2), 1, size, **sampling, important=(important,) * 2, hints=(0, 0)
                )
