"""Blocks run for images of several sizes at once, tokens that images share, or some tokens only; what a token attends to."""

from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from sslvision.nn.cpu import FewerCopies, PlainAttention, Sizes, plain
from sslvision.nn.packed_attention import PackedAttention, packed_attention, packs
from sslvision.nn.patches import gather_tokens

# B images, N tokens, n of them asked for, D width, d width of a head


def divisible(block: Any) -> bool:
    """Return whether `block_part` can run the block: a pre-norm timm Block with plain multi-head attention."""
    return (
        type(block) is Block
        and type(block.attn) in (Attention, FewerCopies, PackedAttention)
        and block.attn.gate is None
    )


def block_joined(block: Block, tokens: Tensor, sizes: Sizes) -> Tensor:
    """Run a pre-norm timm Block on images of several sizes at once, as all but attention is the same for every token.

    Equals running it on those of each size, but for the draws of drop-path; fewer and larger products are faster.

    Args:
        block: see `divisible`.
        tokens: (T, D), those of the images of the first size, then those of the second, and so on.
        sizes: of the images; T = sum of B x N.

    Returns:
        (T, D).
    """
    return _rest_of_block(block, tokens, block.attn.qkv(block.norm1(tokens)), sizes)


def block_of_shared(block: Block, own: Tensor, shared: Tensor, indices: Tensor) -> Tensor:
    """Run a pre-norm timm Block on tokens of each image, and then on such as images have in common.

    What a token of those asks and answers is computed once, not for every image that has it.

    Args:
        block: see `divisible`.
        own: (B, n, D).
        shared: (1, L, D).
        indices: (B, H), those of the L that each image has.

    Returns:
        (B, n + H, D).
    """
    B, n = own.shape[:2]
    qkv = block.attn.qkv(block.norm1(torch.cat([own.flatten(0, 1), shared[0]])))  # (B * n + L, 3 * heads * d)
    of_own, of_shared = qkv.split([B * n, shared.shape[1]])
    of_own = of_own.unflatten(0, (B, n))  # (B, n, 3 * heads * d)
    qkv = torch.cat([of_own, gather_tokens(of_shared[None], indices)], dim=1)  # (B, n + H, 3 * heads * d)
    tokens = torch.cat([own, gather_tokens(shared, indices)], dim=1)  # (B, n + H, D)
    after = _rest_of_block(block, tokens.flatten(0, 1), qkv.flatten(0, 1), ((B, tokens.shape[1]),))
    return after.view(tokens.shape)


def _rest_of_block(block: Block, tokens: Tensor, qkv: Tensor, sizes: Sizes) -> Tensor:
    """Return (T, D) of tokens (T, D) and their queries, keys and values (T, 3 * heads * d)."""
    attention = block.attn
    attended = attention.norm(_attend_by_size(attention, qkv, sizes))  # (T, heads * d)
    attended = block.ls1(attention.proj_drop(attention.proj(attended)))
    tokens = _add(tokens, _by_image(block.drop_path1, attended, sizes))
    return _add(tokens, _by_image(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), sizes))


def _add(tokens: Tensor, branch: Tensor) -> Tensor:
    """Return tokens + branch; on a CPU in the branch's place, once that has the type of the tokens, as torch would copy it."""
    return branch.to(tokens.dtype).add_(tokens) if tokens.device.type == "cpu" else tokens + branch


def _attend_by_size(attention: Attention, qkv: Tensor, sizes: Sizes) -> Tensor:
    """Return what the tokens of each image get of one another (T, heads * d), from queries, keys and values."""
    if plain(attention):
        attended: Tensor = PlainAttention.apply(qkv, sizes, attention.num_heads, attention.scale)
        return attended
    if packs(attention, qkv, sizes):
        return packed_attention(qkv, [n for size in sizes for n in size], attention.num_heads, attention.scale)
    parts = []
    for part, (B, N) in zip(qkv.split([B * N for B, N in sizes]), sizes, strict=True):
        query, key, value = part.view(B, N, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind()
        query, key = attention.q_norm(query), attention.k_norm(key)
        parts.append(attend(attention, query, key, value).flatten(0, 1))
    return torch.cat(parts)


def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return (B, n, heads * d) of queries (B, heads, n, d), and keys and values (B, heads, N, d)."""
    if attention.fused_attn:
        dropped = attention.attn_drop.p if attention.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropped)  # (B, heads, n, d)
    else:
        attended = attention.attn_drop((query * attention.scale @ key.transpose(2, 3)).softmax(dim=-1)) @ value
    return attended.transpose(1, 2).flatten(2)


def _by_image(drop: nn.Module, tokens: Tensor, sizes: Sizes) -> Tensor:
    """Drop whole images, not tokens."""
    if isinstance(drop, nn.Identity) or not drop.training:
        return tokens
    parts = tokens.split([B * N for B, N in sizes])
    return torch.cat([drop(part.view(B, N, -1)).flatten(0, 1) for part, (B, N) in zip(parts, sizes, strict=True)])


def block_part(block: Block, tokens: Tensor, some: slice) -> Tensor:
    """Run a pre-norm timm Block for `some` of the tokens, which attend to all.

    Equals `block(tokens)[:, some]` without the queries, projection and MLP of the others.

    Args:
        block: see `divisible`.
        tokens: (B, N, D).
        some: of the N.

    Returns:
        (B, n, D).
    """
    attention = block.attn
    query, key, value = queries_keys_values(attention, block.norm1(tokens), some)
    attended = attention.norm(attend(attention, query, key, value))  # (B, n, heads * d)
    part = tokens[:, some] + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(attended))))
    return part + block.drop_path2(block.ls2(block.mlp(block.norm2(part))))


def attention_weights(block: Block, tokens: Tensor, some: slice) -> Tensor:
    """Return how `some` of the tokens (B, N, D) attend to all, in each head of a Block: (B, heads, n, N), rows sum to 1."""
    query, key, _ = queries_keys_values(block.attn, block.norm1(tokens), some)
    return (query * block.attn.scale @ key.transpose(2, 3)).softmax(dim=-1)


def queries_keys_values(attention: Attention, tokens: Tensor, some: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, heads, n, d) of `some` tokens, and keys and values (B, heads, N, d) of all (B, N, D)."""
    weight, bias, inner = attention.qkv.weight, attention.qkv.bias, attention.attn_dim
    by_head = (attention.num_heads, attention.head_dim)
    query = F.linear(tokens[:, some], weight[:inner], None if bias is None else bias[:inner])
    query = query.unflatten(2, by_head).transpose(1, 2)
    both = F.linear(tokens, weight[inner:], None if bias is None else bias[inner:])  # (B, N, 2 * heads * d)
    key, value = both.unflatten(2, (2, *by_head)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(key), value
