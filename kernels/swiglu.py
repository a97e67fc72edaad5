"""The gate of the MLP: silu(gate) * up.

Replaces two elementwise passes: 6 T I bytes in bf16 forward instead of 10, 10 T I backward; backward recomputes from
gate and up, nothing else is kept. A few FLOPs an element: bound by memory bandwidth.
"""

import torch
import torch.nn.functional as F

from kernels import dispatch
from kernels.dispatch import check, jit, tl

BLOCK = 1024  # elements a program: 8 a thread, one 128-bit access of bf16


def swiglu(gate_TI, up_TI):
    """silu(gate) * up, elementwise, any equal shapes. Raises ValueError for shapes that differ."""
    check(gate_TI.shape == up_TI.shape, f"{gate_TI.shape=} {up_TI.shape=}")
    if dispatch.backend(gate_TI.device) == "reference":
        return reference(gate_TI, up_TI)
    return _op(gate_TI, up_TI)


# ---------------------------------------------------------------------------------------------- PyTorch reference


def reference(gate_TI, up_TI):
    return F.silu(gate_TI) * up_TI


# -------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _swiglu_forward_kernel(GATE, UP, OUT, N, BLOCK: tl.constexpr, ACC: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + at, mask=at < N, other=0).to(ACC)
    up = tl.load(UP + at, mask=at < N, other=0).to(ACC)
    tl.store(OUT + at, (gate / (1 + tl.exp(-gate)) * up).to(OUT.dtype.element_ty), mask=at < N)


@jit
def _swiglu_backward_kernel(GATE, UP, G_OUT, G_GATE, G_UP, N, BLOCK: tl.constexpr, ACC: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + at, mask=at < N, other=0).to(ACC)
    up = tl.load(UP + at, mask=at < N, other=0).to(ACC)
    g_out = tl.load(G_OUT + at, mask=at < N, other=0).to(ACC)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    g_gate = g_out * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(G_GATE + at, g_gate.to(G_GATE.dtype.element_ty), mask=at < N)
    tl.store(G_UP + at, (g_out * silu).to(G_UP.dtype.element_ty), mask=at < N)


# -------------------------------------------------------------------------------------------- launchers and operator


@torch.library.custom_op("kernels::swiglu", mutates_args=())
def _op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return launch_forward(gate.contiguous(), up.contiguous())


@torch.library.custom_op("kernels::swiglu_backward", mutates_args=())
def _backward_op(g_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_backward(g_out.contiguous(), gate.contiguous(), up.contiguous())


def launch_forward(gate, up):
    dispatch.check_dtype(gate, up)
    out = torch.empty_like(gate)
    dispatch.launch(
        _swiglu_forward_kernel, dispatch.cdiv(gate.numel(), BLOCK), gate, up, out, gate.numel(), **_meta(gate)
    )
    return out


def launch_backward(g_out, gate, up):
    g_gate, g_up = torch.empty_like(gate), torch.empty_like(up)
    programs = dispatch.cdiv(gate.numel(), BLOCK)
    dispatch.launch(_swiglu_backward_kernel, programs, gate, up, g_out, g_gate, g_up, gate.numel(), **_meta(gate))
    return g_gate, g_up


def _meta(x):
    return {"BLOCK": BLOCK, "ACC": dispatch.triton_dtype(dispatch.accumulator(x.dtype)), "num_warps": 4}


@_op.register_fake
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_backward_op.register_fake
def _(g_out, gate, up):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))


_op.register_autograd(
    lambda ctx, g_out: _backward_op(g_out, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
