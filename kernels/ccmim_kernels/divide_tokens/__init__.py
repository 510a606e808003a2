from ccmim_kernels.divide_tokens.op import Divided as Divided
from ccmim_kernels.divide_tokens.op import divide_tokens as divide_tokens
