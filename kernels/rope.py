"""Rotary position embedding, rotate-half layout, from the joint projection to queries, keys and values.

Replaces the split, the norms of queries and keys where a model has them (Qwen3), the rotation's chain of elementwise
operations and, while sampling, the two writes to the cache: one read of the projection, 4 T (H+2K) D bytes in bf16 with
the write (plus the angles, 8 T D). Bound by memory bandwidth. Backward is the rotation by the opposite angle, and
through the norms, whose input is read again.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.dispatch import accumulator, check, jit, tl
from kernels.rms_norm import reference as normed


def rope(qkv_TO, heads, cos_TD, sin_TD, norms=None, cache=None):
    """Split qkv_TO [T,(H+2K)D] into H = `heads` queries, K keys and K values; turn queries and keys by their angles.

    Pairs are the dimensions (i, i + D/2) of a head; cos_TD, sin_TD [T,D] fp32, both halves alike, as Hugging Face makes
    them; positions are the caller's, so a packed row simply restarts them. norms: (q_weight_D, k_weight_D, eps) of an
    RMSNorm over each head before the rotation -> (q_THD, k_TKD, v_TKD); the arithmetic is fp32, rounded after the norm
    and at the end. cache: (slot_T int64, k_SKD, v_SKD), keys and values go to rows slot_T of these -> q_THD alone, and
    no gradients. Raises ValueError.
    """
    tokens, dim = cos_TD.shape
    kv_heads, rest = divmod(qkv_TO.shape[1] // dim - heads, 2)
    whole = qkv_TO.shape == (tokens, (heads + 2 * kv_heads) * dim) and kv_heads > 0 and not rest and dim % 2 == 0
    check(whole and cos_TD.shape == sin_TD.shape, f"{qkv_TO.shape=} {heads=} {cos_TD.shape=} {sin_TD.shape=}")
    if dispatch.backend(qkv_TO.device) == "reference":
        return reference(qkv_TO, heads, cos_TD, sin_TD, norms, cache)
    if cache is not None:
        return launch(qkv_TO.contiguous(), cos_TD, sin_TD, heads, norms, cache)[0]
    weights, eps = (norms[:2], norms[2]) if norms else ((None, None), 0.0)
    return _Rope.apply(qkv_TO, cos_TD, sin_TD, heads, *weights, eps)


# ---------------------------------------------------------------------------------------------- PyTorch reference
def reference(qkv_TO, heads, cos_TD, sin_TD, norms=None, cache=None):
    tokens, dim = cos_TD.shape
    qkv_TAD = qkv_TO.view(tokens, -1, dim)
    kv_heads = (qkv_TAD.shape[1] - heads) // 2
    x_THD, v_TKD = qkv_TAD.split((heads + kv_heads, kv_heads), dim=1)
    if norms:
        q_weight_D, k_weight_D, eps = norms
        q_THD, k_TKD = x_THD.split((heads, kv_heads), dim=1)
        x_THD = torch.cat((normed(q_THD, q_weight_D, eps), normed(k_TKD, k_weight_D, eps)), dim=1)
    x_THD, half = x_THD.to(accumulator(x_THD.dtype)), dim // 2
    signed_TD = torch.cat((-sin_TD[:, :half], sin_TD[:, half:]), dim=1)
    # (left, right) becomes (left cos - right sin, right cos + left sin)
    turned_THD = torch.addcmul(x_THD * cos_TD[:, None], x_THD.roll(half, 2), signed_TD[:, None])
    q_THD, k_TKD = turned_THD.to(qkv_TO.dtype).split((heads, kv_heads), dim=1)
    if cache is None:
        return q_THD, k_TKD, v_TKD
    slot_T, k_SKD, v_SKD = cache
    k_SKD.index_copy_(0, slot_T, k_TKD)
    v_SKD.index_copy_(0, slot_T, v_TKD)
    return q_THD


# -------------------------------------------------------------------------------------------------- Triton kernels
#
# One program: a tile of BT tokens, HEADS heads of the joint projection, which are H of q, then KV_HEADS of k and of v.


@jit
def _halves(X, row, heads, head, live, D: tl.constexpr, ACC: tl.constexpr):
    at = (row.to(tl.int64)[:, None] * heads + head) * D + tl.arange(0, D // 2)[None, :]
    left = tl.load(X + at, mask=live, other=0).to(ACC)
    return left, tl.load(X + at + D // 2, mask=live, other=0).to(ACC)


@jit
def _store_halves(X, left, right, row, heads, head, live, D: tl.constexpr):
    at = (row.to(tl.int64)[:, None] * heads + head) * D + tl.arange(0, D // 2)[None, :]
    tl.store(X + at, left.to(X.dtype.element_ty), mask=live)
    tl.store(X + at + D // 2, right.to(X.dtype.element_ty), mask=live)


@jit
def _rstd(left, right, EPS: tl.constexpr, D: tl.constexpr):
    return (1 / tl.sqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / D + EPS))[:, None]


@jit
def _turn(
    QKV, OUT, WEIGHT, token, row, heads, head, out_heads, out_head, cos, sin, live, EPS: tl.constexpr,
    NORM: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One head of q or k: its norm, rounded as RMSNorm rounds, then the rotation."""
    left, right = _halves(QKV, token, heads, head, live, D, ACC)
    if NORM:
        dtype = OUT.dtype.element_ty
        rstd, half = _rstd(left, right, EPS, D), tl.arange(0, D // 2)
        left = (left * rstd).to(dtype).to(ACC) * tl.load(WEIGHT + half).to(ACC)[None, :]
        right = (right * rstd).to(dtype).to(ACC) * tl.load(WEIGHT + half + D // 2).to(ACC)[None, :]
        left, right = left.to(dtype).to(ACC), right.to(dtype).to(ACC)
    _store_halves(OUT, left * cos - right * sin, right * cos + left * sin, row, out_heads, out_head, live, D)


@jit
def _rope_kernel(
    QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, SLOT, Q, K, V, T, H, KV_HEADS, EPS: tl.constexpr, NORM: tl.constexpr,
    CACHE: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles, heads = tl.cdiv(T, BT), H + 2 * KV_HEADS
    token = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    live = (token < T)[:, None]
    row = token.to(tl.int64)
    if CACHE:
        row = tl.load(SLOT + token, mask=token < T, other=0)
    cos, _ = _halves(COS, token, 1, 0, live, D, ACC)
    sin, _ = _halves(SIN, token, 1, 0, live, D, ACC)
    for i in tl.static_range(HEADS):
        head = (tl.program_id(0) // tiles) * HEADS + i
        if head < H:
            _turn(QKV, Q, Q_WEIGHT, token, token, heads, head, H, head, cos, sin, live, EPS, NORM, D, ACC)
        elif head < H + KV_HEADS:
            _turn(QKV, K, K_WEIGHT, token, row, heads, head, KV_HEADS, head - H, cos, sin, live, EPS, NORM, D, ACC)
        elif head < heads:
            left, right = _halves(QKV, token, heads, head, live, D, ACC)
            _store_halves(V, left, right, row, KV_HEADS, head - H - KV_HEADS, live, D)


@jit
def _turn_back(
    G_OUT, QKV, WEIGHT, G_QKV, token, heads, head, out_heads, out_head, cos, sin, live, EPS: tl.constexpr,
    NORM: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward of `_turn` -> this head's share of the gradient of the norm's weight, in two halves."""
    g_left, g_right = _halves(G_OUT, token, out_heads, out_head, live, D, ACC)
    g_left, g_right = g_left * cos + g_right * sin, g_right * cos - g_left * sin
    share_left = tl.zeros([D // 2], dtype=ACC)
    share_right = tl.zeros([D // 2], dtype=ACC)
    if NORM:
        dtype = G_QKV.dtype.element_ty
        left, right = _halves(QKV, token, heads, head, live, D, ACC)
        rstd, half = _rstd(left, right, EPS, D), tl.arange(0, D // 2)
        left, right = left * rstd, right * rstd
        share_left = tl.sum(g_left * left.to(dtype).to(ACC), 0)
        share_right = tl.sum(g_right * right.to(dtype).to(ACC), 0)
        g_left = g_left * tl.load(WEIGHT + half).to(ACC)[None, :]
        g_right = g_right * tl.load(WEIGHT + half + D // 2).to(ACC)[None, :]
        mean = ((tl.sum(g_left * left, 1) + tl.sum(g_right * right, 1)) / D)[:, None]
        g_left, g_right = rstd * (g_left - left * mean), rstd * (g_right - right * mean)
    _store_halves(G_QKV, g_left, g_right, token, heads, head, live, D)
    return share_left, share_right


@jit
def _rope_backward_kernel(
    G_Q, G_K, G_V, QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, G_QKV, G_WEIGHTS, T, H, KV_HEADS, EPS: tl.constexpr,
    NORM: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """G_WEIGHTS [programs,2,D]: a row a program, no atomics, so that gradients are bitwise repeatable."""
    tiles, heads = tl.cdiv(T, BT), H + 2 * KV_HEADS
    token = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    live = (token < T)[:, None]
    cos, _ = _halves(COS, token, 1, 0, live, D, ACC)
    sin, _ = _halves(SIN, token, 1, 0, live, D, ACC)
    q_left = tl.zeros([D // 2], dtype=ACC)
    q_right = tl.zeros([D // 2], dtype=ACC)
    k_left = tl.zeros([D // 2], dtype=ACC)
    k_right = tl.zeros([D // 2], dtype=ACC)
    for i in tl.static_range(HEADS):
        head = (tl.program_id(0) // tiles) * HEADS + i
        if head < H:
            left, right = _turn_back(
                G_Q, QKV, Q_WEIGHT, G_QKV, token, heads, head, H, head, cos, sin, live, EPS, NORM, D, ACC
            )
            q_left += left
            q_right += right
        elif head < H + KV_HEADS:
            left, right = _turn_back(
                G_K, QKV, K_WEIGHT, G_QKV, token, heads, head, KV_HEADS, head - H, cos, sin, live, EPS, NORM, D, ACC
            )
            k_left += left
            k_right += right
        elif head < heads:
            g_left, g_right = _halves(G_V, token, KV_HEADS, head - H - KV_HEADS, live, D, ACC)
            _store_halves(G_QKV, g_left, g_right, token, heads, head, live, D)
    if NORM:
        row = tl.zeros([1], dtype=tl.int32) + tl.program_id(0)
        _store_halves(G_WEIGHTS, q_left[None, :], q_right[None, :], row, 2, 0, row[:, None] >= 0, D)
        _store_halves(G_WEIGHTS, k_left[None, :], k_right[None, :], row, 2, 1, row[:, None] >= 0, D)


# --------------------------------------------------------------------------------------- launchers and their gradient
class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, q_weight, k_weight, eps):
        norms, qkv = None if q_weight is None else (q_weight, k_weight, eps), qkv.contiguous()
        ctx.save_for_backward(qkv if norms else None, cos, sin, q_weight, k_weight)
        ctx.eps = eps
        return launch(qkv, cos, sin, heads, norms)

    @staticmethod
    @once_differentiable
    def backward(ctx, *g_qkv):
        qkv, cos, sin, *weights = ctx.saved_tensors
        norms = None if qkv is None else (*weights, ctx.eps)
        g_qkv, g_weights = launch_backward(*(g.contiguous() for g in g_qkv), qkv, cos, sin, norms)
        return g_qkv, None, None, None, *g_weights, None


def _tile(tokens, heads, dim, dtype):
    """Programs and meta: eight heads share their angles in a long row; a decode step has too few rows for that."""
    check(dim in (64, 128), f"head dim {dim}: the kernel takes 64 and 128 (KERNELS=reference takes any)")
    group = 8 if tokens >= 2048 else 1
    meta = {"D": dim, "BT": 16, "HEADS": group, "ACC": dispatch.triton_dtype(accumulator(dtype)), "num_warps": 4}
    return dispatch.cdiv(tokens, 16) * dispatch.cdiv(heads, group), meta


def _weights(norms, like):
    """Kernel arguments of the norms; without them, a tensor that is never read."""
    q_weight, k_weight, eps = norms or (like, like, 0.0)
    return (q_weight, k_weight), {"NORM": norms is not None, "EPS": eps}


def launch(qkv, cos, sin, heads, norms=None, cache=None):
    tokens, dim = cos.shape
    dispatch.check_dtype(qkv, *(norms or ())[:2], *(cache or ())[1:])
    kv_heads = (qkv.shape[1] // dim - heads) // 2
    programs, meta = _tile(tokens, heads + 2 * kv_heads, dim, qkv.dtype)
    slot, k, v = cache or (cos, *(qkv.new_empty(tokens, kv_heads, dim) for _ in range(2)))
    q, (weights, norm) = qkv.new_empty(tokens, heads, dim), _weights(norms, cos)
    dispatch.launch(
        _rope_kernel, programs, qkv, *weights, cos, sin, slot, q, k, v, tokens, heads, kv_heads,
        CACHE=cache is not None, **norm, **meta,
    )  # fmt: skip
    return q, k, v


def launch_backward(g_q, g_k, g_v, qkv, cos, sin, norms):
    (tokens, heads, dim), kv_heads = g_q.shape, g_k.shape[1]
    programs, meta = _tile(tokens, heads + 2 * kv_heads, dim, g_q.dtype)
    g_qkv, (weights, norm) = g_q.new_empty(tokens, (heads + 2 * kv_heads) * dim), _weights(norms, cos)
    shares = g_q.new_empty(programs if norms else 0, 2, dim, dtype=accumulator(g_q.dtype))
    dispatch.launch(
        _rope_backward_kernel, programs, g_q, g_k, g_v, g_q if qkv is None else qkv, *weights, cos, sin, g_qkv, shares,
        tokens, heads, kv_heads, **norm, **meta,
    )  # fmt: skip
    return g_qkv, shares.sum(0).to(g_q.dtype) if norms else (None, None)
