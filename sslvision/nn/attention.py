"""Attention of some tokens only, and what a token attends to."""

from typing import Any

from timm.models.vision_transformer import Attention, Block
from torch import Tensor
from torch.nn import functional as F

# B images, N tokens, n of them asked for, D width, d width of a head


def divisible(block: Any) -> bool:
    """Return whether `block_part` can run the block: a pre-norm timm Block with plain multi-head attention."""
    return type(block) is Block and type(block.attn) is Attention and block.attn.gate is None


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
    dropped = attention.attn_drop.p if attention.training else 0.0
    if attention.fused_attn:
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropped)  # (B, heads, n, d)
    else:
        attended = attention.attn_drop((query * attention.scale @ key.transpose(2, 3)).softmax(dim=-1)) @ value
    attended = attention.norm(attended.transpose(1, 2).flatten(2))  # (B, n, heads * d)
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
