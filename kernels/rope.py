"""Rotary position embedding of queries and keys, rotate-half layout.

Replaces the split, negate, concatenate, multiply, add chain: one read and one write of q and k, 4 T (H+K) D bytes in
bf16 (plus the angles, 4 T D). Bound by memory bandwidth. Backward is the rotation by the opposite angle.
"""

import torch

from kernels import dispatch
from kernels.dispatch import accumulator, check, jit, tl


def rope(q_THD, k_TKD, cos_TR, sin_TR):
    """Rotate dimension pairs (i, i + D/2) of q_THD [T,H,D] and k_TKD [T,K,D] by each token's angles.

    cos_TR, sin_TR [T,D] fp32, both halves alike, as Hugging Face makes them; positions are the caller's, so a packed
    row simply restarts them -> (q, k) in their own dtypes; the arithmetic is fp32, rounded once. Raises ValueError.
    """
    tokens, dim = q_THD.shape[0], q_THD.shape[2]
    check(k_TKD.shape[::2] == (tokens, dim) and dim % 2 == 0, f"{q_THD.shape=} {k_TKD.shape=}")
    check(cos_TR.shape == sin_TR.shape == (tokens, dim), f"{cos_TR.shape=} {sin_TR.shape=} {q_THD.shape=}")
    if dispatch.backend(q_THD.device) == "reference":
        return reference(q_THD, k_TKD, cos_TR, sin_TR)
    return _op(q_THD, k_TKD, cos_TR, sin_TR, False)


# ---------------------------------------------------------------------------------------------- PyTorch reference


def reference(q_THD, k_TKD, cos_TR, sin_TR):
    heads = (q_THD.shape[1], k_TKD.shape[1])
    x = torch.cat((q_THD, k_TKD), dim=1).to(accumulator(q_THD.dtype))
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (x * cos_TR[:, None] + turned * sin_TR[:, None]).to(q_THD.dtype).split(heads, dim=1)


# -------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _rope_kernel(
    Q, K, COS, SIN, Q_OUT, K_OUT, T, H, KV_HEADS, D: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr,
    INVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of BT tokens, HEADS heads; q's heads come first, then k's."""
    tiles = tl.cdiv(T, BT)
    token = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    half = tl.arange(0, D // 2)
    live = (token < T)[:, None] & (half < D // 2)[None, :]
    angle = token.to(tl.int64)[:, None] * D + half[None, :]
    cos = tl.load(COS + angle, mask=live, other=0).to(ACC)
    sin = tl.load(SIN + angle, mask=live, other=0).to(ACC)
    if INVERSE:
        sin = -sin
    for i in tl.static_range(HEADS):
        head = (tl.program_id(0) // tiles) * HEADS + i
        if head < H:
            _rotate_head(Q, Q_OUT, token, head, H, cos, sin, half, live, D, ACC)
        elif head < H + KV_HEADS:
            _rotate_head(K, K_OUT, token, head - H, KV_HEADS, cos, sin, half, live, D, ACC)


@jit
def _rotate_head(X, OUT, token, head, heads, cos, sin, half, live, D: tl.constexpr, ACC: tl.constexpr):
    left_at = (token.to(tl.int64)[:, None] * heads + head) * D + half[None, :]
    left = tl.load(X + left_at, mask=live, other=0).to(ACC)
    right = tl.load(X + left_at + D // 2, mask=live, other=0).to(ACC)
    dtype = OUT.dtype.element_ty
    tl.store(OUT + left_at, (left * cos - right * sin).to(dtype), mask=live)
    tl.store(OUT + left_at + D // 2, (right * cos + left * sin).to(dtype), mask=live)


# -------------------------------------------------------------------------------------------- launchers and operator


@torch.library.custom_op("kernels::rope", mutates_args=())
def _op(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch(*(x.contiguous() for x in (q, k, cos, sin)), inverse)


def launch(q, k, cos, sin, inverse=False):
    dispatch.check_dtype(q, k)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    check(dim in (64, 128), f"head dim {dim}: the kernel takes 64 and 128 (KERNELS=reference takes any)")
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    block, group = 16, 8
    programs = dispatch.cdiv(tokens, block) * dispatch.cdiv(heads + kv_heads, group)
    dispatch.launch(
        _rope_kernel, programs, q, k, cos, sin, q_out, k_out, tokens, heads, kv_heads, D=dim, BT=block, HEADS=group,
        INVERSE=inverse, ACC=dispatch.triton_dtype(accumulator(q.dtype)), num_warps=4,
    )  # fmt: skip
    return q_out, k_out


@_op.register_fake
def _(q, k, cos, sin, inverse):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


def _setup(ctx, inputs, output):
    *_, cos, sin, inverse = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _backward(ctx, g_q, g_k):
    return *_op(g_q, g_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


_op.register_autograd(_backward, setup_context=_setup)
