"""Attention of one new token per sequence over a paged cache: the sampler's decode step.

The cache is an arena of pages of 64 tokens; a row's `block_table` lists its pages in order. Bytes: every key and value
of the context is read once (2 * n * K * D values a row), so this is bound by memory bandwidth.
"""

import torch

from kernels.dispatch import accumulator, check

PAGE = 64


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
    """Page after page with a running softmax: pages behind a row's end change nothing, so neither does its batch."""
    rows, heads, dim = q_BHD.shape
    kv_heads, acc = k_pages_PSKD.shape[2], accumulator(q_BHD.dtype)
    q_BKGD = q_BHD.to(acc).view(rows, kv_heads, heads // kv_heads, dim) * dim**-0.5
    top_BKG1 = q_BKGD.new_full((*q_BKGD.shape[:3], 1), -torch.inf)
    mass_BKG1, o_BKGD = torch.zeros_like(top_BKG1), torch.zeros_like(q_BKGD)
    for page in range(-(-int(lengths_B.max()) // PAGE)):
        live_BS = page * PAGE + torch.arange(PAGE, device=q_BHD.device) < lengths_B[:, None]
        k_BKSD = k_pages_PSKD[block_table_BN[:, page]].to(acc).transpose(1, 2)
        v_BSKD = v_pages_PSKD[block_table_BN[:, page]].to(acc)
        v_BKSD = v_BSKD.masked_fill_(~live_BS[:, :, None, None], 0).transpose(1, 2)  # 0 * NaN of a stale page is NaN
        score_BKGS = (q_BKGD @ k_BKSD.transpose(2, 3)).masked_fill_(~live_BS[:, None, None], -torch.inf)
        new_top = torch.maximum(top_BKG1, score_BKGS.amax(3, keepdim=True))
        pivot = new_top.masked_fill(new_top == -torch.inf, 0)  # a row of length 0 has no largest score
        p_BKGS, shrink = (score_BKGS - pivot).exp_(), (top_BKG1 - pivot).exp_()
        mass_BKG1 = mass_BKG1 * shrink + p_BKGS.sum(3, keepdim=True)
        o_BKGD = o_BKGD * shrink + p_BKGS @ v_BKSD
        top_BKG1 = new_top
    return (o_BKGD / mass_BKG1.clamp_min(1e-30)).reshape(rows, heads, dim).to(q_BHD.dtype)
