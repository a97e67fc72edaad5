"""The kernels on a real GPU: what neither the interpreter nor the compiler can show."""

import pytest
import torch
import torch.nn.functional as F
from interpreter.compare import compare

import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def packed(lengths, heads, kv_heads, dim, dtype):
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(DEVICE)
    inputs = [torch.randn(sum(lengths), h, dim, device=DEVICE).to(dtype) for h in (heads, kv_heads, kv_heads)]
    return inputs, cu_seqlens


def per_document(cu_seqlens):
    """One document at a time, products in the inputs' dtype as torch does them."""
    lengths = cu_seqlens.diff().tolist()

    def one(q, k, v):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    def function(q, k, v):
        return torch.cat([one(*d) for d in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)])

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (7, 1, 128), (32, 8, 128), (12, 2, 128)])
def test_attention(heads, kv_heads, dim, dtype):
    inputs, cu_seqlens = packed([700, 1, 63, 64, 65, 1000], heads, kv_heads, dim, dtype)
    reference = per_document(cu_seqlens)
    compare(lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, 1000), reference, reference, inputs, [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(257, 896, 4097), (300, 1536, 32_000)])
def test_linear_logp(shape, dtype):
    tokens, width, vocab = shape
    x, w = torch.randn(tokens, width, device=DEVICE), torch.randn(vocab, width, device=DEVICE) / width**0.5
    y = torch.randint(vocab, (tokens,), device=DEVICE)
    y[::7] = -100

    def plain(x, w):
        logp, keep = (x @ w.T / 0.7).log_softmax(-1), y != -100
        return logp.gather(1, y.clamp_min(0)[:, None]).squeeze(1) * keep, -(logp.exp() * logp).sum(1) * keep

    compare(lambda x, w: kernels.linear_logp(x, w, y, 0.7), plain, plain, [x.to(dtype), w.to(dtype)], [])


def test_linear_logp_memory_and_chunks():
    """Several chunks forward and backward; the logits would take 2.4 GB."""
    x = torch.randn(5000, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(120_000, 256, device=DEVICE, dtype=torch.bfloat16)
    y = torch.randint(120_000, (5000,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        kernels.linear_logp(x, w, y)
    assert torch.cuda.max_memory_allocated() - before < 2**27
    kernels.linear_logp(x, w, y)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rotation_and_gate(dtype):
    from kernels.rms_norm import reference as norm
    from kernels.rope import reference as rotate
    from kernels.swiglu import reference as gate

    x, weight = torch.randn(300, 1536, device=DEVICE).to(dtype), torch.randn(1536, device=DEVICE).to(dtype)
    compare(*(lambda x, w, f=f: f(x, w, 1e-6) for f in (kernels.rms_norm, norm, norm)), [x, weight], [])
    compare(kernels.swiglu, gate, gate, [x, torch.randn_like(x)], [])
    cos, sin = torch.randn(2, 300, 64, device=DEVICE).repeat(1, 1, 2)
    q, k = torch.randn(300, 7, 128, device=DEVICE).to(dtype), torch.randn(300, 1, 128, device=DEVICE).to(dtype)
    compare(*(lambda q, k, f=f: f(q, k, cos, sin) for f in (kernels.rope, rotate, rotate)), [q, k], [])


def decode_inputs(lengths, dtype=torch.bfloat16):
    pages = -(-max(lengths) // 64)
    table = torch.randperm(len(lengths) * pages, device=DEVICE).view(len(lengths), pages).int()
    k, v = torch.randn(2, len(lengths) * pages, 64, 2, 128, device=DEVICE).to(dtype)
    q = torch.randn(len(lengths), 14, 128, device=DEVICE).to(dtype)
    return q, k, v, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def test_decode_attention_also_in_a_cuda_graph():
    from kernels.decode_attention import reference

    inputs = decode_inputs([0, 1, 64, 1000, 257])
    exact = reference(*(t.float() if t.is_floating_point() else t for t in inputs))
    eager = kernels.decode_attention(*inputs)
    assert (eager - exact).abs().max() <= 1.5 * (reference(*inputs) - exact).abs().max() + 1e-2 * exact.abs().max()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.decode_attention(*inputs)
    inputs[0].mul_(0.5), inputs[4].sub_(1).clamp_(min=0)  # other queries, other lengths, the same graph
    graph.replay()
    assert torch.equal(captured, kernels.decode_attention(*inputs))
    for b in range(5):
        alone = kernels.decode_attention(
            *(t[b : b + 1] for t in inputs[:1]), *inputs[1:3], *(t[b : b + 1] for t in inputs[3:])
        )
        assert torch.equal(captured[b : b + 1], alone)


def test_fifty_runs_are_the_same_bits():
    """What a race between the threads of a program, or between programs, would break."""
    (q, k, v), cu_seqlens = packed([700, 1, 300, 1000], 12, 2, 128, torch.bfloat16)
    x, w = torch.randn(1500, 1536, device=DEVICE).bfloat16(), torch.randn(32_000, 1536, device=DEVICE).bfloat16() / 40
    weight, y = torch.randn(1536, device=DEVICE).bfloat16(), torch.randint(32_000, (1500,), device=DEVICE)
    leaves = [t.requires_grad_() for t in (q, k, v, x, w, weight)]

    def everything():
        o = kernels.attention(q, k, v, cu_seqlens, 1000)
        logp, entropy = kernels.linear_logp(kernels.rms_norm(x, weight, 1e-6), w, y)
        gradients = torch.autograd.grad(o.float().square().sum() + logp.sum() + entropy.sum(), leaves)
        return [o.detach(), logp.detach(), entropy.detach(), kernels.decode_attention(*decoding), *gradients]

    decoding = decode_inputs([1, 64, 1000, 257])
    first = everything()
    for run in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True)), f"run {run}"
