"""This package holds the ops of ccMIM, usable without the trainer.

An op has one file here: its specification in plain PyTorch, its public function, its operator for torch.compile and
autograd. Its kernels have the file of the same name in `triton_impl/`. The function checks its arguments: a ValueError
names what does not fit (a shape, a dtype, a value) and its limit.
"""

from ccmim_kernels.cls_row import cls_row
from ccmim_kernels.dispatch import check_triton
from ccmim_kernels.divide_tokens import Divided, divide_tokens
from ccmim_kernels.embed_tokens import Embedded, embed_tokens, folded_logits
from ccmim_kernels.gather_tokens import gather_tokens
from ccmim_kernels.hog_target import hog_target
from ccmim_kernels.info_nce import info_nce, moco_nce
from ccmim_kernels.masked_patch_loss import NORM_PIX_EPS, masked_patch_loss, masked_target, patchify, unpatchify
from ccmim_kernels.restore_tokens import restore_tokens
from ccmim_kernels.sample_partition import STRATEGIES, Partition, partition_from_mask, sample_partition, teacher_ids

__all__ = [
    "NORM_PIX_EPS",
    "STRATEGIES",
    "Divided",
    "Embedded",
    "Partition",
    "check_triton",
    "cls_row",
    "divide_tokens",
    "embed_tokens",
    "folded_logits",
    "gather_tokens",
    "hog_target",
    "info_nce",
    "masked_patch_loss",
    "masked_target",
    "moco_nce",
    "partition_from_mask",
    "patchify",
    "restore_tokens",
    "sample_partition",
    "teacher_ids",
    "unpatchify",
]
