"""Fused head: hidden states -> log-probability of the target and entropy of the distribution, token by token.

Replaces `logits = x @ w.T; log_softmax; gather` of SFT, RL and scoring. At T=8192, V=151,936 the logits alone are
5 GB in fp32, and keeping them in bf16 instead costs up to 0.03 nat a token. Here only a chunk of logits exists at
any time, in fp32 accumulators, and the losses stay plain PyTorch on the [T] vectors that come out.

Forward (also scoring without gradients) is one kernel, product and online softmax together: no logits in memory, only
3 numbers a token and split of the vocabulary. Backward recomputes the logits in chunks of 2048 tokens or more: product
by cuBLAS, one Triton pass over the rows that turns logits into their gradient, products for dx and dw.

Cost: 2 T H V FLOPs forward, the same once more in backward (recompute), once for dx and, if the head is trained, once
for dw. Bytes in backward: 14 T V for the chunks; memory: 6 bytes a logit of one chunk, and dw in fp32.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.dispatch import accumulator, check, jit, tl


def linear_logp(x_TH, w_VH, y_T, temperature=1.0, ignore_index=-100):
    """log softmax(x @ w.T / temperature)[y] and the entropy of that softmax.

    x_TH [T,H] hidden states, w_VH [V,H] head, y_T [T] int64 targets -> (logp_T, entropy_T), nats, fp32 (fp64 for
    fp64 inputs). Both outputs are differentiable for any upstream gradient. Rows whose target is `ignore_index` give
    0 and 0 and get zero gradients. A frozen `w_VH` costs no dW. Raises ValueError for shapes that do not agree.
    """
    check(x_TH.dim() == 2 and w_VH.dim() == 2 and x_TH.shape[1] == w_VH.shape[1], f"{x_TH.shape=} {w_VH.shape=}")
    check(y_T.shape == x_TH.shape[:1], f"{y_T.shape=} is not {x_TH.shape[:1]}")
    check(temperature > 0, f"{temperature=} must be positive")
    if dispatch.backend(x_TH.device) == "reference":
        return reference(x_TH, w_VH, y_T, temperature, ignore_index)
    return _LinearLogp.apply(x_TH, w_VH, y_T, float(temperature), ignore_index)


# ---------------------------------------------------------------------------------------------- PyTorch reference
def reference(x_TH, w_VH, y_T, temperature=1.0, ignore_index=-100):
    return _Reference.apply(x_TH, w_VH, y_T, float(temperature), ignore_index)


class _Reference(torch.autograd.Function):
    """Chunks of tokens; backward recomputes the logits of a chunk, so no [T,V] tensor ever lives."""

    @staticmethod
    def forward(ctx, x_TH, w_VH, y_T, temperature, ignore_index):
        acc = accumulator(x_TH.dtype)
        kept_N = (y_T != ignore_index).nonzero().squeeze(1)  # ignored rows cost nothing from here on
        logp_T, entropy_T = x_TH.new_zeros(2, len(y_T), dtype=acc)
        w_acc = w_VH.to(acc)
        for rows_C in kept_N.split(_chunk(w_VH.shape[0])):
            logp_CV = _log_softmax(x_TH[rows_C].to(acc), w_acc, temperature)
            logp_T[rows_C] = logp_CV.gather(1, y_T[rows_C, None]).squeeze(1)
            entropy_T[rows_C] = -(logp_CV.exp() * logp_CV).sum(1)
        ctx.save_for_backward(x_TH, w_VH, y_T, kept_N, entropy_T)
        ctx.temperature = temperature
        return logp_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp_T, g_entropy_T):
        x_TH, w_VH, y_T, kept_N, entropy_T = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        acc = accumulator(x_TH.dtype)
        w_acc = w_VH.to(acc)
        dx_TH = torch.zeros_like(x_TH) if needs_dx else None
        dw_VH = torch.zeros_like(w_acc) if needs_dw else None
        for rows_C in kept_N.split(_chunk(w_VH.shape[0])):
            x_CH = x_TH[rows_C].to(acc)
            dz_CV = _log_softmax(x_CH, w_acc, ctx.temperature)
            dz_CV = _dlogits(dz_CV, y_T[rows_C], g_logp_T[rows_C], g_entropy_T[rows_C], entropy_T[rows_C])
            dz_CV /= ctx.temperature
            if needs_dx:
                dx_TH[rows_C] = (dz_CV @ w_acc).to(x_TH.dtype)
            if needs_dw:
                dw_VH.addmm_(dz_CV.T, x_CH)
        return dx_TH, dw_VH.to(w_VH.dtype) if needs_dw else None, None, None, None


def _chunk(vocab):
    """Rows a chunk: 8 MB of fp32 logits for a small vocabulary, at least 256 so that products stay efficient."""
    return max(256, 2**21 // vocab)


def _log_softmax(x_CH, w_VH, temperature):
    return (x_CH @ w_VH.T).div_(temperature).log_softmax(1)


def _dlogits(logp_CV, y_C, g_logp_C, g_entropy_C, entropy_C):
    """d/dz of g_logp * logp[y] + g_entropy * entropy: g_logp (onehot - p) - g_entropy p (log p + entropy)."""
    p_CV = logp_CV.exp()
    dz_CV = logp_CV.add_(entropy_C[:, None]).mul_(-g_entropy_C[:, None]).sub_(g_logp_C[:, None]).mul_(p_CV)
    return dz_CV.scatter_add_(1, y_C[:, None], g_logp_C[:, None])


# -------------------------------------------------------------------------------------------------- Triton kernels
@jit
def _score_kernel(
    X, W, Y, TOP, MASS, LEAN, TARGET, T, V, H, SCALE: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """BT tokens against TILES * BV words: the part that this split of the vocabulary has in every token's softmax.

    In units of log 2, with z = SCALE * logit: TOP = max z, MASS = sum 2^(z - TOP), LEAN = sum 2^(z - TOP) (z - TOP);
    TARGET = z of the target, written by the one program whose words include it.
    """
    blocks = tl.cdiv(T, BT)
    split = tl.program_id(0) // blocks  # neighbours share the words, so that they come from L2
    block = tl.program_id(0) % blocks
    if GROUP:  # and GROUP blocks of tokens take turns through all words, so that their tokens stay there, too
        splits = tl.num_programs(0) // blocks
        first_block = tl.program_id(0) // (GROUP * splits) * GROUP
        members = tl.minimum(blocks - first_block, GROUP)
        split = tl.program_id(0) % (GROUP * splits) // members
        block = first_block + tl.program_id(0) % (GROUP * splits) % members
    row = block * BT + tl.arange(0, BT)
    target = tl.load(Y + row, mask=row < T, other=-1)
    top = tl.full([BT], float("-inf"), dtype=ACC)
    mass = tl.zeros([BT], dtype=ACC)
    lean = tl.zeros([BT], dtype=ACC)
    z_target = tl.zeros([BT], dtype=ACC)
    for tile in range(TILES):
        first = (split * TILES + tile) * BV
        col = first + tl.arange(0, BV)
        z = _logits(X, W, block * BT, first, T, V, H, BT, BV, BH, EVEN, DESCRIPTORS, ACC) * SCALE
        live = (col < V)[None, :]
        z_target += tl.sum(tl.where(col[None, :] == target[:, None], z, 0), 1)
        new_top = tl.maximum(top, tl.max(tl.where(live, z, float("-inf")), 1))
        below = tl.where(live, z - new_top[:, None], 0)
        e = tl.where(live, tl.exp2(below), 0)
        fall = tl.where(top == float("-inf"), 0, top - new_top)  # the first tile has nothing to scale down
        lean = tl.exp2(fall) * (lean + fall * mass) + tl.sum(e * below, 1)
        mass = tl.exp2(fall) * mass + tl.sum(e, 1)
        top = new_top
    at = split.to(tl.int64) * T + row
    tl.store(TOP + at, top, mask=row < T)
    tl.store(MASS + at, mass, mask=row < T)
    tl.store(LEAN + at, lean, mask=row < T)
    mine = (target >= split * TILES * BV) & (target < (split + 1) * TILES * BV) & (target < V)
    tl.store(TARGET + row, z_target, mask=(row < T) & mine)


@jit
def _logits(
    X, W, first_row, first_col, T, V, H, BT: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One [BT,BV] tile of x @ w.T."""
    row = (first_row + tl.arange(0, BT)).to(tl.int64)[:, None]
    col = (first_col + tl.arange(0, BV)).to(tl.int64)[:, None]
    acc = tl.zeros([BT, BV], dtype=ACC)
    for h0 in range(0, H, BH):
        if DESCRIPTORS:
            x = X.load([first_row, h0])
            w = W.load([first_col, h0])
        else:
            h = h0 + tl.arange(0, BH)[None, :]
            inside = (h < H) | EVEN
            x = tl.load(X + row * H + h, mask=(row < T) & inside, other=0)
            w = tl.load(W + col * H + h, mask=(col < V) & inside, other=0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee", out_dtype=ACC)
    return acc


@jit
def _combine_kernel(
    TOP, MASS, LEAN, TARGET, LOGP, ENTROPY, LSE, T, SPLITS, LN2: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr
):
    """Splits of the vocabulary, in their order, to the whole softmax; from here on natural logarithms."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    top = tl.full([BT], float("-inf"), dtype=ACC)
    mass = tl.zeros([BT], dtype=ACC)
    lean = tl.zeros([BT], dtype=ACC)
    for split in range(SPLITS):
        at = tl.full([BT], split, tl.int64) * T + row
        part_top = tl.load(TOP + at, mask=row < T, other=0)
        part_mass = tl.load(MASS + at, mask=row < T, other=1)
        part_lean = tl.load(LEAN + at, mask=row < T, other=0)
        new_top = tl.maximum(top, part_top)
        fall = tl.where(top == float("-inf"), 0, top - new_top)
        part_fall = part_top - new_top
        lean = tl.exp2(fall) * (lean + fall * mass) + tl.exp2(part_fall) * (part_lean + part_fall * part_mass)
        mass = tl.exp2(fall) * mass + tl.exp2(part_fall) * part_mass
        top = new_top
    target = tl.load(TARGET + row, mask=row < T, other=0)
    log_mass = tl.log2(mass)
    tl.store(LOGP + row, ((target - top) - log_mass) * LN2, mask=row < T)
    tl.store(ENTROPY + row, (log_mass - lean / mass) * LN2, mask=row < T)
    tl.store(LSE + row, (top + log_mass) * LN2, mask=row < T)


@jit
def _dlogits_kernel(
    Z, DZ, Y, LSE, ENTROPY, G_LOGP, G_ENTROPY, V, INVERSE_T: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """One row of logits Z to the gradient DZ: g_logp (onehot - p) - g_entropy p (log p + entropy), over T."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(Y + row)
    lse = tl.load(LSE + row)
    entropy = tl.load(ENTROPY + row)
    g_logp = tl.load(G_LOGP + row)
    g_entropy = tl.load(G_ENTROPY + row)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        logp = tl.load(Z + row * V + col, mask=col < V, other=0).to(ACC) * INVERSE_T - lse
        dz = tl.where(col == target, g_logp, 0) - tl.exp(logp) * (g_logp + g_entropy * (logp + entropy))
        tl.store(DZ + row * V + col, (dz * INVERSE_T).to(DZ.dtype.element_ty), mask=col < V)


# --------------------------------------------------------------------------------------- launchers and their gradient
CHUNK = 2048  # tokens at least: products of this height run at full speed, and dw is read and written rarely
CHUNK_LOGITS = 2**28  # a small vocabulary takes more tokens a chunk
GROUP = 0  # blocks of tokens that the score kernel takes together; 0: all
NARROW = False  # whether backward rounds the logits of 16-bit inputs to their dtype


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, w_VH, y_T, temperature, ignore_index):
        kept_N, w_VH = (y_T != ignore_index).nonzero().squeeze(1), w_VH.contiguous()
        outputs_3T = x_TH.new_zeros(3, len(y_T), dtype=accumulator(x_TH.dtype))
        if len(kept_N):
            outputs_3T[:, kept_N] = launch_score(x_TH[kept_N], w_VH, y_T[kept_N], temperature)
        logp_T, entropy_T, lse_T = (row_T.clone() for row_T in outputs_3T)
        ctx.save_for_backward(x_TH, w_VH, y_T, kept_N, entropy_T, lse_T)
        ctx.temperature = temperature
        return logp_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp_T, g_entropy_T):
        x_TH, w_VH, y_T, kept_N, entropy_T, lse_T = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx_TH, dw_VH = torch.zeros_like(x_TH) if needs_dx else None, None
        for rows_C in kept_N.split(max(CHUNK, CHUNK_LOGITS // len(w_VH))):
            x_CH, vectors = x_TH[rows_C], (t[rows_C] for t in (y_T, lse_T, entropy_T, g_logp_T, g_entropy_T))
            z_CV = x_CH @ w_VH.T if NARROW else _product(x_CH, w_VH.T)
            dz_CV = launch_dlogits(z_CV, x_TH.dtype, *vectors, ctx.temperature)
            del z_CV
            if needs_dx:
                dx_TH[rows_C] = dz_CV @ w_VH
            if needs_dw:
                dw_VH = _product(dz_CV.T, x_CH) if dw_VH is None else _add_product(dw_VH, dz_CV.T, x_CH)
            del dz_CV  # before the next chunk's logits
        if needs_dw:
            dw_VH = torch.zeros_like(w_VH) if dw_VH is None else dw_VH.to(w_VH.dtype)
        return dx_TH, dw_VH, None, None, None


def launch_score(x_NH, w_VH, y_N, temperature):
    """logp, entropy, lse as one [3,N] tensor; no [N,V] workspace."""
    dispatch.check_dtype(x_NH, w_VH)
    (tokens, width), vocab, acc = x_NH.shape, w_VH.shape[0], accumulator(x_NH.dtype)
    arch = dispatch.architecture(x_NH.device)
    check(width % 16 == 0 or arch == "interpreter", f"linear_logp: width {width} is not a multiple of 16")
    tile = _score_tile(arch, x_NH.dtype)
    splits = dispatch.cdiv(vocab, tile["BV"] * tile["TILES"])
    top, mass, lean = torch.empty(3, splits, tokens, dtype=acc, device=x_NH.device)
    target = torch.full((tokens,), torch.nan, dtype=acc, device=x_NH.device)  # stays NaN for a word that does not exist
    x, w = x_NH, w_VH
    if tile["DESCRIPTORS"]:
        x = dispatch.descriptor(x, [tile["BT"], tile["BH"]])
        w = dispatch.descriptor(w, [tile["BV"], tile["BH"]])
    dispatch.launch(
        _score_kernel, dispatch.cdiv(tokens, tile["BT"]) * splits, x, w, y_N, top, mass, lean, target, tokens, vocab,
        width, SCALE=math.log2(math.e) / temperature, EVEN=width % tile["BH"] == 0, GROUP=GROUP,
        ACC=dispatch.triton_dtype(acc), **tile,
    )  # fmt: skip
    outputs = torch.empty(3, tokens, dtype=acc, device=x_NH.device)
    dispatch.launch(
        _combine_kernel, dispatch.cdiv(tokens, 128), top, mass, lean, target, *outputs, tokens, splits,
        LN2=math.log(2), BT=128, ACC=dispatch.triton_dtype(acc), num_warps=4,
    )  # fmt: skip
    return outputs


def _score_tile(arch, dtype):
    """Fixed tiles, chosen from compiled code (no spill, within shared memory); see bench/results/compiled.json."""
    if arch == "interpreter":
        return {"BT": 16, "BV": 32, "BH": 32, "TILES": 2, "DESCRIPTORS": False}
    if dtype == torch.float32:  # IEEE products, no tensor cores
        return {"BT": 64, "BV": 64, "BH": 32, "TILES": 16, "DESCRIPTORS": False, "num_warps": 8, "num_stages": 2}
    tile = {"BT": 128, "BV": 128, "BH": 64, "TILES": 8, "DESCRIPTORS": arch == "sm_90", "num_warps": 8}
    return tile | {"num_stages": {"sm_80": 3, "sm_89": 2, "sm_90": 4}[arch]}


def launch_dlogits(z_CV, dtype, y_C, lse_C, entropy_C, g_logp_C, g_entropy_C, temperature):
    dz_CV = torch.empty_like(z_CV, dtype=dtype)
    dispatch.launch(
        _dlogits_kernel, len(z_CV), z_CV, dz_CV, y_C, lse_C, entropy_C, g_logp_C, g_entropy_C, z_CV.shape[1],
        INVERSE_T=1 / temperature, BLOCK=128 if dispatch.INTERPRETED else 4096,
        ACC=dispatch.triton_dtype(accumulator(z_CV.dtype)), num_warps=8,
    )  # fmt: skip
    return dz_CV


def _product(a, b):
    """a @ b, summed and returned in fp32 (fp64): 16-bit operands stay 16 bits wide on a GPU."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(accumulator(a.dtype)) @ b.to(accumulator(b.dtype))


def _add_product(total, a, b):
    """total += a @ b, total in fp32 (fp64)."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))
