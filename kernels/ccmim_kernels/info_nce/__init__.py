from ccmim_kernels.info_nce.op import info_nce as info_nce
from ccmim_kernels.info_nce.op import moco_nce as moco_nce
