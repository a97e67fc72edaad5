"""The references (on a CPU they are the product) against independent implementations, and the choice of backend."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import dispatch

HEAD = sys.modules["kernels.linear_logp"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


# ------------------------------------------------------------------------------------------------------- the choice


def test_a_cpu_without_the_interpreter_runs_the_references():
    assert kernels.backend() == ("triton" if torch.cuda.is_available() else "reference")
    assert kernels.backend("cpu") == "reference"


def test_a_choice_that_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="fastest"):
        kernels.force("fastest")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        kernels.force("triton-interpreter")
    try:
        kernels.force("triton")
        with pytest.raises(ValueError, match="cannot run on cpu"):
            kernels.swiglu(torch.ones(2))
        kernels.force("reference")
        assert kernels.backend() == "reference"
    finally:
        kernels.force(None)


def test_without_triton_the_package_imports_and_computes():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
q, cu_seqlens = torch.randn(5, 2, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
assert kernels.attention(q, q, q, cu_seqlens, 3).shape == q.shape
assert kernels.linear_logp(torch.randn(5, 8), torch.randn(9, 8), torch.arange(5))[0].max() < 0
assert kernels.rms_norm(q, torch.ones(16), 1e-6).isfinite().all() and kernels.backend() == "reference"
try:
    kernels.force("triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".")
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout and done.stderr.count("kernels: reference on cpu") == 1


CAPABILITIES = {(8, 0): "sm_80", (8, 6): "sm_89", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_90", (12, 0): "sm_89"}


@pytest.mark.parametrize("capability, expected", CAPABILITIES.items())
def test_every_supported_device_has_tiles(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert dispatch.architecture("cuda") == expected


def test_below_sm_80_the_references_run_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    dispatch._announce.cache_clear()
    assert kernels.backend("cuda") == "reference"
    assert "below sm_80" in capsys.readouterr().err
    dispatch._announce.cache_clear()


def test_shapes_that_do_not_agree_are_refused():
    x, y, cu = torch.ones(3, 4), torch.zeros(3, dtype=torch.long), torch.tensor([0, 3], dtype=torch.int32)
    q, k = torch.ones(3, 4, 8), torch.ones(3, 3, 8)
    pages, table, lengths = torch.ones(2, 64, 2, 8), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3).int()
    for call in (
        lambda: kernels.linear_logp(x, torch.ones(5, 3), y),
        lambda: kernels.linear_logp(x, torch.ones(5, 4), y[:2]),
        lambda: kernels.linear_logp(x, torch.ones(5, 4), y, temperature=0),
        lambda: kernels.attention(q, k, k, cu, 3),
        lambda: kernels.attention(q, q, q, cu.long(), 3),
        lambda: kernels.attention(q, q, q, cu - 1, 3),
        lambda: kernels.decode_attention(q, pages[:, :32], pages[:, :32], table, lengths),
        lambda: kernels.decode_attention(q, pages, pages, table[:2], lengths),
        lambda: kernels.rms_norm(x, torch.ones(3), 1e-6),
        lambda: kernels.rms_norm(x, torch.ones(4), 1e-6, torch.ones(2, 4)),
        lambda: kernels.rope(torch.ones(3, 32), 3, torch.ones(3, 8), torch.ones(3, 8)),  # one head left for k and v
        lambda: kernels.rope(torch.ones(3, 32), 2, torch.ones(2, 8), torch.ones(2, 8)),
        lambda: kernels.rope(torch.ones(3, 32), 2, torch.ones(3, 8), torch.ones(3, 4)),
        lambda: kernels.swiglu(x[:, :3]),
    ):
        with pytest.raises(ValueError):
            call()


# ------------------------------------------------------------------------------------------------------ linear_logp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 37, 5000])
def test_linear_logp_against_log_softmax(vocab, dtype):
    x, w, y = torch.randn(300, 16).to(dtype), torch.randn(vocab, 16).to(dtype), torch.randint(vocab, (300,))
    logp, entropy = kernels.linear_logp(x, w, y, 0.6)
    exact = (x.double() @ w.double().T / 0.6).log_softmax(-1)
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(logp.double(), exact.gather(1, y[:, None]).squeeze(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(1), rtol=tolerance, atol=tolerance)


def test_linear_logp_gradients_of_both_outputs():
    x, w = torch.randn(6, 7, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    y = torch.tensor([1, -100, 3, 0, 39, 3])
    x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: kernels.linear_logp(x, w, y, 0.7), (x, w))


def test_linear_logp_trains_like_cross_entropy():
    x, w, y = torch.randn(50, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True), torch.randint(30, (50,))
    y[::3] = -100
    expected = torch.autograd.grad(F.cross_entropy(x @ w.T, y), (x, w))
    loss = -kernels.linear_logp(x, w, y)[0].sum() / (y != -100).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), expected)


def test_linear_logp_chunks_add_up(monkeypatch):
    x, w, y = torch.randn(50, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True), torch.randint(30, (50,))
    whole = torch.autograd.grad(sum(t.sum() for t in kernels.linear_logp(x, w, y)), (x, w))
    monkeypatch.setattr(HEAD, "_chunk", lambda vocab: 7)
    chunked = torch.autograd.grad(sum(t.sum() for t in kernels.linear_logp(x, w, y)), (x, w))
    torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5)


def test_linear_logp_ignores():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    logp, entropy = kernels.linear_logp(x, w, torch.full((4,), -100))
    dx, dw = torch.autograd.grad(logp.sum() + entropy.sum(), (x, w))
    assert not (logp.any() or entropy.any() or dx.any() or dw.any())
    y = torch.tensor([3, -100, 5, -100])
    logp, entropy = kernels.linear_logp(x, w, y)
    (dx,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
    assert (logp[1::2] == 0).all() and (entropy[1::2] == 0).all() and (dx[1::2] == 0).all() and (logp[::2] < 0).all()


def test_linear_logp_frozen_head_makes_no_dw(monkeypatch):
    x, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8), torch.tensor([1, 2, 3, 4])
    monkeypatch.setattr(torch.Tensor, "addmm_", None)  # how dw is summed
    kernels.linear_logp(x, w, y)[0].sum().backward()
    assert x.grad.any() and w.grad is None


def test_linear_logp_never_holds_all_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                Largest.elements = max(Largest.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    x, w, y = torch.randn(2000, 4, requires_grad=True), torch.randn(20_000, 4), torch.randint(20_000, (2000,))
    with Largest():
        kernels.linear_logp(x, w, y)[0].sum().backward()
    assert Largest.elements <= 256 * 20_000  # of 2000 * 20,000


# -------------------------------------------------------------------------------------------------------- attention


def masked_attention(q, k, v, cu_seqlens):
    document = torch.bucketize(torch.arange(len(q)), cu_seqlens[1:], right=True)
    mask = (document[:, None] == document[None, :]).tril()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    score = torch.einsum("thd,shd->hts", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hts,shd->thd", score.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("lengths", [[1], [0, 5, 0, 9], [64, 1, 63, 100]])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 16), (6, 2, 64), (7, 1, 80)])
def test_attention_against_the_mask(lengths, heads, kv_heads, dim):
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    q, k, v = (
        torch.randn(sum(lengths), h, dim, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads)
    )
    ours, theirs = kernels.attention(q, k, v, cu_seqlens, max(lengths)), masked_attention(q, k, v, cu_seqlens)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_document_is_the_same_bits_packed_and_alone(dtype):
    lengths = [40, 7, 120]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    q, k, v = (torch.randn(167, h, 64).to(dtype) for h in (3, 1, 1))
    whole = kernels.attention(q, k, v, cu_seqlens, 120)
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        only = torch.tensor([0, end - begin], dtype=torch.int32)
        alone = kernels.attention(q[begin:end], k[begin:end], v[begin:end], only, end - begin)
        assert torch.equal(alone, whole[begin:end])


def decode_case(lengths, heads=6, kv_heads=2, dim=64, dtype=torch.float32):
    pages = -(-max(lengths) // 64)
    k, v = torch.full((2, len(lengths) * pages, 64, kv_heads, dim), torch.nan, dtype=dtype)
    table = torch.randperm(len(lengths) * pages).view(len(lengths), pages).int()
    rows = []
    for row, n in enumerate(lengths):
        rows.append([torch.randn(n, kv_heads, dim, dtype=dtype) for _ in "kv"])
        for arena, content in zip((k, v), rows[-1], strict=True):
            for page, part in enumerate(content.split(64)):
                arena[table[row, page], : len(part)] = part
    q = torch.randn(len(lengths), heads, dim, dtype=dtype)
    return q, k, v, table, torch.tensor(lengths, dtype=torch.int32), rows


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_decode_attention_against_the_last_row_of_attention(kv_heads):
    q, k, v, table, lengths, rows = decode_case([1, 64, 65, 130, 9], kv_heads=kv_heads, dtype=torch.float64)
    out = kernels.decode_attention(q, k, v, table, lengths)
    for b, (row_k, row_v) in enumerate(rows):
        whole_q = torch.zeros(len(row_k), 6, 64, dtype=torch.float64)
        whole_q[-1] = q[b]
        cu_seqlens = torch.tensor([0, len(row_k)], dtype=torch.int32)
        torch.testing.assert_close(out[b], masked_attention(whole_q, row_k, row_v, cu_seqlens)[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_attention_of_many_rows(dtype):
    """More rows of a length than are read at a time, one row longer than that alone; behind every length lies NaN."""
    lengths = [*range(1, 34), *[17] * 70, 2100]
    q, k, v, table, _, rows = decode_case(lengths, heads=2, kv_heads=1, dtype=dtype)
    out = kernels.decode_attention(q, k, v, table, torch.tensor(lengths, dtype=torch.int32))
    for b, (row_k, row_v) in enumerate(rows):
        p_Hn = (q[b].double() @ row_k[:, 0].double().T / 8).softmax(1)
        assert (out[b] - p_Hn @ row_v[:, 0].double()).abs().max() < 4 * torch.finfo(dtype).eps, b


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_decode_attention_row_does_not_depend_on_its_batch(kv_heads):
    """Bitwise: in whatever company, a sample is the same."""
    q, k, v, table, lengths, _ = decode_case([1, 64, 65, 130, 9, 300, 100, 101], kv_heads=kv_heads)
    together = kernels.decode_attention(q, k, v, table, lengths)
    for rows in ([0], [3], [5, 1], [7, 6, 4]):
        assert torch.equal(kernels.decode_attention(q[rows], k, v, table[rows], lengths[rows]), together[rows])


def test_decode_attention_of_nothing_is_zero():
    q, k, v, table, lengths, _ = decode_case([5, 70])
    lengths[0] = 0
    out = kernels.decode_attention(q, k, v, table, lengths)
    assert (out[0] == 0).all() and out[1].isfinite().all()


# ------------------------------------------------------------------------------------- norm, rotation, gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation_are_hugging_faces(dtype):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

    norm = Qwen2RMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(9, 48).to(dtype), torch.randn(9, 48).to(dtype)
    assert torch.equal(kernels.rms_norm(x, norm.weight, 1e-5), norm(x))
    out, s = kernels.rms_norm(x, norm.weight, 1e-5, residual)
    assert torch.equal(s, x + residual) and torch.equal(out, norm(x + residual))

    q, k = torch.randn(9, 4, 16).to(dtype), torch.randn(9, 2, 16).to(dtype)
    angle = torch.arange(9)[:, None] * torch.rand(8)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    theirs = apply_rotary_pos_emb(
        q.transpose(0, 1)[None].float(), k.transpose(0, 1)[None].float(), cos[None], sin[None]
    )
    joint = torch.cat((q, k, k + 1), dim=1).flatten(1)
    *turned, v = kernels.rope(joint, 4, cos, sin)
    for a, b in zip(turned, theirs, strict=True):
        torch.testing.assert_close(
            a, b[0].transpose(0, 1).to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 0
        )
    assert torch.equal(v, k + 1)

    norms = (torch.randn(16).to(dtype), torch.randn(16).to(dtype), 1e-5)  # Qwen3's, over each head
    normed = [kernels.rms_norm(x, weight, 1e-5) for x, weight in zip((q, k), norms, strict=False)]
    expected = kernels.rope(torch.cat((*normed, k + 1), dim=1).flatten(1), 4, cos, sin)
    cached = torch.full((2, 12, 2, 16), torch.nan, dtype=dtype)
    slot = torch.randperm(12)[:9]
    assert all(map(torch.equal, kernels.rope(joint, 4, cos, sin, norms), expected))
    assert torch.equal(kernels.rope(joint, 4, cos, sin, norms, cache=(slot, *cached)), expected[0])
    assert all(torch.equal(arena[slot], x) for arena, x in zip(cached, expected[1:], strict=True))
    assert cached.isnan().sum() == 2 * 3 * 2 * 16  # the other slots are as they were


def test_gradients_of_norm_rotation_and_gate():
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    cos, sin = torch.randn(2, 5, 4, dtype=torch.float64).repeat(1, 1, 2)
    check = torch.autograd.gradcheck
    assert check(lambda x, w, r: kernels.rms_norm(x, w, 1e-6, r), (random(5, 7), random(7), random(5, 7)))
    joint = lambda qkv, *w: kernels.rope(qkv, 3, cos, sin, (*w, 1e-6) if w else None)  # noqa: E731
    assert check(joint, (random(5, 56),)) and check(joint, (random(5, 56), random(8), random(8)))
    assert check(kernels.swiglu, (random(5, 8),))
