"""Causal attention over packed documents, grouped heads, forward and backward.

Replaces a [T,T] mask or a padded batch: documents lie one after the other in a row of T tokens, `cu_seqlens` says
where each begins, and the work is the sum of n^2 over the documents: 2 n^2 H D FLOPs forward, 2.5 times that backward
(3.5 times executed: dk, dv and dq come from two kernels without atomics, so that gradients are bitwise repeatable).

Flash attention: tiles of the scores live in registers only; kept for backward are o and one log-sum a row. Every tile
begins where its document begins, so a document's result is the same bits alone and packed. On Hopper the forward
loads its tiles by tensor descriptors; there a tile reads on into the next document, and masks keep that out.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.dispatch import accumulator, check, jit, tl


def attention(q_THD, k_TKD, v_TKD, cu_seqlens, max_len, plan=None):
    """softmax(q k' / sqrt(D)) v within each document, causal.

    q_THD [T,H,D]; k_TKD and v_TKD [T,K,D] with K dividing H; cu_seqlens [N+1] int32, from 0 to T, never falling (a
    document may be empty); max_len >= the longest document -> o_THD [T,H,D] in q's dtype. plan: attention_plan of the
    same row, where several layers share it. Raises ValueError for shapes that do not agree.
    """
    _check_shapes(q_THD, k_TKD, v_TKD, cu_seqlens)
    if dispatch.backend(q_THD.device) == "reference":
        return reference(q_THD, k_TKD, v_TKD, cu_seqlens)
    tokens, _, dim = q_THD.shape
    plan = attention_plan(cu_seqlens, tokens, q_THD.dtype, dim) if plan is None else plan
    return _Attention.apply(q_THD, k_TKD, v_TKD, cu_seqlens, *plan)


def attention_plan(cu_seqlens, tokens, dtype, dim):
    """What attention works out from `cu_seqlens` of a row of `tokens` alone, for heads of `dim`: the tasks of its three
    kernels, documents and first positions of each in turn; None where the reference runs."""
    if dispatch.backend(cu_seqlens.device) == "reference":
        return None
    check(dim in (64, 128), f"attention: head dim {dim}; the kernels take 64 and 128 (KERNELS=reference takes any)")
    forward, dkdv, dq = (_tile(cu_seqlens.device, kernel, dtype, dim) for kernel in ("forward", "dkdv", "dq"))
    kinds = [(forward["BM"], True), (dkdv["BN"], False), (dq["BM"], True)]
    made = {kind: _tasks(cu_seqlens, tokens, *kind) for kind in set(kinds)}
    return [tensor for kind in kinds for tensor in made[kind]]


def _check_shapes(q_THD, k_TKD, v_TKD, cu_seqlens):
    tokens, heads, dim = q_THD.shape
    check(k_TKD.shape == v_TKD.shape == (tokens, k_TKD.shape[1], dim), f"{q_THD.shape=} {k_TKD.shape=} {v_TKD.shape=}")
    check(heads % k_TKD.shape[1] == 0, f"{heads} query heads do not divide into {k_TKD.shape[1]} groups")
    check(cu_seqlens.dim() == 1 and cu_seqlens.dtype == torch.int32, f"{cu_seqlens.shape=} {cu_seqlens.dtype=}")


# ---------------------------------------------------------------------------------------------- PyTorch reference
def reference(q_THD, k_TKD, v_TKD, cu_seqlens):
    """One document at a time: a document's result cannot depend on its neighbours, and nothing is padded."""
    ends, lengths = cu_seqlens.tolist(), cu_seqlens.diff().tolist()
    covers = ends[0] == 0 and ends[-1] == len(q_THD) and min(lengths) >= 0
    check(covers, f"cu_seqlens must rise from 0 to {len(q_THD)} tokens, it goes {ends[0]}..{ends[-1]}")
    documents = zip(q_THD.split(lengths), k_TKD.split(lengths), v_TKD.split(lengths), strict=True)
    return torch.cat([_one_document(q, k, v) for q, k, v in documents])


def _one_document(q_nHD, k_nKD, v_nKD):
    if len(q_nHD) == 0:
        return q_nHD
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_nHD, k_nKD, v_nKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)


# -------------------------------------------------------------------------------------------------- Triton kernels
#
# n is the document's length, `start` its first token in the row; positions count from the document's start. A task is
# (document, block of positions); the plan lists them. Scores are in units of log 2: exp2 is one instruction.


@jit
def _rows(X, start, first, n, head, heads, D: tl.constexpr, ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """[ROWS,D] of one head from position `first` on; behind the document: zeros, or by descriptor whatever follows."""
    if DESCRIPTORS:
        x = X.load([start + first, head * D])
    else:
        row = first + tl.arange(0, ROWS)
        at = (start + row).to(tl.int64)[:, None] * (heads * D) + head * D + tl.arange(0, D)[None, :]
        x = tl.load(X + at, mask=(row < n)[:, None], other=0)
    return x


@jit
def _store_rows(X, x, start, first, n, head, heads, D: tl.constexpr, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    at = (start + row).to(tl.int64)[:, None] * (heads * D) + head * D + tl.arange(0, D)[None, :]
    tl.store(X + at, x.to(X.dtype.element_ty), mask=(row < n)[:, None])


@jit
def _attention_forward_kernel(
    Q, K, V, OUT, LSE, CU, DOCUMENT, FIRST, T, H, KV_HEADS, SCALE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DESCRIPTORS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BM queries of one head against all their keys. LSE [H,T]."""
    task, head = tl.program_id(0) // H, tl.program_id(0) % H
    document, first = tl.load(DOCUMENT + task), tl.load(FIRST + task)
    start = tl.load(CU + document)
    n = tl.load(CU + document + 1) - start
    if first >= n:  # the plan has room for the most tasks that T tokens can make
        return
    kv_head = head // (H // KV_HEADS)
    q = _rows(Q, start, first, n, head, H, D, BM, DESCRIPTORS)
    top = tl.full([BM], float("-inf"), dtype=ACC)
    mass = tl.zeros([BM], dtype=ACC)
    o = tl.zeros([BM, D], dtype=ACC)
    below = first // BN * BN  # keys before this are visible to every query of the block, whole tiles of them
    top, mass, o = _attend(
        q, K, V, top, mass, o, start, 0, below, first, n, kv_head, KV_HEADS, SCALE, D, BM, BN, False, DESCRIPTORS, ACC
    )
    end = tl.minimum(first + BM, n)
    top, mass, o = _attend(
        q, K, V, top, mass, o, start, below, end, first, n, kv_head, KV_HEADS, SCALE, D, BM, BN, True, DESCRIPTORS, ACC
    )
    _store_rows(OUT, o / mass[:, None], start, first, n, head, H, D, BM)
    row = first + tl.arange(0, BM)
    tl.store(LSE + head.to(tl.int64) * T + start + row, top + tl.log2(mass), mask=row < n)


@jit
def _attend(
    q, K, V, top, mass, o, start, begin, end, first, n, kv_head, KV_HEADS, SCALE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, DESCRIPTORS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Running softmax over keys [begin, end). Every query sees key 0, and it comes first: `top` is then finite."""
    for key in range(begin, end, BN):
        k = _rows(K, start, key, n, kv_head, KV_HEADS, D, BN, DESCRIPTORS)
        v = _rows(V, start, key, n, kv_head, KV_HEADS, D, BN, DESCRIPTORS)
        score = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * SCALE
        if MASK:
            col = key + tl.arange(0, BN)
            score = tl.where(first + tl.arange(0, BM)[:, None] >= col[None, :], score, float("-inf"))
            if DESCRIPTORS:
                v = tl.where((col < n)[:, None], v, 0)  # 0 * NaN of the next document would be NaN
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        top = new_top
    return top, mass, o


@jit
def _attention_delta_kernel(OUT, G_O, DELTA, T, H, D: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """DELTA [H,T] = sum over D of o * g_o: what the softmax's normalisation takes back in backward."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # rows of [T*H, D]
    at = row.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    live = (row < T * H)[:, None]
    product = tl.load(OUT + at, mask=live, other=0).to(ACC) * tl.load(G_O + at, mask=live, other=0).to(ACC)
    tl.store(DELTA + (row % H).to(tl.int64) * T + row // H, tl.sum(product, 1), mask=row < T * H)


@jit
def _attention_dkdv_kernel(
    Q, K, V, G_O, LSE, DELTA, G_K, G_V, CU, DOCUMENT, FIRST, T, H, KV_HEADS, SCALE: tl.constexpr,
    ROOT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BN keys of one head against all later queries of all heads of its group: one owner, no atomics."""
    task, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    document, first = tl.load(DOCUMENT + task), tl.load(FIRST + task)
    start = tl.load(CU + document)
    n = tl.load(CU + document + 1) - start
    if first >= n:
        return
    k = _rows(K, start, first, n, kv_head, KV_HEADS, D, BN, False)
    v = _rows(V, start, first, n, kv_head, KV_HEADS, D, BN, False)
    g_k = tl.zeros([BN, D], dtype=ACC)
    g_v = tl.zeros([BN, D], dtype=ACC)
    col = first + tl.arange(0, BN)
    group = H // KV_HEADS
    for head in range(kv_head * group, (kv_head + 1) * group):
        for query in range(first, n, BM):
            row = query + tl.arange(0, BM)
            q = _rows(Q, start, query, n, head, H, D, BM, False)
            g_o = _rows(G_O, start, query, n, head, H, D, BM, False)
            at = tl.full([BM], head, tl.int64) * T + start + row
            lse = tl.load(LSE + at, mask=row < n, other=0)
            delta = tl.load(DELTA + at, mask=row < n, other=0)
            seen = row[None, :] >= col[:, None]  # rows behind the document are zeros and add nothing
            score = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC) * SCALE
            p = tl.where(seen, tl.exp2(score - lse[None, :]), 0)
            g_v = tl.dot(p.to(g_o.dtype), g_o, g_v, input_precision="ieee", out_dtype=ACC)
            g_p = tl.dot(v, tl.trans(g_o), input_precision="ieee", out_dtype=ACC)
            g_score = p * (g_p - delta[None, :])
            g_k = tl.dot(g_score.to(q.dtype), q, g_k, input_precision="ieee", out_dtype=ACC)
    _store_rows(G_K, g_k * ROOT, start, first, n, kv_head, KV_HEADS, D, BN)
    _store_rows(G_V, g_v, start, first, n, kv_head, KV_HEADS, D, BN)


@jit
def _attention_dq_kernel(
    Q, K, V, G_O, LSE, DELTA, G_Q, CU, DOCUMENT, FIRST, T, H, KV_HEADS, SCALE: tl.constexpr, ROOT: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BM queries of one head against all their keys."""
    task, head = tl.program_id(0) // H, tl.program_id(0) % H
    document, first = tl.load(DOCUMENT + task), tl.load(FIRST + task)
    start = tl.load(CU + document)
    n = tl.load(CU + document + 1) - start
    if first >= n:
        return
    kv_head = head // (H // KV_HEADS)
    row = first + tl.arange(0, BM)
    q = _rows(Q, start, first, n, head, H, D, BM, False)
    g_o = _rows(G_O, start, first, n, head, H, D, BM, False)
    at = head.to(tl.int64) * T + start + row
    lse = tl.load(LSE + at, mask=row < n, other=0)
    delta = tl.load(DELTA + at, mask=row < n, other=0)
    g_q = tl.zeros([BM, D], dtype=ACC)
    for key in range(0, tl.minimum(first + BM, n), BN):
        col = key + tl.arange(0, BN)
        k = _rows(K, start, key, n, kv_head, KV_HEADS, D, BN, False)
        v = _rows(V, start, key, n, kv_head, KV_HEADS, D, BN, False)
        score = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * SCALE
        p = tl.where(row[:, None] >= col[None, :], tl.exp2(score - lse[:, None]), 0)
        g_p = tl.dot(g_o, tl.trans(v), input_precision="ieee", out_dtype=ACC)
        g_score = p * (g_p - delta[:, None])
        g_q = tl.dot(g_score.to(k.dtype), k, g_q, input_precision="ieee", out_dtype=ACC)
    _store_rows(G_Q, g_q * ROOT, start, first, n, head, H, D, BM)


# --------------------------------------------------------------------------------------- launchers and their gradient
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, *plan):
        q, k, v = (t.contiguous() for t in (q, k, v))
        o, lse = launch_forward(q, k, v, cu_seqlens, plan)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, *plan)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, g_o):
        *tensors, cu_seqlens, plan = *ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        return *launch_backward(g_o.contiguous(), *tensors, cu_seqlens, plan), None, *[None] * len(plan)


def _tasks(cu_seqlens, tokens, block, last_first):
    """Tasks of `block` positions: document and first position of each; `last_first` where late blocks work longest.

    Lengths stay on the device: there is room for the most tasks that so many tokens can make, and a surplus task
    points behind the end of the last document. Lengths [5, 0, 3], block 4, last first: documents [0, 0, 2, 2, 2],
    first positions [4, 0, 0, 4, 8], of which the last two are surplus.
    """
    blocks_N = (cu_seqlens.diff() + block - 1) // block
    ends_N = blocks_N.cumsum(0)
    task_M = torch.arange(tokens // block + len(blocks_N), device=cu_seqlens.device)
    document_M = torch.searchsorted(ends_N, task_M, right=True).clamp_(max=len(blocks_N) - 1)
    blocks_M = blocks_N[document_M]
    block_M = task_M - (ends_N[document_M] - blocks_M)
    if last_first:
        block_M = torch.where(block_M < blocks_M, blocks_M - 1 - block_M, block_M)
    return document_M.to(torch.int32), (block_M * block).to(torch.int32)


def launch_forward(q, k, v, cu_seqlens, plan):
    tile, meta = _prepare(q, k, v, "forward")
    tokens, heads, dim = q.shape
    document, first = plan[:2]
    o, lse = torch.empty_like(q), torch.empty(heads, tokens, dtype=accumulator(q.dtype), device=q.device)
    if tokens:
        inputs = (q, k, v)
        if tile["DESCRIPTORS"]:
            rows = (tile["BM"], tile["BN"], tile["BN"])
            inputs = (dispatch.descriptor(x.flatten(1), [n, dim]) for x, n in zip(inputs, rows, strict=True))
        dispatch.launch(
            _attention_forward_kernel, len(document) * heads, *inputs, o, lse, cu_seqlens, document, first, tokens,
            heads, k.shape[1], **tile, **meta,
        )  # fmt: skip
    return o, lse


def launch_backward(g_o, q, k, v, o, lse, cu_seqlens, plan):
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    delta, g_q, g_k, g_v = torch.empty_like(lse), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if tokens == 0:
        return g_q, g_k, g_v
    tile, meta = _prepare(q, k, v, "dkdv")
    meta["ROOT"] = dim**-0.5
    dispatch.launch(
        _attention_delta_kernel, dispatch.cdiv(tokens * heads, 32), o, g_o, delta, tokens, heads, D=dim, ROWS=32,
        ACC=meta["ACC"], num_warps=4,
    )  # fmt: skip
    document, first = plan[2:4]
    dispatch.launch(
        _attention_dkdv_kernel, len(document) * kv_heads, q, k, v, g_o, lse, delta, g_k, g_v, cu_seqlens, document,
        first, tokens, heads, kv_heads, **tile, **meta,
    )  # fmt: skip
    tile, _ = _prepare(q, k, v, "dq")
    document, first = plan[4:]
    dispatch.launch(
        _attention_dq_kernel, len(document) * heads, q, k, v, g_o, lse, delta, g_q, cu_seqlens, document, first, tokens,
        heads, kv_heads, **tile, **meta,
    )  # fmt: skip
    return g_q, g_k, g_v


def _prepare(q, k, v, kernel):
    """The tile of this kernel, and what all three kernels share."""
    dispatch.check_dtype(q, k, v)
    dim = q.shape[2]
    meta = {"SCALE": dim**-0.5 * math.log2(math.e), "D": dim, "ACC": dispatch.triton_dtype(accumulator(q.dtype))}
    return _tile(q.device, kernel, q.dtype, dim), meta


# Fixed tiles, chosen from compiled code (no spill, within shared memory; bench/compiled.py checks it):
# (architecture, kernel): {head dim: (queries BM, keys BN, warps, pipeline stages)}
TILES = {
    ("sm_80", "forward"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
    ("sm_80", "dkdv"): {64: (32, 64, 8, 2), 128: (64, 64, 8, 1)},
    ("sm_80", "dq"): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2)},
    ("sm_89", "forward"): {64: (128, 64, 8, 2), 128: (128, 32, 8, 3)},
    ("sm_89", "dkdv"): {64: (32, 64, 8, 2), 128: (64, 64, 8, 1)},
    ("sm_89", "dq"): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2)},
    ("sm_90", "forward"): {64: (128, 128, 8, 3), 128: (128, 64, 8, 3)},
    ("sm_90", "dkdv"): {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)},
    ("sm_90", "dq"): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
    ("interpreter", "forward"): {64: (64, 32, 4, 1), 128: (64, 32, 4, 1)},
    ("interpreter", "dkdv"): {64: (32, 64, 4, 1), 128: (32, 64, 4, 1)},
    ("interpreter", "dq"): {64: (64, 32, 4, 1), 128: (64, 32, 4, 1)},
}
FP32_TILES = {  # IEEE products, no tensor cores: small tiles, for checks rather than for speed
    "forward": {64: (16, 32, 8, 1), 128: (16, 32, 8, 1)},
    "dkdv": {64: (32, 16, 4, 1), 128: (32, 16, 4, 1)},
    "dq": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1)},
}
SM80_FP32_DKDV = (16, 32, 4, 1)  # head dim 64: the tile above spills 8 bytes there


def _tile(device, kernel, dtype, dim):
    arch = dispatch.architecture(device)
    small = dtype == torch.float32 and arch != "interpreter"
    block_m, block_n, warps, stages = (FP32_TILES[kernel] if small else TILES[arch, kernel])[dim]
    if small and (arch, kernel, dim) == ("sm_80", "dkdv", 64):
        block_m, block_n, warps, stages = SM80_FP32_DKDV
    tile = {"BM": block_m, "BN": block_n, "num_warps": warps, "num_stages": stages}
    return tile | ({"DESCRIPTORS": arch == "sm_90" and not small} if kernel == "forward" else {})
