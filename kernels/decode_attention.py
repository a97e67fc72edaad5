"""Attention of one new token per sequence over a paged cache: the sampler's decode step.

The cache is an arena of pages of 64 tokens; a row's `block_table` lists its pages in order. Bytes: every key and value
of the context is read once (2 * n * K * D values a row), so this is bound by memory bandwidth.
"""

import torch

from kernels.dispatch import accumulator, check

PAGE = 64
PAGES_AT_ONCE = 32  # copied by the CPU reference: 0.5 MB of keys a head of 64, so that they stay in its cache


def decode_attention(q_BHD, k_pages_PSKD, v_pages_PSKD, block_table_BN, lengths_B):
    """softmax(q k' / sqrt(D)) v of each row's one query over the first lengths_B positions of its pages.

    q_BHD [B,H,D]; pages [P,64,K,D] with K dividing H; block_table_BN [B,N] int32 page numbers (entries past a row's
    length are not used, but must be valid page numbers); lengths_B [B] int32 -> o_BHD [B,H,D] in q's dtype. Length 0
    gives zeros. What lies in a page behind the length is never used. No gradients. Raises ValueError for shapes that
    do not agree.
    """
    rows, heads, dim = q_BHD.shape
    kv_heads = k_pages_PSKD.shape[2]
    check(
        k_pages_PSKD.shape == v_pages_PSKD.shape and k_pages_PSKD.shape[1:] == (PAGE, kv_heads, dim),
        f"{q_BHD.shape=} {k_pages_PSKD.shape=} {v_pages_PSKD.shape=} (pages hold {PAGE} tokens)",
    )
    check(heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups")
    check(block_table_BN.shape[:1] == lengths_B.shape == (rows,), f"{block_table_BN.shape=} {lengths_B.shape=} {rows=}")
    return reference(q_BHD, k_pages_PSKD, v_pages_PSKD, block_table_BN, lengths_B)


# ---------------------------------------------------------------------------------------------- PyTorch reference


@torch.no_grad()
def reference(q_BHD, k_pages_PSKD, v_pages_PSKD, block_table_BN, lengths_B):
    """Rows with equally many pages together: no dead page is read, and a row's result cannot depend on its batch."""
    pages_B = (lengths_B + PAGE - 1) // PAGE
    o_BHD = torch.zeros_like(q_BHD)
    for pages in filter(None, pages_B.unique().tolist()):
        rows_R = (pages_B == pages).nonzero().squeeze(1)
        for rows in rows_R.split(max(1, PAGES_AT_ONCE // pages)):
            table = block_table_BN[rows, :pages].flatten()
            k, v = (arena.index_select(0, table).unflatten(0, (-1, pages)) for arena in (k_pages_PSKD, v_pages_PSKD))
            o_BHD[rows] = _attend(q_BHD[rows], k, v, lengths_B[rows])
    return o_BHD


def _attend(q_RHD, k_RNSKD, v_RNSKD, lengths_R):
    """One softmax over a row's N pages; k and v are the caller's own copies and are changed."""
    (rows, pages, _, kv_heads, dim), acc = k_RNSKD.shape, accumulator(q_RHD.dtype)
    dead_RS = torch.arange((pages - 1) * PAGE, pages * PAGE, device=q_RHD.device) >= lengths_R[:, None]
    v_RNSKD[:, -1][dead_RS] = 0  # behind the length p is 0, but 0 * NaN of a stale page is NaN
    q_RKGD = q_RHD.to(acc).view(rows, kv_heads, -1, dim) * dim**-0.5
    k_RKnD, v_RKnD = (t.flatten(1, 2).to(acc).transpose(1, 2).contiguous() for t in (k_RNSKD, v_RNSKD))
    score_RKGn = q_RKGD @ k_RKnD.transpose(2, 3)
    score_RKGn[..., -PAGE:].masked_fill_(dead_RS[:, None, None], -torch.inf)
    return (score_RKGn.softmax(3) @ v_RKnD).reshape(q_RHD.shape).to(q_RHD.dtype)
