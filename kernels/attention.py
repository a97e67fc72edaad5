"""Causal attention over packed documents, grouped heads, forward and backward.

Replaces a [T,T] mask or a padded batch: documents lie one after the other in a row of T tokens, `cu_seqlens` says
where each begins, and the work is the sum of n^2 over the documents (4 n^2/2 H D FLOPs forward, 2.5x that backward).
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import check


def attention(q_THD, k_TKD, v_TKD, cu_seqlens, max_len):
    """softmax(q k' / sqrt(D)) v within each document, causal.

    q_THD [T,H,D]; k_TKD and v_TKD [T,K,D] with K dividing H; cu_seqlens [N+1] int32, from 0 to T, never falling (a
    document may be empty); max_len >= the longest document -> o_THD [T,H,D] in q's dtype. Raises ValueError for
    shapes that do not agree.
    """
    _check_shapes(q_THD, k_TKD, v_TKD, cu_seqlens)
    return reference(q_THD, k_TKD, v_TKD, cu_seqlens)


def _check_shapes(q_THD, k_TKD, v_TKD, cu_seqlens):
    tokens, heads, dim = q_THD.shape
    check(k_TKD.shape == v_TKD.shape == (tokens, k_TKD.shape[1], dim), f"{q_THD.shape=} {k_TKD.shape=} {v_TKD.shape=}")
    check(heads % k_TKD.shape[1] == 0, f"{heads} query heads do not divide into {k_TKD.shape[1]} groups")
    check(cu_seqlens.dim() == 1 and cu_seqlens.dtype == torch.int32, f"{cu_seqlens.shape=} {cu_seqlens.dtype=}")


# ---------------------------------------------------------------------------------------------- PyTorch reference


def reference(q_THD, k_TKD, v_TKD, cu_seqlens):
    """One document at a time: a document's result cannot depend on its neighbours, and nothing is padded."""
    lengths = cu_seqlens.diff().tolist()
    check(sum(lengths) == len(q_THD) and min(lengths) >= 0, f"cu_seqlens does not cover {len(q_THD)} tokens")
    documents = zip(q_THD.split(lengths), k_TKD.split(lengths), v_TKD.split(lengths), strict=True)
    return torch.cat([_one_document(q, k, v) for q, k, v in documents])


def _one_document(q_nHD, k_nKD, v_nKD):
    if len(q_nHD) == 0:
        return q_nHD
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_nHD, k_nKD, v_nKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)
