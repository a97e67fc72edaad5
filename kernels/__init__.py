"""The model's hot operations: one file per op, each with a PyTorch reference and a Triton kernel.

`backend()` says which of the two runs, `force(name)` overrides it; see dispatch.py.
"""

from kernels.attention import attention, attention_plan
from kernels.decode_attention import decode_attention, decode_plan
from kernels.dispatch import NAMES, backend, force
from kernels.linear_logp import linear_logp
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.sample import sample
from kernels.swiglu import swiglu
