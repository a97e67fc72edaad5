"""One token a row from its logits, and what the sampler keeps of it: the end of every decode step.

Replaces some 80 passes and tiny launches over [B,V] by two kernels, three with top-p: the logits are read once, by
programs that take a chunk of a row's vocabulary each; then one program a row draws, looks up and records. With top-p
another kernel has set the logits outside of the nucleus to -inf, without a sort. Bound by memory bandwidth: 4 V bytes a
row. Nothing is read back by the host, so the launches can be captured in a CUDA graph.

The kernels take probabilities as int64, in units of 2^-UNIT of a power of two near the largest: such sums are exact in
any order. So a row's draw does not depend on its batch, and no token of probability 0 can be drawn. The CPU's reference
sums in fp32 and fp64; both take the same random word, a function of the row's key and of how many it has drawn.
"""

import math

import torch
import torch.nn.functional as F

from kernels import dispatch
from kernels.dispatch import check, jit, tl

SPAN = 64  # tokens of the vocabulary that the reference sums before its cumulative sum
AT_ONCE = 1 << 18  # logits that the reference takes at a time: 1 MB, so that they stay in the CPU's cache


def sample(logits_BV, rows, step_1, eos_E, knobs, mode):
    """Draw a token a row and record it; the logits are used up.

    logits_BV fp32. rows: the sampler's buffers with a line a row, `key`, `token`, `length`, `count`, `limit` [B] int64,
    `live` [B] bool, `ids` [B,W] int64 and `logp` [B,W] fp32, which get the token and its log-prob (nats, of the
    distribution drawn from; not finite where the logits give none) in column step_1. Live rows count one token more,
    and end at one of eos_E or at their limit. knobs: `temperature` and `top_p`, fp32 scalars on the device.
    mode: "sample", "top_p", or "greedy", the likeliest token, the first of equals. Raises ValueError for other dtypes.
    """
    check(logits_BV.dtype == torch.float32 and logits_BV.is_contiguous(), f"{logits_BV.dtype=} {logits_BV.stride()=}")
    if dispatch.backend(logits_BV.device) == "reference":
        return reference(logits_BV, rows, step_1, eos_E, knobs, mode)
    return launch(logits_BV, rows, step_1, eos_E, knobs, mode)


# ---------------------------------------------------------------------------------------------- PyTorch reference
def _shift(x, bits):
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> of int64 repeats the sign; the mask clears it


def mix(x):
    """splitmix64 (Steele, Lea, Flood 2014) of int64 words; products wrap alike on every device."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, bits)) * (factor - 2**64)
    return x ^ _shift(x, 31)


def uniform(key_B, position_B):
    """fp64 in [0, 1 - 2**-52], a function of (key, position) alone."""
    return _shift(mix(key_B ^ mix(position_B)), 12).double() * 2.0**-52


def reference(logits_BV, rows, step_1, eos_E, knobs, mode):
    size, u_B = max(1, AT_ONCE // logits_BV.shape[1]), uniform(rows.key, rows.count)
    parts = [draw(z, u, knobs, mode) for z, u in zip(logits_BV.split(size), u_B.split(size), strict=True)]
    token_B, logp_B = map(torch.cat, zip(*parts, strict=True))
    rows.ids.index_copy_(1, step_1, token_B[:, None])
    rows.logp.index_copy_(1, step_1, logp_B[:, None])
    rows.token.copy_(token_B)
    rows.length += rows.live
    rows.count += rows.live
    rows.live &= (token_B[:, None] != eos_E).all(1) & (rows.count < rows.limit)


def draw(logits_BV, u_B, knobs, mode):
    """(token_B, logp_B) in fp32; the logits are used up."""
    z_BV = logits_BV if mode == "greedy" else logits_BV.div_(knobs.temperature)
    z_BV = z_BV.sub_(z_BV.amax(1, keepdim=True))
    p_BV = z_BV.exp()
    if mode == "top_p":
        nucleus(p_BV, knobs.top_p.item())
    token_B, total_B = inverse_cdf(p_BV, u_B)
    if mode == "greedy":
        token_B = z_BV.argmax(1)
    token_B = token_B.clamp(max=z_BV.shape[1] - 1)
    return token_B, z_BV.gather(1, token_B[:, None]).squeeze(1) - total_B.log().float()


def inverse_cdf(p_BV, u_B):
    """(token_B, total_B): token i with probability p[i] / total, never one of probability 0; p need not be normalised.

    Two levels, sums of SPAN tokens and then one span: the vocabulary is read once, the fp64 sums are short.
    """
    idle = -p_BV.shape[1] % SPAN
    p_BNC = (F.pad(p_BV, (0, idle)) if idle else p_BV).unflatten(1, (-1, SPAN))
    cdf_BN = p_BNC.sum(2).double().cumsum(1)
    span_B1, share_B1 = _locate(cdf_BN, u_B[:, None])
    cdf_BC = p_BNC.gather(1, span_B1[:, :, None].expand(-1, -1, SPAN)).squeeze(1).double().cumsum(1)
    return (span_B1 * SPAN + _locate(cdf_BC, share_B1)[0]).squeeze(1), cdf_BN[:, -1]


def _locate(cdf_BN, u_B1):
    """The column where the cumulative sum passes u of its total, and how far into the column that is, in [0, 1)."""
    target_B1 = u_B1 * cdf_BN[:, -1:]
    column_B1 = torch.searchsorted(cdf_BN, target_B1, right=True).clamp(max=cdf_BN.shape[1] - 1)  # NaN ends there too
    below_B1 = cdf_BN.gather(1, (column_B1 - 1).clamp(min=0)).masked_fill(column_B1 == 0, 0)
    share_B1 = (target_B1 - below_B1) / (cdf_BN.gather(1, column_B1) - below_B1)
    return column_B1, share_B1.clamp(max=1 - 2**-52)


def nucleus(p_BV, top_p):
    """Set p to 0, in place, outside the fewest likeliest tokens that together reach top_p; the first of equals stay.

    Only candidates are sorted: n tokens of at most slack / n each can go, as long as those before them reach top_p.
    """
    for p_V in p_BV:
        index_C, p_C, total = None, p_V, p_V.sum(dtype=torch.float64).item()
        rest, goal = total, top_p * total
        while rest > goal:  # false where p is NaN, which is left as it is
            keep_C = p_C >= (rest - goal) / len(p_C)  # the largest is never below the mean
            kept_K = keep_C.nonzero().squeeze(1)
            if index_C is not None and 2 * len(kept_K) > len(p_C):
                break
            index_C, p_C = kept_K if index_C is None else index_C[kept_K], p_C[kept_K]
            rest = p_C.sum(dtype=torch.float64).item()
        if index_C is not None:
            p_C, order_C = p_C.sort(descending=True, stable=True)
            end = int((p_C.double().cumsum(0) < goal).sum()) + 1
            p_V.zero_().index_copy_(0, index_C[order_C[:end]], p_C[:end])


# -------------------------------------------------------------------------------------------------- Triton kernels
UNIT = 44  # less than 2^19 tokens of the largest weight still sum to an int64
BLOCK = 4096  # tokens a program, or a turn of one
SEARCHED = 1024  # tokens that a program compares with THRESHOLDS values in one turn
THRESHOLDS = 8


@jit
def _mix(x):
    """`mix` of the reference, on uint64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _exponent(top, scale):
    """The power of two that weights are taken against: the next one above the largest; -inf where all are 0."""
    return tl.ceil(top * scale)


@jit
def _probability(z, scale, exponent):
    """exp(z / temperature) / 2^exponent."""
    return tl.exp2(z * scale - tl.where(exponent == float("-inf"), 0.0, exponent))


@jit
def _weight(p, UNIT: tl.constexpr):
    """Probabilities in units of 2^-UNIT. NaN weighs nothing here, and shows in the sum of the probabilities."""
    return (tl.where(p == p, p, 0.0) * (1 << UNIT)).to(tl.int64)


@jit
def _image(z):
    """int32 in the order of the floats; NaN at the ends."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _nucleus_kernel(
    Z, TEMPERATURE, TOP_P, V, LOG2E: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """One row: -inf outside its nucleus.

    With F(t) the weight of all tokens whose image is t or more, the nucleus ends among those whose image is the last t
    with F(t) >= goal. [low, high) holds it; each pass over the row compares THRESHOLDS values between the two.
    """
    Z += tl.program_id(0).to(tl.int64) * V
    scale = LOG2E / tl.load(TEMPERATURE)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, V, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(Z + at, mask=at < V, other=float("-inf")))
    top = tl.max(most, 0)
    exponent = _exponent(top, scale)
    low = _image(top - (UNIT + 2) / scale).to(tl.int64)  # lighter tokens weigh nothing
    high = _image(top).to(tl.int64) + 1
    goal, above = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)  # above: F(high)
    step = tl.arange(0, THRESHOLDS)
    while (high - low > 1) | (goal == 0):
        t = low + (high - low) * step // THRESHOLDS
        sums = tl.zeros([THRESHOLDS, SEARCHED], tl.int64)
        for begin in range(0, V, SEARCHED):
            at = begin + tl.arange(0, SEARCHED)
            z = tl.load(Z + at, mask=at < V, other=float("-inf"))
            weight = _weight(_probability(z, scale, exponent), UNIT)
            sums += tl.where(_image(z).to(tl.int64)[None, :] >= t[:, None], weight[None, :], 0)
        found = tl.sum(sums, 1)
        if goal == 0:  # ceil(top_p * all), in integers
            total = tl.max(found, 0).to(tl.uint64)
            share = (tl.load(TOP_P) * 4294967296.0).to(tl.uint64) << 32
            goal = tl.maximum((tl.umulhi(total, share) + (total * share != 0).to(tl.uint64)).to(tl.int64), 1)
        last = tl.maximum(tl.sum((found >= goal).to(tl.int32), 0) - 1, 0)
        above = tl.where(last < THRESHOLDS - 1, tl.sum(tl.where(step == last + 1, found, 0), 0), above)
        start, width = low, high - low
        low, high = start + width * last // THRESHOLDS, start + width * (last + 1) // THRESHOLDS
    edge = low.to(tl.int32)
    value = (edge ^ ((edge >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    each = tl.maximum(_weight(_probability(value, scale, exponent), UNIT), 1)
    room = (goal - above + each - 1) // each  # tokens of the edge's value that stay
    for begin in range(0, V, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        z = tl.load(Z + at, mask=at < V, other=0.0)
        image = _image(z)
        equal = ((image == edge) & (at < V)).to(tl.int32)
        stays = (image > edge) | (z != z) | ((equal == 1) & (tl.cumsum(equal, 0) <= room))
        tl.store(Z + at, float("-inf"), mask=(at < V) & (stays == 0))
        room -= tl.sum(equal, 0)


@jit
def _chunk_kernel(
    Z, TEMPERATURE, TOP, TOKEN, MASS, WEIGHT, V, CHUNKS, LOG2E: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """A chunk of a row: its largest logit, that one's place, and the sum of its probabilities, as fp32 and int64."""
    at = tl.program_id(0) % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(Z + (tl.program_id(0) // CHUNKS).to(tl.int64) * V + at, mask=at < V, other=float("-inf"))
    top, token = tl.max(z, 0, return_indices=True)
    scale = LOG2E / tl.load(TEMPERATURE)
    p = _probability(z, scale, _exponent(top, scale))
    tl.store(TOP + tl.program_id(0), top)
    tl.store(TOKEN + tl.program_id(0), token)
    tl.store(MASS + tl.program_id(0), tl.sum(p, 0))
    tl.store(WEIGHT + tl.program_id(0), tl.sum(_weight(p, UNIT), 0))


@jit
def _pick_kernel(
    Z, TEMPERATURE, TOP, TOKEN, MASS, WEIGHT, KEY, COUNT, TOKENS, LENGTH, LIMIT, LIVE, IDS, LOGP, STEP, EOS, V, CHUNKS,
    WINDOW, ENDS, LOG2E: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    GREEDY: tl.constexpr,
):  # fmt: skip
    """A row: the chunk, the token in it, its log-prob, the record. A chunk's weights count against its own power of
    two; a shift makes them the row's, and back."""
    b = tl.program_id(0).to(tl.int64)
    scale = LOG2E / tl.load(TEMPERATURE)
    chunk = tl.arange(0, WIDTH)
    exists = chunk < CHUNKS
    top = tl.load(TOP + b * CHUNKS + chunk, mask=exists, other=float("-inf"))
    exponents = _exponent(top, scale)
    exponent = tl.max(exponents, 0)
    mass = tl.load(MASS + b * CHUNKS + chunk, mask=exists, other=0.0)
    mass = tl.sum(mass * tl.exp2(exponents - exponent), 0)
    count = tl.load(COUNT + b)
    if GREEDY:
        best, chosen = tl.max(top, 0, return_indices=True)
        token = chosen * BLOCK + tl.load(TOKEN + b * CHUNKS + chosen)
    else:
        shift = tl.minimum(exponent - exponents, 63.0).to(tl.int64)
        weight = tl.load(WEIGHT + b * CHUNKS + chunk, mask=exists, other=0) >> shift
        key = tl.load(KEY + b).to(tl.uint64, bitcast=True)
        random = _mix(key ^ _mix(count.to(tl.uint64, bitcast=True)))
        target = tl.umulhi(random, tl.sum(weight, 0).to(tl.uint64)).to(tl.int64)
        before = tl.cumsum(weight, 0) <= target
        chosen = tl.minimum(tl.sum(before.to(tl.int32), 0), CHUNKS - 1)
        target -= tl.sum(tl.where(before, weight, 0), 0)
        target <<= tl.sum(tl.where(chunk == chosen, shift, 0), 0)
        at = chosen * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(Z + b * V + at, mask=at < V, other=float("-inf"))
        p = _probability(z, scale, tl.max(tl.where(chunk == chosen, exponents, float("-inf")), 0))
        token = chosen * BLOCK + tl.sum((tl.cumsum(_weight(p, UNIT), 0) <= target).to(tl.int32), 0)
        token = tl.minimum(token, V - 1)
    logp = (tl.load(Z + b * V + token) * scale - exponent - tl.log2(mass)) / LOG2E
    column = b * WINDOW + tl.load(STEP)
    tl.store(IDS + column, token)
    tl.store(LOGP + column, logp)
    tl.store(TOKENS + b, token)
    live = tl.load(LIVE + b)
    count += live
    tl.store(LENGTH + b, tl.load(LENGTH + b) + live)
    tl.store(COUNT + b, count)
    ended = count >= tl.load(LIMIT + b)
    for i in range(ENDS):
        ended = ended | (tl.load(EOS + i) == token)
    tl.store(LIVE + b, live & (ended == 0))


# ------------------------------------------------------------------------------------------------------- launcher
def launch(z, rows, step, eos, knobs, mode):
    (count, vocab), block = z.shape, BLOCK
    check(vocab < 1 << 63 - UNIT, f"sample: a vocabulary of {vocab}; the kernels take less than {1 << 63 - UNIT:,}")
    meta = {"LOG2E": math.log2(math.e), "UNIT": UNIT, "num_warps": 8}
    searched = SEARCHED
    if dispatch.architecture(z.device) == "interpreter":
        block, searched = 128, 128
    if mode == "top_p":
        dispatch.launch(
            _nucleus_kernel, count, z, knobs.temperature, knobs.top_p, vocab, BLOCK=block, SEARCHED=searched,
            THRESHOLDS=THRESHOLDS, **meta,
        )  # fmt: skip
    chunks = dispatch.cdiv(vocab, block)
    top, token, mass, weight = (
        torch.empty(count, chunks, dtype=dtype, device=z.device)
        for dtype in (torch.float32, torch.int32, torch.float32, torch.int64)
    )
    parts = (z, knobs.temperature, top, token, mass, weight)
    dispatch.launch(_chunk_kernel, count * chunks, *parts, vocab, chunks, BLOCK=block, **meta)
    dispatch.launch(
        _pick_kernel, count, *parts, rows.key, rows.count, rows.token, rows.length, rows.limit, rows.live, rows.ids,
        rows.logp, step, eos, vocab, chunks, rows.ids.shape[1], len(eos), BLOCK=block,
        WIDTH=max(2, dispatch.next_power_of_2(chunks)), GREEDY=mode == "greedy", **meta,
    )  # fmt: skip
