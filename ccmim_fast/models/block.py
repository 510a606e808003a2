"""The transformer block: timm's weights and arithmetic, for some of its tokens alone, with any attention backend.

The weights and their names stay timm's.
"""

# B batch, Q query tokens, T tokens, L patches, N heads, H head dim, D width

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.models.memory_efficient import memory_efficient
from ccmim_kernels import cls_row
from ccmim_kernels.dispatch import choosable

# `sdpa` leaves the choice to torch; the three behind it are its CUDA kernels, one by one.
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CUDA_ONLY = ("xformers", *_KERNELS)
BACKENDS = ("sdpa", "plain", *CUDA_ONLY)

# A backend for each number of tokens, heads, and channels of a head; `auto` for others.
Backends = tuple[tuple[tuple[int, int, int], str], ...]


def check_attention(name: str, device: torch.device) -> None:
    """Return if `train.attention=name` can run on `device`; else ConfigError, or MachineError without xformers."""
    if name in CUDA_ONLY and device.type != "cuda":
        raise ConfigError(f"train.attention={name} needs CUDA, got {device.type}; use attention=sdpa")
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise MachineError("train.attention=xformers: not installed; pip install xformers, or use attention=sdpa")


# What the kernels behind a name take, beside CUDA; `check_heads` asks torch, which knows more.
_LIMITS = {
    "flash": "half precision, compute capability 8.0 and at most 256 channels a head",
    "cudnn": "half precision, compute capability 8.0 and a multiple of 8 channels a head up to 128",
    "efficient": "a multiple of 8 channels a head in half precision, and capability 8.0 for bf16",
    "xformers": "the same as one of efficient, flash and cudnn, and a build for this torch",
}


def check_heads(blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Return if the backend of each `ViTBlock` has kernels for its heads, forward and backward, in `dtype`.

    Raises ConfigError where it has none for this dtype, number of channels a head, or GPU.
    """
    blocks = (block for block in blocks if isinstance(block, ViTBlock))
    asked = dict.fromkeys((block.attention, block.attn.head_dim) for block in blocks)
    for name, channels in asked:
        if name in CUDA_ONLY and not _has_kernel(name, torch.empty(1, 8, 1, channels, device=device, dtype=dtype)):
            kind, (major, minor) = str(dtype).removeprefix("torch."), torch.cuda.get_device_capability(device)
            raise ConfigError(
                f"train.attention={name}: no kernel for {kind}, {channels} channels a head and compute capability "
                f"{major}.{minor}; it needs {_LIMITS[name]}; use attention=sdpa"
            )


def _has_kernel(name: str, x_BTNH: Tensor) -> bool:
    x_BTNH.requires_grad_()
    if name == "xformers":  # which has no such question
        try:
            attention(x_BTNH, x_BTNH, x_BTNH, backend=name).sum().backward()
            return True
        except Exception:  # the library's own: KeyError for float64
            return False
    x_BNTH = x_BTNH.transpose(1, 2)
    can_use = getattr(torch.backends.cuda, f"can_use_{name}_attention")
    return can_use(torch.backends.cuda.SDPAParams(x_BNTH, x_BNTH, x_BNTH, None, 0.0, False, False))


# The choice of a backend depends on tokens, heads, and channels of a head.
@choosable(lambda q_BQNH, k_BTNH, *_: "attention " + " x ".join(map(str, k_BTNH.shape[1:])), by="backend")
def attention(
    q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, *, backend: str | Backends = "auto", dropout: float = 0.0
) -> Tensor:
    """Compute softmax(q k^T / sqrt(H)) v, [B, Q, N, H], in the dtype of the inputs.

    Equivalent PyTorch: `F.scaled_dot_product_attention` with tokens and heads swapped before and after.

    Args:
        q_BQNH, k_BTNH, v_BTNH: float of one dtype; all receive gradients.
        backend: `sdpa` (torch's choice), `auto` (the same, where nobody chose), `plain` (two products and a softmax,
            weights in memory), or, on CUDA, `flash`, `cudnn`, `efficient` or `xformers`; or one for each shape.
        dropout: share of the attention weights that are dropped.

    Raises:
        RuntimeError: from torch or xformers, where the backend has no kernel for the device, dtype or shape.
    """
    if not isinstance(backend, str):
        backend = _for_shape(backend, k_BTNH)
    if backend == "plain":
        return _plain(q_BQNH, k_BTNH, v_BTNH, dropout)
    if backend == "xformers":
        return memory_efficient(q_BQNH, k_BTNH, v_BTNH, dropout)
    with sdpa_kernel(_KERNELS[backend]) if backend in _KERNELS else contextlib.nullcontext():
        mixed_BNQH = F.scaled_dot_product_attention(
            q_BQNH.transpose(1, 2), k_BTNH.transpose(1, 2), v_BTNH.transpose(1, 2), dropout_p=dropout
        )
    return mixed_BNQH.transpose(1, 2)


def _plain(q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, dropout: float) -> Tensor:
    q_BNQH, k_BNTH, v_BNTH = (x.transpose(1, 2) for x in (q_BQNH, k_BTNH, v_BTNH))
    # Autocast would let the softmax return float32, and round for the second product.
    with torch.autocast(q_BQNH.device.type, enabled=False):
        weights_BNQT = ((q_BNQH * q_BNQH.shape[-1] ** -0.5) @ k_BNTH.transpose(2, 3)).softmax(-1)
        return (F.dropout(weights_BNQT, dropout) @ v_BNTH).transpose(1, 2)


def _for_shape(backends: Backends, k_BTNH: Tensor) -> str:
    _, T, N, H = k_BTNH.shape
    for shape, backend in backends:
        if shape == (T, N, H):
            return backend
    return "auto"


@contextlib.contextmanager
def attending_by(model: nn.Module, backend: str | Backends) -> Iterator[None]:
    """Let all `ViTBlock`s of a model take a backend within."""
    blocks = [module for module in model.modules() if isinstance(module, ViTBlock)]
    before = [block.attention for block in blocks]
    try:
        for block in blocks:
            block.attention = backend
        yield
    finally:
        for block, own in zip(blocks, before):
            block.attention = own


class ViTBlock(Block):
    """This block is timm's standard pre-norm block with a `forward` that can compute less and tell more.

    timm's `block_fn=` takes the class; the state dict has timm's names. `compute`, the arithmetic, may be replaced by
    its compiled self, which all blocks of a shape share.
    """

    attention = "auto"  # backend, or one for each shape, see the function
    kernels = "auto"  # implementation of `cls_row`, see `ccmim_kernels.dispatch`
    recompute = False  # keep the block's input alone, and compute the rest again backward (activation checkpointing)
    num_prefix_tokens = 1  # [CLS] and registers, which stand before the patches

    def forward(
        self,
        x_BTD: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        rope: Tensor | None = None,
        query_BQD: Tensor | None = None,
        reads_cls: bool = False,
        total_BL: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the block's output for all tokens, or for some of them.

        Args:
            x_BTD: tokens, prefix first.
            attn_mask, is_causal: timm's; with either, timm's own arithmetic runs.
            rope: sines and cosines of the rotations of the patches' queries and keys, see `tokens.rotary_tables`; for
                an `EvaViTBlock` alone.
            query_BQD: some of `x_BTD`, whose output alone is computed; keys and values are those of all tokens. With
                `rope` they are of the prefix, which is not rotated.
            reads_cls: return [CLS]'s attention too; [CLS] must be the first query token.
            total_BL: the sum of earlier blocks' rows, which this block's is added to; None: nothing yet.

        Returns:
            [B, T, D], or [B, Q, D] of the query tokens: equal to those rows of the whole output. With `reads_cls` also
            the sum of [CLS]'s softmaxed rows over the patches, averaged over heads, [B, L] float32 without gradient.
        """
        if attn_mask is not None or is_causal:
            return super().forward(x_BTD, attn_mask, is_causal)
        if self.recompute and x_BTD.requires_grad:
            return checkpoint(self.compute, self, x_BTD, query_BQD, reads_cls, total_BL, rope, use_reentrant=False)
        return self.compute(self, x_BTD, query_BQD, reads_cls, total_BL, rope)

    @staticmethod
    def compute(
        block: "ViTBlock",
        x_BTD: Tensor,
        query_BQD: Tensor | None,
        reads_cls: bool,
        total_BL: Tensor | None,
        rope: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        attn, normed_BTD = block.attn, block.norm1(x_BTD)
        if query_BQD is None:
            query_BQD, normed_BQD = x_BTD, normed_BTD
            q_BQNH, k_BTNH, v_BTNH = block.project(normed_BTD, slice(0, 3), rope)
        else:
            normed_BQD = block.norm1(query_BQD)
            (q_BQNH,) = block.project(normed_BQD, slice(0, 1))
            k_BTNH, v_BTNH = block.project(normed_BTD, slice(1, 3), rope)
        if reads_cls:
            total_BL = block._row(q_BQNH, k_BTNH, "softmax", total_BL)
        dropout = attn.attn_drop.p if attn.training else 0.0
        mixed_BQNH = attention(q_BQNH, k_BTNH, v_BTNH, backend=block.attention, dropout=dropout)
        mixed = attn.norm(mixed_BQNH.flatten(2))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            mixed = mixed * gate(normed_BQD).sigmoid()
        x_BQD = query_BQD + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(mixed))))
        x_BQD = x_BQD + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BQD))))
        return (x_BQD, total_BL) if reads_cls else x_BQD

    def project(self, x_BTD: Tensor, parts: slice, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return some of queries, keys and values, each [B, T, N, H], queries and keys normed.

        There is no rotation here, and so no `rope`: see `EvaViTBlock`.
        """
        assert rope is None, "a ViTBlock does not rotate"
        return self.normed(self.projected(x_BTD, parts), parts)

    def projected(self, x_BTD: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """Return some of queries, keys and values as their layer gives them, each [B, T, N, H]."""
        attn, weight, bias = self.attn, self.attn.qkv.weight, self.qkv_bias()
        width = attn.num_heads * attn.head_dim
        if parts != slice(0, 3):
            rows = slice(parts.start * width, parts.stop * width)
            weight, bias = weight[rows], None if bias is None else bias[rows]
        shape = (parts.stop - parts.start, attn.num_heads, attn.head_dim)
        return F.linear(x_BTD, weight, bias).unflatten(-1, shape).unbind(2)

    def qkv_bias(self) -> Tensor | None:
        """Return the bias of queries, keys and values, [3 * N * H], if they have one."""
        return self.attn.qkv.bias

    def normed(self, projected: tuple[Tensor, ...], parts: slice) -> tuple[Tensor, ...]:
        """Return those of queries, keys and values that there are, queries and keys behind their norms."""
        norms = (self.attn.q_norm, self.attn.k_norm)[parts]
        return *(norm(x_BTNH) for norm, x_BTNH in zip(norms, projected)), *projected[len(norms) :]

    def cls_attention(
        self, x_BTD: Tensor, kind: str, total_BL: Tensor | None = None, *, rope: Tensor | None = None
    ) -> Tensor:
        """Return [CLS]'s attention to the patches [B, L], added to `total_BL`, and compute nothing else of the block.

        `kind` is `logits`: E_h[q_0 K^T / sqrt(H)] (Eq. 4), or `softmax`: the mean over heads of the softmaxed row.
        """
        normed_BTD = self.norm1(x_BTD)
        (q_B1NH,) = self.project(normed_BTD[:, :1], slice(0, 1))
        (k_BTNH,) = self.project(normed_BTD, slice(1, 2), rope)
        return self._row(q_B1NH, k_BTNH, kind, total_BL)

    def folded_direction(self, cls_11D: Tensor) -> Tensor:
        """Return v [D] with Eq. 4's logits_i = LN(x_i) . v: gamma * W_K^T q_0 / (heads * sqrt(H)).

        It holds at the first block: [CLS] is the same for every image there, so q_0 is one vector and the mean over
        heads moves inside. gamma is the LayerNorm's weight; its bias and the key's bias add the same to every patch,
        which the softmax does not see. `scores.can_fold` must be true.
        """
        attn = self.attn
        # Always float32: the fold multiplies three tensors, and the result is one vector.
        with torch.autocast(cls_11D.device.type, enabled=False):
            (q_11NH,) = self.project(self.norm1(cls_11D.to(attn.qkv.weight.dtype)), slice(0, 1))
            q_D = q_11NH.flatten()
            width = len(q_D)
            direction_D = q_D @ attn.qkv.weight[width : 2 * width] * (attn.scale / attn.num_heads)
            return direction_D if self.norm1.weight is None else direction_D * self.norm1.weight

    def _row(self, q_BQNH: Tensor, k_BTNH: Tensor, kind: str, total_BL: Tensor | None) -> Tensor:
        return cls_row(
            q_BQNH[:, 0].detach(),
            k_BTNH.detach(),
            prefix=self.num_prefix_tokens,
            kind=kind,
            scale=self.attn.scale,
            total_BL=total_BL,
            kernels=self.kernels,
        )
