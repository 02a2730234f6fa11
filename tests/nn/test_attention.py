import pytest
import torch
from timm.models.vision_transformer import Block

from sslvision.methods.mae import block_with_mask_tokens
from sslvision.nn.attention import attention_weights, block_joined, block_part, divisible

OPTIONS = [{}, {"qkv_bias": False}, {"init_values": 0.1}, {"qk_norm": True}, {"scale_attn_norm": True}]
PARTS = [slice(0, None), slice(4, None), slice(10, None), slice(0, 1)]


def random_block(**options):
    torch.manual_seed(0)
    block = Block(32, 4, **{"qkv_bias": True, **options}).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "plain"))
def test_a_part_of_a_block_equals_that_part_of_its_output(fused, options):
    block = random_block(**options)
    block.attn.fused_attn = fused
    tokens = torch.randn(3, 11, 32, dtype=torch.float64)
    assert divisible(block)
    for some in PARTS:
        assert torch.allclose(block_part(block, tokens, some), block(tokens)[:, some], atol=1e-12)


def test_stochastic_depth_drops_the_same_images_in_a_part():
    block = random_block(drop_path=0.5).train()
    tokens = torch.randn(16, 11, 32, dtype=torch.float64)
    torch.manual_seed(1)
    whole = block(tokens)[:, :1]
    torch.manual_seed(1)
    part = block_part(block, tokens, slice(0, 1))
    assert torch.allclose(part, whole, atol=1e-12)
    assert (part == tokens[:, :1]).all(dim=(1, 2)).any()


def test_attention_weights_are_those_the_block_attends_with():
    block = random_block()
    tokens = torch.randn(2, 11, 32, dtype=torch.float64)
    weights = attention_weights(block, tokens, slice(0, 1))  # (B, heads, 1, N)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 1, dtype=torch.float64))
    # Values that name their token show what was attended to.
    block.attn.proj, block.attn.fused_attn = torch.nn.Identity(), False
    _, _, value = block.attn.qkv(block.norm1(tokens)).view(2, 11, 3, 4, 8).permute(2, 0, 3, 1, 4)
    attended = block.attn(block.norm1(tokens))[:, :1].view(2, 1, 4, 8).transpose(1, 2)
    assert torch.allclose(weights @ value, attended, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "plain"))
def test_a_block_of_images_of_several_sizes_equals_that_of_each_size_and_so_do_its_gradients(fused, options):
    block = random_block(**options)
    block.attn.fused_attn = fused
    sizes = ((3, 11), (5, 4), (1, 7))
    tokens = [torch.randn(B, N, 32, dtype=torch.float64, requires_grad=True) for B, N in sizes]
    apart = torch.cat([block(part).flatten(0, 1) for part in tokens])
    joined = block_joined(block, torch.cat([part.flatten(0, 1) for part in tokens]), sizes)
    assert torch.allclose(joined, apart, atol=1e-12)
    above, everything = torch.randn_like(apart), [*tokens, *block.parameters()]
    gradients = zip(*(torch.autograd.grad(out, everything, above) for out in (joined, apart)), strict=True)
    assert all(torch.allclose(one, other, atol=1e-11) for one, other in gradients)


def test_stochastic_depth_drops_whole_images_of_every_size():
    block = random_block(drop_path=0.5).train()
    sizes = ((40, 11), (60, 4))
    tokens = torch.randn(40 * 11 + 60 * 4, 32, dtype=torch.float64)
    joined = block_joined(block, tokens, sizes)
    for part, before, (B, N) in zip(joined.split([440, 240]), tokens.split([440, 240]), sizes, strict=True):
        untouched = (part == before).all(dim=1).view(B, N)  # both branches dropped, which a quarter of the images are
        assert (untouched.all(dim=1) == untouched.any(dim=1)).all()
        assert 0.05 < untouched.all(dim=1).double().mean() < 0.5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "plain"))
def test_a_block_of_tokens_that_images_share_equals_that_of_each_images_own_and_so_do_its_gradients(fused, options):
    block = random_block(**options)
    block.attn.fused_attn = fused
    own, shared = (torch.randn(*shape, 32, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (1, 9)))
    indices = torch.stack([torch.randperm(9)[:5] for _ in range(3)])
    whole = block(torch.cat([own, shared[0][indices]], dim=1))
    once = block_with_mask_tokens(block, own, shared, indices)
    assert torch.allclose(once, whole, atol=1e-12)
    above, everything = torch.randn_like(whole), [own, shared, *block.parameters()]
    gradients = zip(*(torch.autograd.grad(out, everything, above) for out in (once, whole)), strict=True)
    assert all(torch.allclose(one, other, atol=1e-11) for one, other in gradients)
