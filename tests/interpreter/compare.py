"""Acceptance: a kernel may err 1.5 times (gradients: twice) as much as torch in the same dtype, plus a floor.

Errors are measured against the reference in fp64, on the inputs already rounded to the dtype under test. The floor is
what fp32 sums round, however lucky torch is on this machine:

    FLOOR of the tensor's largest value; or ULP times the largest exponent of it, where that is more, for backward takes
        p = 2^(score - lse) from a log-sum that was rounded to fp32, and so does every flash attention
    and 4 ULP of the largest value among all outputs (all gradients): where terms cancel, as the gradients of q and k
        do for a single key, the roundings of the terms are left
"""

import torch

from kernels import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ULP = 2**-23
FLOOR = {torch.float32: 3e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}  # of the largest value


def run(function, inputs, upstream):
    """Outputs and input gradients of `function`, as a flat list; every output gets its upstream gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return [o.detach() for o in outputs], [x.grad for x in inputs]


def compare(kernel, torch_same_dtype, reference, inputs, kernels, exponent=0.0, slacks=(1.5, 2.0)):
    """Values and gradients of `kernel` against `reference` in fp64; `kernels` are the names that must have run."""
    before = dispatch.LAUNCHES.copy()
    exact = [x.double() for x in inputs]
    outputs = reference(*exact)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(o).to(inputs[0].dtype).double() for o in outputs]
    ours, theirs = run(kernel, inputs, upstream), run(torch_same_dtype, inputs, upstream)
    truth = run(reference, exact, upstream)
    for kind, slack in enumerate(slacks):
        largest = max(t.abs().max() for t in truth[kind])
        for i, (a, b, t) in enumerate(zip(ours[kind], theirs[kind], truth[kind], strict=True)):
            what = f"{'gradient' if kind else 'output'} {i} {tuple(t.shape)}"
            assert a.shape == t.shape and a.isfinite().all(), what
            floor = max(FLOOR[inputs[0].dtype], ULP * exponent) * t.abs().max() + 4 * ULP * largest
            error, allowed = (a - t).abs().max(), slack * (b - t).abs().max() + floor
            assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
    for name in kernels:
        assert dispatch.LAUNCHES[name] > before[name], f"{name} was not launched"
