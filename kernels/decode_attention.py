"""Attention of one new token per sequence over a paged cache: the sampler's decode step.

The cache is an arena of pages of 64 tokens; a row's `block_table` lists its pages in order. Bytes: every key and value
of the context is read once (2 n K D values a row, 4 n H D FLOPs), so this is bound by memory bandwidth.

The query heads of a group share one read of their keys. The context is split into parts of a fixed size, not into a
fixed number of parts, and the parts are combined in their order: a row's result never depends on its batch. Nothing
is read back by the host, so the launch can be captured in a CUDA graph.
"""

import math
from bisect import bisect_right
from typing import NamedTuple

import torch

from kernels import dispatch
from kernels.dispatch import accumulator, check, jit, tl

PAGE = 64
PART = 16  # tokens: what the CPU reference reads of a page is a multiple of it
PARTS_AT_ONCE = 256  # copied by the CPU reference: 1 MB of keys a head of 64, so that they stay in its cache


def decode_attention(q_BHD, k_pages_PSKD, v_pages_PSKD, block_table_BN, lengths_B, plan=None):
    """softmax(q k' / sqrt(D)) v of each row's one query over the first lengths_B positions of its pages.

    q_BHD [B,H,D]; pages [P,64,K,D] with K dividing H; block_table_BN [B,N] int32 page numbers (entries past a row's
    length are not used, but must be valid page numbers); lengths_B [B] int32 -> o_BHD [B,H,D] in q's dtype. Length 0
    gives zeros. What lies in a page behind the length is never used. plan: decode_plan of the same table and lengths,
    where several layers share them. No gradients. Raises ValueError for shapes that do not agree.
    """
    rows, heads, dim = q_BHD.shape
    kv_heads = k_pages_PSKD.shape[2]
    check(
        k_pages_PSKD.shape == v_pages_PSKD.shape and k_pages_PSKD.shape[1:] == (PAGE, kv_heads, dim),
        f"{q_BHD.shape=} {k_pages_PSKD.shape=} {v_pages_PSKD.shape=} (pages hold {PAGE} tokens)",
    )
    check(heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups")
    check(block_table_BN.shape[:1] == lengths_B.shape == (rows,), f"{block_table_BN.shape=} {lengths_B.shape=} {rows=}")
    if dispatch.backend(q_BHD.device) == "reference":
        return reference(q_BHD, k_pages_PSKD, v_pages_PSKD, block_table_BN, lengths_B, plan)
    return launch(q_BHD.contiguous(), k_pages_PSKD, v_pages_PSKD, block_table_BN.contiguous(), lengths_B)


def decode_plan(block_table_BN, lengths_B):
    """What decode_attention works out from table and lengths alone: chunks of rows; None where the kernel runs."""
    return _plan(block_table_BN, lengths_B) if dispatch.backend(lengths_B.device) == "reference" else None


# ---------------------------------------------------------------------------------------------- PyTorch reference
class Chunk(NamedTuple):
    """R rows of N parts each, read together; S positions in a part."""

    row_R: torch.Tensor | None  # None: all rows, in order
    part_M: torch.Tensor  # of the arena, R x N, row by row
    dead_R1S: torch.Tensor  # of each row's last part: behind the length
    keep_RS11: torch.Tensor  # the same as bits, all of them set where the position is live


def _plan(block_table_BN, lengths_B):
    """Rows with equally many parts together: no dead part is read, and a row's result cannot depend on its batch."""
    parts_B, order_B = ((lengths_B + PART - 1) // PART).sort(stable=True)
    table_BN, lengths_B1 = block_table_BN.index_select(0, order_B), lengths_B.index_select(0, order_B)[:, None]
    within_S, within_page = (torch.arange(n, device=lengths_B.device) for n in (PART, PAGE // PART))
    dead_BS = within_S + (parts_B[:, None] - 1) * PART >= lengths_B1
    keep_BS11 = dead_BS.to(torch.int16)[:, :, None, None] - 1
    chunks = []
    for parts, begin, end in _chunks(parts_B.tolist()):
        pages_RN = table_BN[begin:end, : dispatch.cdiv(parts, len(within_page))]
        part_RN = (pages_RN[:, :, None] * len(within_page) + within_page).flatten(1)[:, :parts]
        row_R = order_B[begin:end] if end - begin < len(order_B) else None
        chunks.append(Chunk(row_R, part_RN.flatten(), dead_BS[begin:end, None], keep_BS11[begin:end]))
    return chunks


def _chunks(parts):
    """(parts, begin, end) of rows that are read together, from sorted ones: [0, 1, 1, 200] -> (1, 1, 3), (200, 3, 4)"""
    begin = 0
    while begin < len(parts):
        size = max(1, PARTS_AT_ONCE // max(1, parts[begin]))
        end = min(bisect_right(parts, parts[begin]), begin + size)
        if parts[begin]:
            yield parts[begin], begin, end
        begin = end


@torch.no_grad()
def reference(q_BHD, k_pages_PSKD, v_pages_PSKD, block_table_BN, lengths_B, plan=None):
    arenas = [pages.view(-1, PART, *pages.shape[2:]) for pages in (k_pages_PSKD, v_pages_PSKD)]
    scaled_BHD = q_BHD.to(accumulator(q_BHD.dtype)) * q_BHD.shape[2] ** -0.5
    plan = _plan(block_table_BN, lengths_B) if plan is None else plan
    if len(plan) == 1 and plan[0].row_R is None:
        return _attend(scaled_BHD, arenas, plan[0]).to(q_BHD.dtype)
    o_BHD = torch.zeros_like(q_BHD)
    for chunk in plan:
        o_RHD = _attend(scaled_BHD.index_select(0, chunk.row_R), arenas, chunk)
        o_BHD.index_copy_(0, chunk.row_R, o_RHD.to(o_BHD.dtype))
    return o_BHD


def _attend(q_RHD, arenas, chunk):
    """One softmax over a row's N parts, of n = N S positions; X counts rows and their groups of heads."""
    (rows, _, dim), kv_heads = q_RHD.shape, arenas[0].shape[2]
    k, v = (arena.index_select(0, chunk.part_M).view(rows, -1, PART, kv_heads, dim) for arena in arenas)
    # behind the length p is 0, but 0 * NaN of a stale page is NaN: all bits go (masked_fill_ takes three times as long)
    v.view(torch.int16)[:, -1].bitwise_and_(chunk.keep_RS11)
    k_XnD, v_XnD = (t.flatten(1, 2).to(q_RHD.dtype).transpose(1, 2).flatten(0, 1) for t in (k, v))
    score_XGn = torch.bmm(q_RHD.view(rows * kv_heads, -1, dim), k_XnD.transpose(1, 2))
    score_XGn.view(rows, -1, score_XGn.shape[2])[..., -PART:].masked_fill_(chunk.dead_R1S, -torch.inf)
    return torch.bmm(score_XGn.softmax(2), v_XnD).view(q_RHD.shape)


# -------------------------------------------------------------------------------------------------- Triton kernels
@jit
def _decode_kernel(
    Q, K_PAGES, V_PAGES, TABLE, LENGTHS, O_PART, LSE_PART, N, H, KV_HEADS, SPLITS, SCALE: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """PAGES pages of one row, for the query heads of one group (padded to HEADS, the least that a product takes)."""
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(0) // SPLITS % KV_HEADS
    b = tl.program_id(0) // SPLITS // KV_HEADS
    length = tl.load(LENGTHS + b)
    if split * PAGES * PAGE >= length:
        return
    group = H // KV_HEADS
    member = tl.arange(0, HEADS)
    head = b.to(tl.int64) * H + kv_head * group + member
    dim = tl.arange(0, D)
    q = tl.load(Q + head[:, None] * D + dim[None, :], mask=(member < group)[:, None], other=0)
    top = tl.full([HEADS], float("-inf"), dtype=ACC)
    mass = tl.zeros([HEADS], dtype=ACC)
    o = tl.zeros([HEADS, D], dtype=ACC)
    for page in range(split * PAGES, tl.minimum((split + 1) * PAGES, tl.cdiv(length, PAGE))):
        slot = tl.load(TABLE + b.to(tl.int64) * N + page).to(tl.int64) * PAGE + tl.arange(0, PAGE)
        live = page * PAGE + tl.arange(0, PAGE) < length
        at = (slot[:, None] * KV_HEADS + kv_head) * D + dim[None, :]
        k = tl.load(K_PAGES + at, mask=live[:, None], other=0)
        v = tl.load(V_PAGES + at, mask=live[:, None], other=0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * SCALE
        score = tl.where(live[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        top = new_top
    part = head * SPLITS + split
    tl.store(O_PART + part[:, None] * D + dim[None, :], o / mass[:, None], mask=(member < group)[:, None])
    tl.store(LSE_PART + part, top + tl.log2(mass), mask=member < group)


@jit
def _decode_combine_kernel(
    O_PART, LSE_PART, LENGTHS, OUT, H, SPLITS, TOKENS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One head of one row: its parts, PARTS at a time, weighted by their share of the softmax. Length 0: zeros."""
    head = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, D)
    top = tl.full([1], float("-inf"), dtype=ACC)
    mass = tl.zeros([1], dtype=ACC)
    o = tl.zeros([D], dtype=ACC)
    parts = tl.cdiv(tl.load(LENGTHS + head // H), TOKENS)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        lse = tl.load(LSE_PART + head * SPLITS + part, mask=part < parts, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        shrink, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        at = (head * SPLITS + part)[:, None] * D + dim[None, :]
        part_o = tl.load(O_PART + at, mask=(part < parts)[:, None], other=0)
        o = o * shrink + tl.sum(part_o * weight[:, None], 0)
        mass = mass * shrink + tl.sum(weight, 0)
        top = new_top
    tl.store(OUT + head * D + dim, (o / tl.where(mass == 0, 1, mass)).to(OUT.dtype.element_ty))


# ------------------------------------------------------------------------------------------------------- launcher
SPLIT = 4  # pages a program: fixed, so that the order of the sums depends on nothing but the row's own length


def launch(q, k_pages, v_pages, block_table, lengths):
    dispatch.check_dtype(q, k_pages, v_pages)
    (rows, heads, dim), kv_heads, acc = q.shape, k_pages.shape[2], accumulator(q.dtype)
    check(dim in (64, 128), f"decode_attention: head dim {dim}; the kernel takes 64 and 128")
    check(heads // kv_heads <= 16, f"decode_attention: {heads // kv_heads} query heads a group; the kernel takes 16")
    check(k_pages.is_contiguous() and v_pages.is_contiguous(), "decode_attention: the arena must be contiguous")
    splits = dispatch.cdiv(block_table.shape[1], SPLIT)
    o_part = torch.empty(rows, heads, splits, dim, dtype=acc, device=q.device)
    lse_part = torch.empty(rows, heads, splits, dtype=acc, device=q.device)
    meta = {"D": dim, "ACC": dispatch.triton_dtype(acc), "num_warps": 4}
    dispatch.launch(
        _decode_kernel, rows * kv_heads * splits, q, k_pages, v_pages, block_table, lengths, o_part, lse_part,
        block_table.shape[1], heads, kv_heads, splits, SCALE=dim**-0.5 * math.log2(math.e), PAGE=PAGE, PAGES=SPLIT,
        HEADS=16, num_stages=2, **meta,
    )  # fmt: skip
    o = torch.empty_like(q)
    dispatch.launch(
        _decode_combine_kernel, rows * heads, o_part, lse_part, lengths, o, heads, splits, TOKENS=SPLIT * PAGE,
        PARTS=16, **meta,
    )  # fmt: skip
    return o
