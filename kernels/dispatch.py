"""Which implementation runs: the one place that decides.

    triton              CUDA tensors: the kernels of this folder
    triton-interpreter  CPU tensors with TRITON_INTERPRET=1: the same kernels, run by Triton's interpreter (tests)
    reference           everything else: plain PyTorch, every shape and dtype; on a CPU this is the production path

`force(name)` (the environment variable KERNELS) overrides it; a choice that cannot run is an error, never a fallback.
Where Triton is not installed this package still imports, and the references work.
"""

import collections
import functools
import os
import sys
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no Triton for this platform: the kernels below are never called, their sources need these names

    def jit(fn):
        return fn

    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

NAMES = ("triton", "triton-interpreter", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself reads it once, when it is imported
_forced = None
LAUNCHES = collections.Counter()  # kernel name -> how often it was launched in this process


def force(name):
    """Use implementation `name` (one of NAMES) from now on; None returns to the automatic choice."""
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"kernels: {name!r} is not one of {', '.join(NAMES)}")
    if name in ("triton", "triton-interpreter") and triton is None:
        raise ValueError(f"kernels: {name!r} needs Triton, which is not installed here")
    if name is not None and name.startswith("triton") and (name == "triton-interpreter") != INTERPRETED:
        raise ValueError(f"kernels: {name!r} does not go with TRITON_INTERPRET={'1' if INTERPRETED else '0'}")
    _forced = name


def backend(device=None):
    """Name of the implementation that runs for tensors on `device` (default: the GPU where there is one)."""
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    return _settled(kind, _forced)


@functools.cache
def _settled(kind, forced):
    """backend() for a kind of device, said in one line; every operation asks, so it is settled once."""
    name, why = forced or _choose(kind), ""
    if (name == "triton" and kind != "cuda") or (name == "triton-interpreter" and kind != "cpu"):
        raise ValueError(f"kernels: {name!r} cannot run on {kind} tensors")
    if name == "reference" and kind == "cuda" and not forced:
        why = " (below sm_80 the Triton kernels do not run: use float32)"
    print(f"kernels: {name} on {kind}{why}", file=sys.stderr)
    return name


def _choose(kind):
    if kind == "cuda" and not INTERPRETED:
        if triton is None:
            raise ValueError("kernels: CUDA tensors need Triton; install it, or set KERNELS=reference")
        if torch.cuda.get_device_capability() < (8, 0):
            return "reference"  # bfloat16 and the tiles of this folder begin with sm_80
        return "triton"
    return "triton-interpreter" if kind == "cpu" and INTERPRETED and triton is not None else "reference"


def check(condition, message):
    """ValueError(message) unless `condition`: how launchers refuse what they do not support, with the numbers."""
    if not condition:
        raise ValueError(message)


def accumulator(dtype):
    """The dtype that sums are kept in: fp64 for fp64 (gradcheck), fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def architecture(device):
    """Key of the fixed tile tables: "sm_80", "sm_89", "sm_90", or "interpreter" (small tiles, ragged everywhere).

    sm_86 and consumer Blackwell have sm_89's shared memory; data-centre Blackwell takes sm_90's tiles.
    """
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    return "sm_90" if major in (9, 10) else "sm_89"


def processors(device):
    """Streaming multiprocessors of the device: how many programs a grid-stride kernel is given."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel, programs, *args, **meta):
    """Every kernel of this folder starts here: a one-dimensional grid (only grid.x reaches beyond 65,535)."""
    LAUNCHES[kernel.__name__] += 1
    kernel[(programs,)](*args, **meta)


def check_dtype(*tensors):
    """All tensors share one dtype that the kernels take: fp32, fp16, bf16; fp64 in the interpreter, for gradcheck."""
    dtypes = {t.dtype for t in tensors}
    allowed = {torch.float32, torch.float16, torch.bfloat16} | ({torch.float64} if INTERPRETED else set())
    check(len(dtypes) == 1, f"one dtype expected, got {sorted(map(str, dtypes))}")
    check(dtypes <= allowed, f"{dtypes.pop()} has no Triton kernel here (the reference takes it: KERNELS=reference)")


def triton_dtype(dtype):
    """The tl dtype of an accumulator."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def descriptor(x_2d, block_shape):
    """Hopper's tensor descriptor over a row-major matrix: loads of `block_shape` by hardware, zeros outside."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x_2d, block_shape)


def cdiv(a, b):
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()
