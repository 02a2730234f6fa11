"""timm's transformer blocks on images of several sizes at once, or for some of the tokens only; and attention weights."""

from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from sslvision.nn.cpu import CPUAttention, Sizes, UnfusedAttention, uses_unfused_attention
from sslvision.nn.packed_attention import PackedAttention, can_pack, packed_attention

# B images, N tokens, n of them requested, T tokens of all images, D width, d width of a head


def divisible(block: Any) -> bool:
    """Return whether the functions below can run the block: a pre-norm timm Block with plain multi-head attention."""
    return (
        getattr(block, "unsharded_class", type(block)) is Block
        and type(block.attn) in (Attention, CPUAttention, PackedAttention)
        and block.attn.gate is None
    )


def block_joined(block: Block, tokens: Tensor, sizes: Sizes) -> Tensor:
    """Run a pre-norm timm Block on images of several sizes at once, since everything but attention acts on single tokens.

    Equals running it on each size separately, except for the random numbers of drop-path; fewer and larger products are faster.

    Args:
        block: See `divisible`.
        tokens: (T, D) tokens of the images of the first size, then those of the second, and so on.
        sizes: (B, N) of each size; T is the sum of B x N.

    Returns:
        (T, D).
    """
    return block_after_qkv(block, tokens, block.attn.qkv(block.norm1(tokens)), sizes)


def block_after_qkv(block: Block, tokens: Tensor, qkv: Tensor, sizes: Sizes) -> Tensor:
    """Return a block's output (T, D) for tokens (T, D), given their queries, keys and values (T, 3 * heads * d)."""
    attention = block.attn
    attended = attention.norm(_attend_by_size(attention, qkv, sizes))  # (T, heads * d)
    attended = block.ls1(attention.proj_drop(attention.proj(attended)))
    tokens = _add(tokens, _by_image(block.drop_path1, attended, sizes))
    return _add(tokens, _by_image(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), sizes))


def _add(tokens: Tensor, branch: Tensor) -> Tensor:
    """Return tokens + branch; on a CPU in place, which saves a copy where autocast made the dtypes differ."""
    return branch.to(tokens.dtype).add_(tokens) if tokens.device.type == "cpu" else tokens + branch


def _attend_by_size(attention: Attention, qkv: Tensor, sizes: Sizes) -> Tensor:
    """Return attention within each image (T, heads * d), from queries, keys and values (T, 3 * heads * d)."""
    if uses_unfused_attention(attention):
        attended: Tensor = UnfusedAttention.apply(qkv, sizes, attention.num_heads, attention.scale)
        return attended
    if can_pack(attention, qkv, sizes):
        return packed_attention(qkv, [n for size in sizes for n in size], attention.num_heads, attention.scale)
    parts = []
    for part, (B, N) in zip(qkv.split([B * N for B, N in sizes]), sizes, strict=True):
        query, key, value = part.view(B, N, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind()
        query, key = attention.q_norm(query), attention.k_norm(key)
        parts.append(attend(attention, query, key, value).flatten(0, 1))
    return torch.cat(parts)


def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention (B, n, heads * d) of queries (B, heads, n, d) to keys and values (B, heads, N, d)."""
    if attention.fused_attn:
        dropped = attention.attn_drop.p if attention.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropped)  # (B, heads, n, d)
    else:
        attended = attention.attn_drop((query * attention.scale @ key.transpose(2, 3)).softmax(dim=-1)) @ value
    return attended.transpose(1, 2).flatten(2)


def _by_image(drop: nn.Module, tokens: Tensor, sizes: Sizes) -> Tensor:
    """Apply drop-path to whole images of (T, D), not to tokens."""
    if isinstance(drop, nn.Identity) or not drop.training:
        return tokens
    parts = tokens.split([B * N for B, N in sizes])
    return torch.cat([drop(part.view(B, N, -1)).flatten(0, 1) for part, (B, N) in zip(parts, sizes, strict=True)])


def block_part(block: Block, tokens: Tensor, some: slice) -> Tensor:
    """Run a pre-norm timm Block for some of the tokens, which attend to all of them.

    Equals `block(tokens)[:, some]` without computing queries, projection and MLP of the other tokens.

    Args:
        block: See `divisible`.
        tokens: (B, N, D).
        some: Which of the N tokens.

    Returns:
        (B, n, D).
    """
    attention = block.attn
    query, key, value = queries_keys_values(attention, block.norm1(tokens), some)
    attended = attention.norm(attend(attention, query, key, value))  # (B, n, heads * d)
    part = tokens[:, some] + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(attended))))
    return part + block.drop_path2(block.ls2(block.mlp(block.norm2(part))))


def attention_weights(block: Block, tokens: Tensor, some: slice) -> Tensor:
    """Return the attention weights (B, heads, n, N) of `some` of the tokens (B, N, D) in a Block; rows sum to 1."""
    query, key, _ = queries_keys_values(block.attn, block.norm1(tokens), some)
    return (query * block.attn.scale @ key.transpose(2, 3)).softmax(dim=-1)


def queries_keys_values(attention: Attention, tokens: Tensor, some: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, heads, n, d) of `some` of the tokens (B, N, D), and keys and values (B, heads, N, d) of all."""
    weight, bias, inner = attention.qkv.weight, attention.qkv.bias, attention.attn_dim
    by_head = (attention.num_heads, attention.head_dim)
    query = F.linear(tokens[:, some], weight[:inner], None if bias is None else bias[:inner])
    query = query.unflatten(2, by_head).transpose(1, 2)
    both = F.linear(tokens, weight[inner:], None if bias is None else bias[inner:])  # (B, N, 2 * heads * d)
    key, value = both.unflatten(2, (2, *by_head)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(key), value
