"""The kernels on a real GPU: what neither the interpreter nor the compiler can show."""

import pytest
import torch
import torch.nn.functional as F
from interpreter.compare import compare

import kernels
from kernels import dispatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def packed(lengths, heads, kv_heads, dim, dtype):
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(DEVICE)
    inputs = [torch.randn(sum(lengths), h, dim, device=DEVICE).to(dtype) for h in (heads, kv_heads, kv_heads)]
    return inputs, cu_seqlens


def per_document(cu_seqlens):
    """One document at a time, every product and the softmax rounded to the inputs' dtype.

    Not F.scaled_dot_product_attention, which widens 16-bit inputs to fp32 where it has no fused kernel.
    """
    lengths = cu_seqlens.diff().tolist()

    def one(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
        score = q.transpose(0, 1) @ k.mT * q.shape[2] ** -0.5
        future = torch.ones_like(score[0], dtype=torch.bool).triu(1)
        return (score.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    def function(q, k, v):
        return torch.cat([one(*d) for d in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)])

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (7, 1, 128), (32, 8, 128), (12, 2, 128)])
def test_attention(heads, kv_heads, dim, dtype):
    inputs, cu_seqlens = packed([700, 1, 63, 0, 64, 65, 1000], heads, kv_heads, dim, dtype)
    reference = per_document(cu_seqlens)
    launched = [f"_attention_{name}_kernel" for name in ("forward", "delta", "dkdv", "dq")]
    slacks = (1.5, 3.0)  # a fused backward takes sum(o g_o) from the rounded o, this yardstick from the probabilities
    ours = lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, 1000)  # noqa: E731
    compare(ours, reference, reference, inputs, launched, slacks=slacks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_document_is_the_same_bits_packed_and_alone(dtype):
    """Also with neighbours full of NaN: descriptors read on into them."""
    (q, k, v), cu_seqlens = packed([130, 300, 70], 12, 2, 128, dtype)
    alone = torch.tensor([0, 300], dtype=torch.int32, device=DEVICE)
    expected = kernels.attention(*(t[130:430].contiguous() for t in (q, k, v)), alone, 300)
    assert torch.equal(kernels.attention(q, k, v, cu_seqlens, 300)[130:430], expected)
    for t in (q, k, v):
        t[:130], t[430:] = torch.nan, torch.nan
    assert torch.equal(kernels.attention(q, k, v, cu_seqlens, 300)[130:430], expected)


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

    inputs = [x.to(dtype), w.to(dtype)]
    launched = ["_score_kernel", "_combine_kernel", "_dlogits_kernel"]
    compare(lambda x, w: kernels.linear_logp(x, w, y, 0.7), plain, plain, inputs, launched)
    for ours, exact in zip(kernels.linear_logp(*inputs, y, 0.7), plain(*(t.double() for t in inputs)), strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()  # whatever the dtype: logits are never rounded


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
    launched = ["_rms_norm_forward_kernel", "_rms_norm_backward_kernel"]
    compare(*(lambda x, w, f=f: f(x, w, 1e-6) for f in (kernels.rms_norm, norm, norm)), [x, weight], launched)
    launched = ["_swiglu_forward_kernel", "_swiglu_backward_kernel"]
    compare(kernels.swiglu, gate, gate, [x, torch.randn_like(x)], launched)
    cos, sin = torch.randn(2, 300, 64, device=DEVICE).repeat(1, 1, 2)
    q, k = torch.randn(300, 7, 128, device=DEVICE).to(dtype), torch.randn(300, 1, 128, device=DEVICE).to(dtype)
    compare(*(lambda q, k, f=f: f(q, k, cos, sin) for f in (kernels.rope, rotate, rotate)), [q, k], ["_rope_kernel"])


def decode_inputs(lengths, dtype=torch.bfloat16):
    pages = -(-max(lengths) // 64)
    table = torch.randperm(len(lengths) * pages, device=DEVICE).view(len(lengths), pages).int()
    k, v = torch.randn(2, len(lengths) * pages, 64, 2, 128, device=DEVICE).to(dtype)
    q = torch.randn(len(lengths), 14, 128, device=DEVICE).to(dtype)
    return q, k, v, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float32, 3e-6)])
def test_decode_attention_also_in_a_cuda_graph(dtype, floor):
    """The reference rounds once, at the end; the kernel rounds the probabilities, too: hence the floor."""
    from kernels.decode_attention import reference

    inputs = decode_inputs([0, 1, 64, 1000, 257], dtype)
    exact = reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    eager = kernels.decode_attention(*inputs)
    assert dispatch.LAUNCHES["_decode_kernel"] and eager.isfinite().all() and not eager[0].any()
    assert (eager - exact).abs().max() <= 1.5 * (reference(*inputs) - exact).abs().max() + floor * exact.abs().max()
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
