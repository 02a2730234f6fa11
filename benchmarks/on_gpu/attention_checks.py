"""Checks of torch's attention at Swin's shapes, on the kernel that torch chooses by itself.

On Hopper it may choose cuDNN's, whose backward pass gave NaN for lengths that leave 64 when divided by 128 if every logit of a
row lies below -88.7 (pytorch#196678), and which read a bias in another type than the queries' as if it were in theirs
(pytorch#191612). A grid of CUDA has at most 65,535 rows.
"""

import torch
from torch.nn import functional as F

from benchmarks.on_gpu.findings import DRY, device

SHAPES = (  # batch, heads, tokens and shape of the bias: timm's, then ours, which has heads first
    *((512, 3, 49, (1, 3, 49, 49)), (512, 3, 49, (512, 3, 49, 49))),
    *((3, 2048, 64, (3, 1, 64, 64)), (3, 512, 49, (3, 512, 49, 49)), (3, 512, 36, (3, 1, 36, 36))),
)
LOW = 120.0  # by which all logits are lowered, beyond the 88.7 where fp32's exponential overflows


def inputs(B, H, S, bias_shape, *, trained=True, bias_trained=True, dtype=torch.bfloat16, bias_dtype=torch.bfloat16):
    """Return random queries, keys and values (B, H, S, 32) and a bias; a dry run has a few of them."""
    if DRY:
        B, H, bias_shape = min(B, 3), min(H, 3), tuple(n if n == S else min(n, 3) for n in bias_shape)
    q, k, v = (torch.randn(B, H, S, 32, device=device(), dtype=dtype, requires_grad=trained) for _ in range(3))
    bias = torch.randn(*bias_shape, device=device(), dtype=bias_dtype, requires_grad=bias_trained)
    return q, k, v, bias


def exact(q, k, v, bias):
    """Return attention computed in double precision."""
    q, k, v, bias = (one.double() for one in (q, k, v, bias))
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


def masked():
    """Return the kernel of each shape, with and without gradients, and how far its output is from the exact one."""
    torch.manual_seed(0)
    rows = {}
    for B, H, S, bias_shape in SHAPES:
        for trained in (True, False):
            name = f"{B}x{H}x{S} bias {bias_shape}{', trained' if trained else ''}"
            try:
                q, k, v, bias = inputs(B, H, S, bias_shape, trained=trained, bias_trained=trained)
                out = F.scaled_dot_product_attention(q, k, v, bias)
                if trained:
                    out.sum().backward()
                right = exact(*(one.detach() for one in (q, k, v, bias)))
                off = float((out - right).norm() / right.norm())
                rows[name] = f"{type(out.grad_fn).__name__ if trained else 'no gradient'}, off {off:.1e}"
            except Exception as error:
                rows[name] = f"{type(error).__name__}: {error}"[:160]
    return rows


def frozen_bias():
    """Return, for a bias that is not trained, whether gradients are finite and how far they are from the exact ones."""
    torch.manual_seed(0)
    rows, bad = {}, []
    for S in (49, 64):
        for layout, shape in {"timm's": (512, 3, S, (1, 3, S, S)), "ours": (3, 512, S, (3, 1, S, S))}.items():
            for low in (0.0, LOW):
                for bias_dtype in (torch.bfloat16, torch.float32):
                    name = (
                        f"{S} tokens, {layout}, {'low logits, ' if low else ''}{str(bias_dtype).removeprefix('torch.')}"
                    )
                    try:
                        rows[name] = row = frozen_row(*shape, low=low, bias_dtype=bias_dtype)
                        if not row["finite"] or not row["off"] < 0.05:
                            bad.append(name)
                    except Exception as error:
                        rows[name] = f"{type(error).__name__}: {error}"[:160]
    return {"short": {"bad": bad}, **rows}


def frozen_row(B, H, S, bias_shape, *, low, bias_dtype):
    q, k, v, bias = inputs(B, H, S, bias_shape, bias_trained=False, bias_dtype=bias_dtype)
    bias -= low
    out = F.scaled_dot_product_attention(q, k, v, bias)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), gradient)
    right = torch.autograd.grad(exact(q, k, v, bias), (q, k, v), gradient.double())
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))
    finite = all(bool(one.isfinite().all()) for one in found)
    return {"kernel": type(out.grad_fn).__name__, "finite": finite, "off": round(off, 4)}


def many_rows():
    """Return whether attention with more rows than a grid may have fails: (heads, rows, 16, 32) with a trained bias."""
    rows = {}
    for count in (65_535, 65_536) if not DRY else (3,):
        q, k, v = (
            torch.randn(3, count, 16, 32, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        bias = torch.randn(3, 1, 16, 16, device=device(), dtype=torch.bfloat16, requires_grad=True)
        try:
            F.scaled_dot_product_attention(q, k, v, bias).sum().backward()
            if not DRY:
                torch.cuda.synchronize()
            rows[str(count)] = "ok"
        except Exception as error:
            rows[str(count)] = f"{type(error).__name__}: {error}"[:200]
    return rows
