"""The ops of ccMIM, usable without the trainer.

Each op is a folder: `reference.py` is its specification in plain PyTorch, `op.py` its public function.
"""

from ccmim_kernels.cls_row import cls_row
from ccmim_kernels.divide_tokens import Divided, divide_tokens
from ccmim_kernels.gather_tokens import gather_tokens
from ccmim_kernels.hog_target import hog_target
from ccmim_kernels.info_nce import info_nce, moco_nce
from ccmim_kernels.masked_patch_loss import masked_patch_loss, masked_target
from ccmim_kernels.partition import Partition, partition_from_mask
from ccmim_kernels.patches import patchify, unpatchify
from ccmim_kernels.restore_tokens import restore_tokens
from ccmim_kernels.sample_partition import sample_partition

__all__ = [
    "Divided",
    "Partition",
    "cls_row",
    "divide_tokens",
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
    "unpatchify",
]
