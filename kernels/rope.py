"""Rotary position embedding of queries and keys, rotate-half layout.

Replaces the split, negate, concatenate, multiply, add chain: one read and one write of q and k.
"""

import torch

from kernels.dispatch import accumulator, check


def rope(q_THD, k_TKD, cos_TR, sin_TR):
    """Rotate dimension pairs (i, i + D/2) of q_THD [T,H,D] and k_TKD [T,K,D] by each token's angles.

    cos_TR, sin_TR [T,D] fp32, both halves alike, as Hugging Face makes them; positions are the caller's, so a packed
    row simply restarts them -> (q, k) in their own dtypes; the arithmetic is fp32, rounded once. Raises ValueError.
    """
    tokens, dim = q_THD.shape[0], q_THD.shape[2]
    check(k_TKD.shape[::2] == (tokens, dim) and dim % 2 == 0, f"{q_THD.shape=} {k_TKD.shape=}")
    check(cos_TR.shape == sin_TR.shape == (tokens, dim), f"{cos_TR.shape=} {sin_TR.shape=} {q_THD.shape=}")
    return reference(q_THD, k_TKD, cos_TR, sin_TR)


# ---------------------------------------------------------------------------------------------- PyTorch reference


def reference(q_THD, k_TKD, cos_TR, sin_TR):
    return _rotate(q_THD, cos_TR, sin_TR), _rotate(k_TKD, cos_TR, sin_TR)


def _rotate(x_THD, cos_TR, sin_TR):
    x = x_THD.to(accumulator(x_THD.dtype))
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (x * cos_TR[:, None] + turned * sin_TR[:, None]).to(x_THD.dtype)
