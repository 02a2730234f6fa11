"""Attention from some tokens only."""

from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F


def block_tail(block: Block, tokens: Tensor, first: int) -> Tensor:
    """Run a pre-norm timm Block for the tokens from `first` on, which attend to all.

    Equals `block(tokens)[:, first:]` without the queries, projection and MLP of the others.

    Args:
        block: with plain multi-head attention.
        tokens: (B, N, D).
        first: how many leading tokens are keys and values only.

    Returns:
        (B, N - first, D).
    """
    attention = block.attn
    B, N, D = tokens.shape
    heads, head_width = attention.num_heads, attention.head_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    normed = block.norm1(tokens)
    query = F.linear(normed[:, first:], weight[:D], bias[:D]).view(B, N - first, heads, head_width).transpose(1, 2)
    key, value = F.linear(normed, weight[D:], bias[D:]).view(B, N, 2, heads, head_width).permute(2, 0, 3, 1, 4)
    if attention.fused_attn:
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, N - first, D / heads)
    else:
        attended = (query * attention.scale @ key.transpose(2, 3)).softmax(dim=-1) @ value
    tail = tokens[:, first:] + attention.proj(attended.transpose(1, 2).reshape(B, N - first, D))
    return tail + block.mlp(block.norm2(tail))
