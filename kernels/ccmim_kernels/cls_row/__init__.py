from ccmim_kernels.cls_row.op import cls_row as cls_row
