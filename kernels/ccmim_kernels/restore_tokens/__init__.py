from ccmim_kernels.restore_tokens.op import restore_tokens as restore_tokens
