"""The block of timm's Eva family as a `ViTBlock`: rotary positions, SwiGLU, queries, keys and values of any layout.

The family is EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT and others; timm's Eva builds them. The weights and
their names stay timm's.
"""

# B batch, T tokens, P prefix tokens, N heads, H head dim, D width

from typing import Any

import torch
from timm.layers import Attention, LayerNorm, Mlp, SwiGLUPacked, apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.parts import ratio

ROTARY = "eva_giant_patch14_224"  # timm's Eva without a part that cannot be left out: any plain ViT by its arguments
# RoPE-ViT's axial rotations: angles of row and column, frequencies down to those of temperature 100.
_ROTATIONS = {"use_rot_pos_emb": True, "rope_grid_indexing": "xy", "rope_temperature": 100.0}


class EvaViTBlock(ViTBlock):
    """This block is timm's EvaBlock with the `forward` of `ViTBlock`; timm's Eva takes no class of a block to build."""

    def forward(
        self,
        x_BTD: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **options: Tensor | bool | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `ViTBlock.forward`."""
        if attn_mask is not None or is_causal:
            return EvaBlock.forward(self, x_BTD, rope, attn_mask, is_causal)
        return super().forward(x_BTD, rope=rope, **options)

    def project(self, x_BTD: Tensor, parts: slice, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        """See `ViTBlock.project`: queries and keys are rotated by `rope`, where there is one.

        Keys and values of few heads are repeated for the queries' (grouped attention).
        """
        found = super().project(x_BTD, parts)
        if rope is not None:
            rotates = 2 - parts.start  # queries and keys
            found = *(self._rotated(x_BTNH, rope) for x_BTNH in found[:rotates]), *found[rotates:]
        groups = getattr(self.attn, "num_kv_groups", 1)
        if groups == 1:
            return found
        return *found[: 1 - parts.start], *(x.repeat_interleave(groups, dim=2) for x in found[1 - parts.start :])

    def projected(self, x_BTD: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """See `ViTBlock.projected`; queries, keys and values may have layers of their own, of fewer heads for two."""
        attn = self.attn
        if attn.qkv is not None:
            return super().projected(x_BTD, parts)
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)[parts]
        return tuple(layer(x_BTD).unflatten(-1, (-1, attn.head_dim)) for layer in layers)

    def qkv_bias(self) -> Tensor | None:
        """See `ViTBlock.qkv_bias`; EVA's keys have none, for which timm keeps zeros."""
        attn = self.attn
        if getattr(attn, "q_bias", None) is None:
            return super().qkv_bias()
        return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])

    def _rotated(self, x_BTNH: Tensor, rope: Tensor) -> Tensor:
        """Rotate pairs of a head's channels of all tokens but the prefix."""
        prefix_BNPH, x_BNTH = x_BTNH.transpose(1, 2).tensor_split([self.num_prefix_tokens], dim=2)
        x_BNTH = apply_rot_embed_cat(x_BNTH, rope, half=getattr(self.attn, "rotate_half", False))
        return torch.cat([prefix_BNPH, x_BNTH.to(prefix_BNPH.dtype)], dim=2).transpose(1, 2)

    def ls1(self, x_BTD: Tensor) -> Tensor:
        """Scale the attention's channels, as timm's `Block.ls1`; Eva names the weight otherwise."""
        return x_BTD if self.gamma_1 is None else self.gamma_1 * x_BTD

    def ls2(self, x_BTD: Tensor) -> Tensor:
        """Scale the MLP's channels."""
        return x_BTD if self.gamma_2 is None else self.gamma_2 * x_BTD


def prepare_(vit: Eva) -> None:
    """Make timm's EvaBlocks of an encoder `EvaViTBlock`s; others stay as they are. Leave its coordinates alone.

    timm may shift and scale the coordinates of rotations at random in training. Not here: both sets of patches, and all
    steps that fill a bank, are to see the same.
    """
    for block in vit.blocks:
        if type(block) is EvaBlock:
            block.__class__ = EvaViTBlock
    if vit.rope is not None:
        vit.rope.aug_active = False


def rotary_form(arch: str, own: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments of an architecture with rotary positions in place of those that it adds.

    `own` is the architecture `arch` as timm has it. One that is rotary keeps its rotations alone; others get RoPE-ViT's
    axial ones. Raises ConfigError for one that has what timm's Eva cannot build.
    """
    if isinstance(own, Eva):
        added = {} if own.pos_embed is None else {"use_abs_pos_emb": False}
        return arch, added | (_ROTATIONS if own.rope is None else {})
    if reason := _obstacle(own):
        raise ConfigError(
            f"model.positions=rope: {arch} has {reason}, for which timm has no rotary form; take a plain ViT, as "
            "vit_base_patch16_224, or vit_base_patch16_rope_224"
        )
    block = own.blocks[0]
    arguments = {
        "patch_size": own.patch_embed.patch_size[0],
        "embed_dim": own.embed_dim,
        "depth": len(own.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio(block.mlp.fc1.out_features, own.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "num_reg_tokens": own.num_reg_tokens,
        "attn_type": "rope",
        "use_abs_pos_emb": False,
        **_ROTATIONS,
    }
    if not isinstance(block.attn.q_norm, nn.Identity):
        arguments["qk_norm"] = True
    if not isinstance(block.ls1, nn.Identity):
        arguments["init_values"] = block.ls1.init_values
    return ROTARY, arguments


def as_eva(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of timm's VisionTransformer, as of `parts.chosen_parts`, as its Eva takes them."""
    found = {"num_reg_tokens" if key == "reg_tokens" else key: value for key, value in arguments.items()}
    found.pop("act_layer", None)
    if found.pop("mlp_layer", None) is SwiGLUPacked:
        # Of a ViT the ratio counts the gates too.
        found |= {"swiglu_mlp": True, "mlp_ratio": found["mlp_ratio"] / 2}
    return found


def _obstacle(own: nn.Module) -> str:
    """Return in words what of an architecture timm's Eva has not; empty: nothing."""
    block = own.blocks[0]
    if getattr(own, "dist_token", None) is not None:
        return "a token of distillation"
    standard = (block, Block), (getattr(block, "attn", None), Attention)
    if odd := [type(part).__name__ for part, kind in standard if type(part) is not kind]:
        return f"blocks of another kind ({odd[0]})"
    # Behind the blocks, or behind the pooling, which becomes the former.
    last = own.fc_norm if isinstance(own.norm, nn.Identity) else own.norm
    norms = {(type(norm), getattr(norm, "eps", None)) for norm in (block.norm1, block.norm2, last)}
    inner = [getattr(block.attn, "norm", None), getattr(block.mlp, "norm", None), getattr(block.attn, "gate", None)]
    found = {
        "a norm before its blocks": not isinstance(own.norm_pre, nn.Identity),
        "norms other than LayerNorm of eps 1e-6": norms != {(LayerNorm, 1e-6)},
        "norms or gates within attention or MLP": not all(one is None or isinstance(one, nn.Identity) for one in inner),
        "an MLP other than GELU's": type(block.mlp) is not Mlp or type(block.mlp.act) is not nn.GELU,
    }
    return next((words for words, there in found.items() if there), "")


def grouped_heads(own: nn.Module, depth: int = 0, num_heads: int = 0, **_: int) -> dict[str, Any]:
    """Return timm's `num_kv_heads` for another depth or other heads, 0: as the architecture `own` has; or nothing.

    Where heads share keys, the architecture's first and last blocks do not: there are as many such blocks then, and
    elsewhere as many heads to a key.
    """
    shared = [getattr(getattr(block, "attn", None), "num_kv_groups", 0) for block in own.blocks]
    if not max(shared) or not (depth or num_heads):
        return {}
    blocks, heads = depth or len(shared), num_heads or own.blocks[0].attn.num_heads
    if max(shared) == 1:
        return {"num_kv_heads": heads}
    outer = next(index for index, groups in enumerate(shared) if groups > 1)
    keys = [heads if min(index, blocks - 1 - index) < outer else heads // max(shared) for index in range(blocks)]
    return {"num_kv_heads": keys}
