"""The kind of work of an operator or a GPU kernel, by its name alone."""

import re

# Where kernels overlap on a GPU, a moment belongs to the first of these kinds.
KINDS = "matmul", "attention", "our kernels", "elementwise", "optimizer", "communication", "other", "data wait", "idle"

_MATMUL_NAMES = r"gemm|gemv|nvjet|cublas|xmma|splitk_?reduce|tensorop|\bdot_kernel|conv(?:olve|2d)"
_ELEMENTWISE_NAMES = (
    r"elementwise|layer_?norm|batch_?norm|GammaBeta|cuComputeGradInput|softmax|reduce_kernel|CatArray|copy"
    r"|gather|scatter|index_?select|index_?put|fill|gelu|welford"
)

# The first pattern found decides. Inductor names a kernel after the operators around it, products among them, so its
# prefixes come before the words: tem(plate) is a product or flex attention, for(each) the optimizer.
_KERNELS = (
    # All kernels of ccmim_kernels are named so; test_ahead_of_time.py refuses another name.
    ("our kernels", re.compile(r"^ccmim_\w+_kernel")),
    ("attention", re.compile(r"^triton_tem_fused_\w*attention")),
    ("matmul", re.compile(r"^triton_(?:tem_fused|mm|bmm|addmm)")),
    ("optimizer", re.compile(r"^triton_for_fused|multi_tensor_apply|fused_?adam", re.IGNORECASE)),
    ("elementwise", re.compile(r"^triton_[a-z]+_fused|^Mem(?:cpy|set)")),
    ("communication", re.compile(r"nccl", re.IGNORECASE)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE)),
    ("matmul", re.compile(_MATMUL_NAMES, re.IGNORECASE)),
    ("elementwise", re.compile(_ELEMENTWISE_NAMES, re.IGNORECASE)),
)

# Names of aten operators, without underscores at either end.
_PRODUCTS = re.compile(
    r"(?:add|badd|b)?mm|(?:add)?mv|dot|matmul|linear|einsum|addmm_activation|mkldnn_linear\w*"
    r"|(?:mkldnn_|slow_|thnn_)?conv(?:olution|[123]d)\w*"
)

# These change a tensor's description, reserve memory or sort: none is bound by the bytes that it moves.
_NO_TRAFFIC = re.compile(
    r"(?:unsafe_)?view\w*|reshape\w*|as_strided|t|numpy_T|transpose|permute|swapaxes|movedim|expand\w*|broadcast_tensors"
    r"|select|slice|narrow|(?:un)?squeeze|(?:un)?flatten|unbind|split\w*|chunk|diagonal|alias|detach|lift_fresh|unfold"
    r"|real|(?:new_)?empty\w*|resize|set|item|local_scalar_dense|is_nonzero|result_type|resolve_\w+|sort|argsort|topk"
    r"|requires_grad|record_stream"
)


# Collectives, DDP's buckets, and the autograd functions that wait for a collective (ours and torch's).
_BETWEEN_RANKS = re.compile(r"^(?:c10d::|gloo:|nccl:|record_param_comms|_All|_Send|_Arrive)|\breducer::")


def kind_of_kernel(name: str) -> str:
    """Return the kind of a GPU kernel or memory operation by its name in a trace; `other` for an unknown name."""
    return next((kind for kind, pattern in _KERNELS if pattern.search(name)), "other")


def kind_of_op(name: str) -> str:
    """Return the kind of the time that a dispatcher operator or a named range spends outside of those it calls.

    An aten operator of no other kind is `elementwise`: bound by the memory it reads and writes. Views, allocation,
    sorting and the autograd engine are `other`.
    """
    if name.startswith("ccmim::"):
        return "our kernels"
    if name.startswith("Optimizer.") or "_foreach_" in name or "_fused_adam" in name:
        return "optimizer"
    if name == "mkldnn::_linear_pointwise":
        return "matmul"
    if not name.startswith("aten::"):
        return "communication" if _BETWEEN_RANKS.search(name) else "other"
    stem = name.removeprefix("aten::").strip("_")
    if "attention" in stem:
        return "attention"
    if _PRODUCTS.fullmatch(stem):
        return "matmul"
    return "other" if _NO_TRAFFIC.fullmatch(stem) else "elementwise"
