"""Triton kernels of nn/packed_attention.py. One program computes one head of one image and loads all of its keys at once."""

import triton
import triton.language as tl


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]
    qkv,
    out,
    log_sums,
    first,
    SCALE: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute out = softmax(SCALE x q @ k.T) @ v for one head of one image and BLOCK_Q of its queries.

    With SUMS the logarithm of each softmax denominator is stored for the backward pass.

    SCALE is a compile-time constant: torch.compile would pass it in fp64, and all logits would become fp64.
    """
    image, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = first + image.to(tl.int64) * N
    channel, key = tl.arange(0, D), tl.arange(0, BLOCK_K)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    of_query = qkv + (row + query[:, None]) * (3 * H * D) + head * D + channel[None, :]
    of_key = qkv + (row + key[:, None]) * (3 * H * D) + (H + head) * D + channel[None, :]
    q = tl.load(of_query, mask=query[:, None] < N, other=0.0)  # (BLOCK_Q, D)
    k = tl.load(of_key, mask=key[:, None] < N, other=0.0)  # (BLOCK_K, D)
    v = tl.load(of_key + H * D, mask=key[:, None] < N, other=0.0)
    s = tl.dot(q, tl.trans(k)) * (SCALE * 1.4426950408889634)  # (BLOCK_Q, BLOCK_K), for powers of 2
    s = tl.where(key[None, :] < N, s, float("-inf"))
    highest = tl.max(s, 1)
    p = tl.exp2(s - highest[:, None])
    total = tl.sum(p, 1)
    attended = tl.dot(p.to(v.dtype), v) / total[:, None]  # (BLOCK_Q, D)
    place = out + (row + query[:, None]) * (H * D) + head * D + channel[None, :]
    tl.store(place, attended.to(out.dtype.element_ty), mask=query[:, None] < N)
    if SUMS:
        tl.store(log_sums + (row + query) * H + head, highest + tl.log2(total), mask=query < N)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    qkv,
    out,
    log_sums,
    of_out,
    grad_qkv,
    first,
    SCALE: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the gradients of queries, keys and values for one head of one image. Logits are (keys, queries) here."""
    image, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = first + image.to(tl.int64) * N
    channel, key = tl.arange(0, D), tl.arange(0, BLOCK_K)
    of_key = (row + key[:, None]) * (3 * H * D) + (H + head) * D + channel[None, :]
    k = tl.load(qkv + of_key, mask=key[:, None] < N, other=0.0)  # (BLOCK_K, D)
    v = tl.load(qkv + of_key + H * D, mask=key[:, None] < N, other=0.0)
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)
    for start in range(0, N, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        of_query = (row + query[:, None]) * (3 * H * D) + head * D + channel[None, :]
        of_output = (row + query[:, None]) * (H * D) + head * D + channel[None, :]
        q = tl.load(qkv + of_query, mask=query[:, None] < N, other=0.0)  # (BLOCK_Q, D)
        do = tl.load(of_out + of_output, mask=query[:, None] < N, other=0.0)
        s = tl.dot(k, tl.trans(q)) * (SCALE * 1.4426950408889634)  # (BLOCK_K, BLOCK_Q)
        if SUMS:  # avoids a sum over keys, which are spread over several warps
            log_sum = tl.load(log_sums + (row + query) * H + head, mask=query < N, other=0.0)
            p = tl.where(key[:, None] < N, tl.exp2(s - log_sum[None, :]), 0.0)
        else:
            s = tl.where(key[:, None] < N, s, float("-inf"))
            p = tl.exp2(s - tl.max(s, 0)[None, :])
            p = p / tl.sum(p, 0)[None, :]
        dv += tl.dot(p.to(do.dtype), do)
        dp = tl.dot(v, tl.trans(do))  # (BLOCK_K, BLOCK_Q)
        if SUMS:
            o = tl.load(out + of_output, mask=query[:, None] < N, other=0.0)
            expected = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)  # = sum over keys of p * dp
        else:
            expected = tl.sum(p * dp, 0)
        ds = (p * (dp - expected[None, :]) * SCALE).to(q.dtype)
        dk += tl.dot(ds, q)
        dq = tl.dot(tl.trans(ds), k)  # (BLOCK_Q, D)
        tl.store(grad_qkv + of_query, dq.to(grad_qkv.dtype.element_ty), mask=query[:, None] < N)
    tl.store(grad_qkv + of_key, dk.to(grad_qkv.dtype.element_ty), mask=key[:, None] < N)
    tl.store(grad_qkv + of_key + H * D, dv.to(grad_qkv.dtype.element_ty), mask=key[:, None] < N)
