"""Part `micro`: the pieces that decide how fast a step is, each alone."""

import contextlib

import torch
from timm.models.vision_transformer import Block
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.on_gpu.findings import DRY, attempt, device, milliseconds, set_up
from sslvision.augment.color import (
    Photometry,
    apply_photometry,
    draw_photometry,
    recolor,
    solarize,
)
from sslvision.augment.randomness import ImageRandom
from sslvision.methods.mae import block_with_mask_tokens
from sslvision.nn.compilation import compiled
from sslvision.nn.packed_attention import packed_attention
from sslvision.nn.patches import gather_tokens

WIDTH, HEADS = (32, 2) if DRY else (512, 16)  # of MAE's decoder

# B images, H heads, N tokens, d width of a head


def micro(batch="256"):
    """Time the pieces at MAE's batch size; DINO's is a quarter of it."""
    set_up()
    B = 2 if DRY else int(batch)
    for name, shape in {
        f"MAE's decoder, {B} x 16 x 197 x 32": (B, 16, 197, 32),
        f"MAE B's encoder, {B} x 12 x 50 x 64": (B, 12, 50, 64),
        f"DINO S, global crops, {B} x 6 x 197 x 64": (B, 6, 197, 64),
        f"DINO S, local crops, {4 * B} x 6 x 37 x 64": (4 * B, 6, 37, 64),
    }.items():
        attempt(f"attention of {name}", attention, shape)
    attempt("products", products, B)
    attempt("decoder's first block, shared or like the others", first_block, B)
    attempt("photometry of 2 x 224 and 8 x 96, eager and compiled", photometry, max(1, B // 4))
    attempt("decoder block on tokens in fp32 or bf16", residual, B)


def forward_backward(function, inputs):
    """Return milliseconds of a forward pass, and of a forward and a backward one."""
    gradient = torch.randn_like(function())

    def both():
        function().backward(gradient)
        for one in inputs:
            one.grad = None

    return {"forward_ms": round(milliseconds(function), 3), "both_ms": round(milliseconds(both), 3)}


def in_bf16(function, *inputs):
    with torch.autocast(device().type, torch.bfloat16, cache_enabled=False):
        return function(*inputs)


def attention(shape):
    """Return what our kernel takes, each of torch's, and the one torch chooses, from queries, keys and values as they come."""
    B, H, N, d = shape
    qkv = torch.randn(B, N, 3, H, d, device=device(), dtype=torch.bfloat16, requires_grad=True)

    def run():
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def run_packed():
        return packed_attention(qkv.view(B * N, 3 * H * d), [B, N], H, d**-0.5)

    rows, flops = {}, 4 * B * H * N * N * d
    for name in ("ours", "as chosen", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        if name == "ours" and DRY:  # it runs on CUDA alone
            continue
        kernel = sdpa_kernel([getattr(SDPBackend, name)]) if name.isupper() else contextlib.nullcontext()
        try:
            with kernel:
                row = forward_backward(run_packed if name == "ours" else run, [qkv])
            row["tflops"] = round(
                3.5 * flops / row["both_ms"] / 1e9, 1
            )  # backward: five products for the forward's two
        except Exception as error:
            row = f"{type(error).__name__}: {error}"[:150]
        rows[name] = row
    return {
        "short": {name: row["both_ms"] if isinstance(row, dict) else row[:40] for name, row in rows.items()},
        **rows,
    }


def products(B):
    """Return TFLOP/s of the products of a linear layer: forward, gradient of the input, gradient of the weight."""
    rows = {}
    for name, (M, K, N) in {
        "decoder qkv": (B * 197, 512, 1536),
        "decoder proj": (B * 197, 512, 512),
        "decoder fc1": (B * 197, 512, 2048),
        "decoder fc2": (B * 197, 2048, 512),
        "encoder qkv": (B * 50, 768, 2304),
        "encoder fc1": (B * 50, 768, 3072),
        "encoder fc2": (B * 50, 3072, 768),
        "DINO S fc1": (B * 137, 384, 1536),
        "prototypes": (10 * B // 4, 256, 64 if DRY else 65_536),
    }.items():
        if DRY:
            M, K, N = (min(size, 64) for size in (M, K, N))
        x, w, g = (torch.randn(*s, device=device(), dtype=torch.bfloat16) for s in ((M, K), (N, K), (M, N)))
        runs = (lambda x=x, w=w: x @ w.T), (lambda g=g, w=w: g @ w), (lambda g=g, x=x: g.T @ x)
        rows[name] = [round(2 * M * K * N / milliseconds(run) / 1e9) for run in runs]
    return rows


def first_block(B):
    """Return what MAE's first decoder block takes: hidden tokens computed once for all images, or as in the other blocks."""
    block = Block(WIDTH, HEADS, qkv_bias=True).to(device()).train()
    own = torch.randn(B, 50, WIDTH, device=device(), requires_grad=True)
    shared = torch.randn(1, 196, WIDTH, device=device(), requires_grad=True)
    hidden = torch.rand(B, 196, device=device()).argsort(dim=1)[:, 49:].contiguous()

    def like_others(block, own, shared, hidden):
        return block(torch.cat([own, gather_tokens(shared, hidden)], dim=1))

    rows = {}
    for name, function in {"shared": block_with_mask_tokens, "like the others": like_others}.items():
        for how, made in {"eager": function, "compiled": compiled(function)}.items():
            run = lambda made=made: in_bf16(made, block, own, shared, hidden)  # noqa: E731
            rows[f"{name}, {how}"] = forward_backward(run, [own, shared, *block.parameters()])
            torch._dynamo.reset()
    return rows


def photometry(B):
    """Return what DINO's photometry of all crops takes, and how far the compiled one is from the eager one."""
    kinds = [Photometry(), Photometry(blur_probability=0.1, solarize_probability=0.2)]
    kinds += [Photometry(blur_probability=0.5)] * 8
    rng = ImageRandom(0, torch.zeros(B, dtype=torch.int64, device=device()), torch.arange(B, device=device()))
    sizes = {2: 32, 8: 16} if DRY else {2: 224, 8: 96}
    large, small = (
        torch.randint(256, (views * B, 3, side, side), dtype=torch.uint8, device=device())
        for views, side in sizes.items()
    )

    def run(**functions):
        drawn = draw_photometry(rng, range(10), kinds)
        parts = (large, drawn.part(0, 2 * B)), (small, drawn.part(2 * B, 10 * B))
        return [apply_photometry(images, part, **functions) for images, part in parts]

    functions = {"recolor_fn": compiled(recolor), "finish_fn": compiled(solarize)}
    eager, made = run(), run(**functions)
    return {
        "eager_ms": round(milliseconds(run), 3),
        "compiled_ms": round(milliseconds(lambda: run(**functions)), 3),
        "draw_ms": round(milliseconds(lambda: draw_photometry(rng, range(10), kinds)), 3),
        "differ by": max(float((a - b).abs().max()) for a, b in zip(eager, made, strict=True)),
    }


def residual(B):
    """Return what a compiled decoder block takes on tokens in fp32 and in bf16."""
    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        block = Block(WIDTH, HEADS, qkv_bias=True).to(device()).train()
        tokens = torch.randn(B, 197, WIDTH, device=device(), dtype=dtype, requires_grad=True)
        made = compiled(lambda tokens, block=block: block(tokens))
        run = lambda made=made, tokens=tokens: in_bf16(made, tokens)  # noqa: E731
        rows[str(dtype).removeprefix("torch.")] = forward_backward(run, [tokens, *block.parameters()])
        torch._dynamo.reset()
    return rows
