"""RMSNorm, with the residual add in the same pass.

Replaces `x = x + residual; norm(x)` of every block: 4 T H bytes in bf16 (8 with the residual read and the sum
written) instead of 10 (16). Backward 6 T H (8). Bound by memory bandwidth.
Cast order of Hugging Face: normalise in fp32, round to the input's dtype, then multiply by the weight.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.dispatch import accumulator, check, jit, tl

MAX_WIDTH = 8192  # one row is held in registers


def rms_norm(x_TH, weight_H, eps, residual_TH=None):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; with a residual, of s = x + residual.

    x_TH [...,H], weight_H [H], residual_TH like x_TH -> out_TH, or (out_TH, s_TH) when a residual is given.
    Differentiable in all three. Raises ValueError for shapes that do not agree.
    """
    check(weight_H.shape == x_TH.shape[-1:], f"{x_TH.shape=} {weight_H.shape=}")
    check(residual_TH is None or residual_TH.shape == x_TH.shape, f"{x_TH.shape=} residual of another shape")
    if dispatch.backend(x_TH.device) == "reference":
        return reference(x_TH, weight_H, eps, residual_TH)
    return _RMSNorm.apply(x_TH, weight_H, eps, residual_TH)


# ---------------------------------------------------------------------------------------------- PyTorch reference
def reference(x_TH, weight_H, eps, residual_TH=None):
    s_TH = x_TH if residual_TH is None else x_TH + residual_TH
    wide_TH = s_TH.to(accumulator(s_TH.dtype))
    normed_TH = wide_TH * torch.rsqrt(wide_TH.square().mean(-1, keepdim=True) + eps)
    out_TH = weight_H * normed_TH.to(s_TH.dtype)
    return out_TH if residual_TH is None else (out_TH, s_TH)


# -------------------------------------------------------------------------------------------------- Triton kernels
@jit
def _rms_norm_forward_kernel(
    X, RESIDUAL, WEIGHT, OUT, SUM, RSTD, T, H, EPS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program; WIDTH is H rounded up to a power of two."""
    dtype = OUT.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    live = (row < T)[:, None] & (col < H)[None, :]
    at = row.to(tl.int64)[:, None] * H + col[None, :]
    s = tl.load(X + at, mask=live, other=0).to(ACC)
    if ADD:
        rounded = (s + tl.load(RESIDUAL + at, mask=live, other=0).to(ACC)).to(dtype)
        tl.store(SUM + at, rounded, mask=live)
        s = rounded.to(ACC)  # the norm sees what the next block's residual sees
    rstd = 1 / tl.sqrt(tl.sum(s * s, 1) / H + EPS)
    normed = (s * rstd[:, None]).to(dtype).to(ACC)
    weight = tl.load(WEIGHT + col, mask=col < H, other=0).to(ACC)
    tl.store(OUT + at, (normed * weight[None, :]).to(dtype), mask=live)
    tl.store(RSTD + row, rstd, mask=row < T)


@jit
def _rms_norm_backward_kernel(
    G_OUT, G_SUM, S, WEIGHT, RSTD, G_S, G_WEIGHT, T, H, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Program p takes row blocks p, p + P, ...; its share of dW goes to row p of G_WEIGHT [P,H]: no atomics."""
    dtype = G_S.dtype.element_ty
    col = tl.arange(0, WIDTH)
    weight = tl.load(WEIGHT + col, mask=col < H, other=0).to(ACC)
    g_weight = tl.zeros([WIDTH], dtype=ACC)
    for block in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        live = (row < T)[:, None] & (col < H)[None, :]
        at = row.to(tl.int64)[:, None] * H + col[None, :]
        s = tl.load(S + at, mask=live, other=0).to(ACC)
        g_out = tl.load(G_OUT + at, mask=live, other=0).to(ACC)
        rstd = tl.load(RSTD + row, mask=row < T, other=0)[:, None]
        normed = s * rstd
        g_weight += tl.sum(g_out * normed.to(dtype).to(ACC), 0)
        g_normed = g_out * weight[None, :]
        g_s = rstd * (g_normed - normed * (tl.sum(g_normed * normed, 1) / H)[:, None])
        if ADD:
            g_s += tl.load(G_SUM + at, mask=live, other=0).to(ACC)
        tl.store(G_S + at, g_s.to(dtype), mask=live)
    tl.store(G_WEIGHT + tl.program_id(0).to(tl.int64) * H + col, g_weight, mask=col < H)


# --------------------------------------------------------------------------------------- launchers and their gradient
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        x, weight = x.contiguous(), weight.contiguous()
        out, s, rstd = launch_forward(x, weight, eps, None if residual is None else residual.contiguous())
        ctx.save_for_backward(s, weight, rstd)
        return out if residual is None else (out, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out, g_sum=None):
        g_sum = None if g_sum is None else g_sum.contiguous()
        g_s, g_weight = launch_backward(g_out.contiguous(), g_sum, *ctx.saved_tensors)
        return g_s, g_weight, None, g_s if ctx.needs_input_grad[3] else None


def _tile(x):
    """About 4096 elements a program: a whole hidden row, or 32 heads of 128 for QK-norm."""
    width = dispatch.next_power_of_2(x.shape[-1])
    meta = {"ROWS": max(1, 4096 // width), "WIDTH": width, "num_warps": 8 if width > 4096 else 4}
    return meta | {"ACC": dispatch.triton_dtype(accumulator(x.dtype))}


def launch_forward(x, weight, eps, residual):
    dispatch.check_dtype(x, weight, *([] if residual is None else [residual]))
    width = x.shape[-1]
    check(width <= MAX_WIDTH, f"rms_norm: width {width} exceeds {MAX_WIDTH} (KERNELS=reference takes any)")
    rows, tile = x.numel() // width, _tile(x)
    out, s = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=accumulator(x.dtype))
    dispatch.launch(
        _rms_norm_forward_kernel, dispatch.cdiv(rows, tile["ROWS"]), x, residual, weight, out, s, rstd, rows, width,
        EPS=eps, ADD=residual is not None, **tile,
    )  # fmt: skip
    return out, s, rstd


def launch_backward(g_out, g_sum, s, weight, rstd):
    rows, width, tile = len(rstd), s.shape[-1], _tile(s)
    programs = max(1, min(dispatch.cdiv(rows, tile["ROWS"]), 2 * dispatch.processors(s.device)))
    g_s, g_weight = torch.empty_like(s), torch.empty(programs, width, dtype=rstd.dtype, device=s.device)
    dispatch.launch(
        _rms_norm_backward_kernel, programs, g_out, g_sum, s, weight, rstd, g_s, g_weight, rows, width,
        ADD=g_sum is not None, **tile,
    )  # fmt: skip
    return g_s, g_weight.sum(0).to(weight.dtype)
