"""Vision Transformers as DINO trains them: no classifier, any image size.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), https://arxiv.org/abs/2010.11929;
the sizes follow Touvron et al., "DeiT" (2021), https://arxiv.org/abs/2012.12877.
Parameter names are timm's (`blocks.0.attn.qkv.weight`), so weights can be exchanged with timm.

Shapes: B images, C channels, H x W pixels, P patch, N = 1 + (H/P)(W/P) tokens, D width, h heads.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D), and the attention itself, (B, h, N, N).

    The attention is None where a fused kernel computes the output; `explicit` and forward hooks turn that
    kernel off.
    """

    explicit = False

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, cls_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, h, N, D/h); with `cls_only`, only the first token's query."""
        if cls_only and _is_plain(self.qkv):  # else an adapter has changed or replaced it, e.g. LoRA
            D, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, :1], weight[:D], None if bias is None else bias[:D])
            k, v = F.linear(x, weight[D:], None if bias is None else bias[D:]).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q = q[:, :1] if cls_only else q
        return tuple(t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention of each query's token (row) over all tokens: (B, h, N, N); rows sum to 1."""
        return (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)

    def forward(self, x: Tensor, *, cls_only: bool = False) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(x, cls_only)
        # On the CPU, the fused kernel saves memory for many tokens, but it is slower for the few tokens of
        # training's small crops, and in bfloat16 for any number of tokens. For a single query it saves
        # nothing, and MPS of torch 2.8 to 2.11 computes it wrongly
        # (https://github.com/pytorch/pytorch/issues/181133).
        fused = x.device.type != "cpu" or (q.dtype == torch.float32 and not self.training)
        if fused and not (cls_only or self.explicit or self._forward_hooks):
            attention, out = None, F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            attention = self.weights(q, k)
            out = attention @ v
        return self.proj(out.transpose(1, 2).flatten(2)), attention  # (B, h, N, D/h) -> (B, N, D)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does the product of `nn.Linear` alone: no other class, no hook, no other `forward`."""
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return type(layer) is nn.Linear and not changed


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth on both branches: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, drop_path=0.0, norm_layer=nn.LayerNorm):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim))
        )
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, return_attention: bool = False, *, cls_only: bool = False) -> Tensor:
        """With `return_attention`, gives the attention instead, (B, h, N, N).

        With `cls_only`, computes the first token only, with the same result: (B, 1, D).
        """
        if return_attention:
            return self._attention(x)
        given = {"cls_only": True} if cls_only else {}  # another project's attention takes x alone
        attended = self.attn(self.norm1(x), **given)[0]
        x = (x[:, :1] if cls_only else x) + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor) -> Tensor:
        own = [module for module in self.attn.modules() if isinstance(module, Attention)]
        for module in own:  # no argument, as other projects wrap `attn`, or replace its `forward`
            module.explicit = True
        try:
            return self.attn(self.norm1(x))[1]
        finally:
            for module in own:
                module.explicit = False


class PatchEmbed(nn.Module):
    """Cut an image of any size into patches and project each: (B, C, H, W) -> (B, N - 1, D)."""

    def __init__(self, img_size=224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size  # the first has no effect
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def _bicubic(old: int, new: int, like: Tensor) -> Tensor:
    """Bicubic interpolation of `old` values to `new` ones as a matrix, (new, old).

    On a GPU the gradient of a product is the same in each run; that of F.interpolate is not.
    """
    # The + 0.1 kept the published code's output size from rounding down. It also moves the sampling
    # points, and the published weights were trained with that.
    scale: Any = ((torch.sym_float(new) + 0.1) / old, 1.0)  # in torch.jit.trace, `new` is a tensor
    columns = torch.eye(old, dtype=like.dtype, device=like.device)[None, :, :, None]
    return F.interpolate(columns, scale_factor=scale, mode="bicubic")[0, :, :, 0].T


class VisionTransformer(nn.Module):
    """Vision Transformer; `forward` gives the CLS token after the last norm, (B, D).

    `img_size`, a side or height and width, sets the grid of the learned position embedding; other sizes
    interpolate it. Height and width must be divisible by `patch_size`, else ValueError. As in the published
    code, `head` has `num_classes` outputs, and `forward` does not apply it.
    `drop_path_rate` grows linearly from 0 in the first block to its value in the last.
    """

    # Keep only the blocks' inputs and recompute the rest in the backward pass: less memory, more time.
    grad_checkpointing = False
    # In training, compute only the CLS token in the last block: less time. Forward hooks there see no other,
    # and neither the block nor its `attn` can be wrapped.
    cls_only = False

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        norm_layer=nn.LayerNorm,
        init_std: float = 0.02,
    ):
        super().__init__()
        sides = (img_size,) if isinstance(img_size, int) else img_size
        self.grid = sides[0] // patch_size, sides[-1] // patch_size  # rows and columns of the embedding
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, norm_layer)
            for rate in np.linspace(0, drop_path_rate, depth).tolist()
        )
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def interpolate_pos_encoding(self, x: Tensor | None, height: int, width: int) -> Tensor:
        """Position embedding for an image of height x width pixels: (1, N, D).

        `x`, the tokens, has no effect: other projects replace this method, by its published signature.
        """
        patch = self.patch_embed.patch_size
        rows, cols = height // patch, width // patch
        known, count = self.grid, self.pos_embed.shape[1] - 1
        if math.prod(known) != count:  # other projects replace the embedding by that of another square
            known = (math.isqrt(count),) * 2
        if (rows, cols) == known:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, known)
        grid = grid.to(torch.promote_types(grid.dtype, torch.float32))  # half precision is rounded once
        with torch.autocast(grid.device.type, enabled=False):
            resize = [_bicubic(old, new, grid) for old, new in zip(known, (rows, cols), strict=True)]
            grid = torch.einsum("ri,cj,bijd->brcd", *resize, grid)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2).to(self.pos_embed.dtype)], dim=1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """Images to tokens: (B, C, H, W) -> (B, N, D), CLS first."""
        B, _, H, W = x.shape
        patch = self.patch_embed.patch_size
        if H % patch or W % patch:
            raise ValueError(f"a {H}x{W} image does not divide into patches of {patch}")
        tokens = torch.cat([self.cls_token.expand(B, -1, -1), self.patch_embed(x)], dim=1)
        return tokens + self.interpolate_pos_encoding(tokens, H, W)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = self._run(block, x)
        given = {"cls_only": True} if self.cls_only and self.training else {}  # as in `Block.forward`
        x = self._run(self.blocks[-1], x, **given)
        return self.norm(x)[:, 0]  # with `cls_only`, x has no other token

    def _run(self, block: nn.Module, x: Tensor, **kwargs) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block: (B, h, N, N)."""
        return self.get_attention(x)

    def get_attention(self, x: Tensor, layer: int = 1, token: int | None = None) -> Tensor:
        """Attention in a block, counted from the end: (B, h, N, N); of one token over all: (B, h, 1, N).

        One token, counted from the end if negative, needs no memory for the rows of the others. Raises
        IndexError for a block or a token that is not there.
        """
        x = self.prepare_tokens(x)
        if not (1 <= layer <= len(self.blocks) and -x.shape[1] <= (token or 0) < x.shape[1]):
            raise IndexError(f"layer {layer} of {len(self.blocks)}, token {token} of {x.shape[1]}")
        block: Any = self.blocks[-layer]  # a Block
        for before in self.blocks[:-layer]:
            x = before(x)
        if token is None:
            return block(x, return_attention=True)
        q, k, _ = block.attn.project(block.norm1(x), cls_only=token == 0)
        return block.attn.weights(q[:, :, token, None], k)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Tokens after each of the last `n` blocks, normed: n times (B, N, D)."""
        x = self.prepare_tokens(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.blocks) - i <= n:
                outputs.append(self.norm(x))
        return outputs


def _vit(width: int, depth: int, heads: int, patch_size: int, **kwargs) -> VisionTransformer:
    settings: dict[str, Any] = dict(
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return VisionTransformer(**(settings | kwargs))


def vit_nano(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """1.2 M parameters, for the demo, for tests and for small images; not from the paper.

    The usual `init_std` of 0.02 suits widths of 384 and more. At a width of 128 the blocks would add almost
    nothing at the start; 0.09 is about 1 / sqrt(width).
    """
    return _vit(128, 6, 4, patch_size, **({"init_std": 0.09} | kwargs))


def vit_tiny(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """5.5 M parameters."""
    return _vit(192, 12, 3, patch_size, **kwargs)


def vit_small(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """21.7 M parameters."""
    return _vit(384, 12, 6, patch_size, **kwargs)


def vit_base(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """85.8 M parameters."""
    return _vit(768, 12, 12, patch_size, **kwargs)


# Each can be called without arguments, and makes a network with `embed_dim`.
VITS = {
    "vit_nano": vit_nano,
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "deit_tiny": vit_tiny,  # the published code's names for the same networks
    "deit_small": vit_small,
}
