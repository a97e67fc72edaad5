"""Inputs of the kernels, and what each computes by its definition: for the references, the interpreter and a GPU."""

import torch
import torch.nn.functional as F


def packed(lengths, heads, kv_heads, dim, dtype=torch.float32, device="cpu"):
    """(q, k, v) [T,heads,D] of documents of these lengths, and cu_seqlens."""
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
    shapes = [(sum(lengths), n, dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes], cu_seqlens


def masked(cu_seqlens):
    """Attention by one [T,T] mask over the packed row, in every dtype."""
    document = torch.bucketize(torch.arange(int(cu_seqlens[-1])), cu_seqlens[1:], right=True)
    mask = (document[:, None] == document[None, :]).tril()

    def function(q, k, v):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return function


def paged(lengths, heads, kv_heads, dim, dtype=torch.float32, device="cpu", pages=None):
    """decode_attention's arguments: rows of these lengths over a shuffled arena whose unused slots are NaN."""
    rows, pages = len(lengths), pages or -(-max(lengths) // 64)
    table = torch.randperm(rows * pages).view(rows, pages).int()
    k, v = torch.full((2, rows * pages, 64, kv_heads, dim), torch.nan)
    for row, length in enumerate(lengths):
        for arena in (k, v):
            for page, part in zip(table[row].tolist(), torch.randn(length, kv_heads, dim).split(64), strict=False):
                arena[page, : len(part)] = part
    q = torch.randn(rows, heads, dim)
    return [t.to(device) for t in (q.to(dtype), k.to(dtype), v.to(dtype), table, torch.tensor(lengths).int())]


def one_by_one(q, k, v, table, lengths):
    """Every row by itself, its context gathered."""
    out = torch.zeros_like(q)
    for b, n in enumerate(lengths.tolist()):
        if n:
            context = [arena[table[b].long()].flatten(0, 1)[:n].transpose(0, 1)[None] for arena in (k, v)]
            out[b] = F.scaled_dot_product_attention(q[b][None, :, None], *context, enable_gqa=True)[0, :, 0]
    return out


def in_fp64(inputs):
    return [t.double() if t.is_floating_point() else t for t in inputs]


def head(y, temperature=1.0):
    """(log-probs of y, entropies) of all logits, which have the inputs' dtype, as a plain model has them."""

    def function(x, w):
        logp, keep = (x @ w.T / temperature).log_softmax(-1), y != -100
        return logp.gather(1, y.clamp_min(0)[:, None]).squeeze(1) * keep, -(logp.exp() * logp).sum(1) * keep

    return function
