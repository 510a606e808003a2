from ccmim_kernels.hog_target.op import hog_target as hog_target
