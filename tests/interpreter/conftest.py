"""The kernels themselves, run on a CPU by Triton's interpreter: a process of its own, TRITON_INTERPRET=1.

Started by tests/test_kernels_interpreter.py, or by hand:  TRITON_INTERPRET=1 python -m pytest tests/interpreter
Every tensor that torch leaves uninitialised is filled with NaN here, so a kernel that does not write all of its output,
or reads what it should mask, is found.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def give_interpreter_bfloat16():
    """Triton's interpreter keeps bfloat16 as its bits: it multiplies the bits in `tl.dot` and truncates in casts.

    Here operands of a product are widened first, and casts round to nearest even, as the hardware does. Arithmetic
    outside of products is fp32 in all kernels of this project, so nothing else is needed.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(handle.data.copy()).view(torch.bfloat16)
        return TensorHandle(bits.float().numpy(), tl.float32)

    def dot(self, a, b, d, *args):
        return create_dot(self, widen(a), widen(b), d, *args)

    def cast(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float64):
            rounded = torch.from_numpy(source.data.copy()).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast_impl(self, widen(source), target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast


if INTERPRETED:
    give_interpreter_bfloat16()
