import pytest
import torch
from timm.models.vision_transformer import Block

from sslvision.nn.attention import block_tail


@pytest.mark.parametrize("fused", [True, False])
def test_the_tail_of_a_block_equals_the_tail_of_its_output(fused):
    torch.manual_seed(0)
    block = Block(32, 4, qkv_bias=True).double()
    block.attn.fused_attn = fused
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(3, 11, 32, dtype=torch.float64)
    for first in (0, 4, 10):
        assert torch.allclose(block_tail(block, tokens, first), block(tokens)[:, first:], atol=1e-12)
