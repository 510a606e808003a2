from ccmim_kernels.gather_tokens.op import gather_tokens as gather_tokens
