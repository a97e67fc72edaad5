"""The references (on a CPU they are the product) against independent implementations, and the choice of backend."""

import subprocess
import sys

import pytest
import torch
from interpreter.compare import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

import kernels
from kernels import dispatch
from tests.kernel_cases import head, in_fp64, masked, one_by_one, packed, paged

HEAD = sys.modules["kernels.linear_logp"]


# ------------------------------------------------------------------------------------------------------- the choice
def test_the_choice_and_one_that_cannot_run():
    assert kernels.backend() == ("triton" if torch.cuda.is_available() else "reference")
    for name, message in (("fastest", "fastest"), ("triton-interpreter", "TRITON_INTERPRET")):
        with pytest.raises(ValueError, match=message):
            kernels.force(name)
    try:
        kernels.force("triton")
        with pytest.raises(ValueError, match="cannot run on cpu"):
            kernels.swiglu(torch.ones(2))
        kernels.force("reference")
        assert kernels.backend() == "reference"
    finally:
        kernels.force(None)
    assert kernels.backend("cpu") == "reference"


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


def test_every_supported_device_has_tiles_and_below_sm_80_the_references_run_and_say_so(monkeypatch, capsys):
    for capability, expected in CAPABILITIES.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert dispatch.architecture("cuda") == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    dispatch._settled.cache_clear()
    assert kernels.backend("cuda") == "reference" and "below sm_80" in capsys.readouterr().err
    dispatch._settled.cache_clear()


def test_shapes_that_do_not_agree_are_refused():
    x, y, cu = torch.ones(3, 4), torch.zeros(3, dtype=torch.long), torch.tensor([0, 3], dtype=torch.int32)
    q, k, joint, angle = torch.ones(3, 4, 8), torch.ones(3, 3, 8), torch.ones(3, 32), torch.ones(3, 8)
    pages, table, lengths = torch.ones(2, 64, 2, 8), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3).int()
    short = pages[:, :32]
    for function, *calls in (
        (kernels.linear_logp, (x, torch.ones(5, 3), y), (x, torch.ones(5, 4), y[:2]), (x, torch.ones(5, 4), y, 0)),
        (kernels.attention, (q, k, k, cu, 3), (q, q, q, cu.long(), 3), (q, q, q, cu - 1, 3)),
        (kernels.decode_attention, (q, short, short, table, lengths), (q, pages, pages, table[:2], lengths)),
        (kernels.rms_norm, (x, torch.ones(3), 1e-6), (x, torch.ones(4), 1e-6, torch.ones(2, 4))),
        # with three heads for q, one is left for k and v
        (kernels.rope, (joint, 3, angle, angle), (joint, 2, angle[:2], angle[:2]), (joint, 2, angle, angle[:, :4])),
        (kernels.swiglu, (x[:, :3],)),
    ):
        for arguments in calls:
            with pytest.raises(ValueError):
                function(*arguments)


# ------------------------------------------------------------------------------------------------------ linear_logp
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2, 37, 5000])
@pytest.mark.parametrize("chunk", [7, 300])
def test_linear_logp_against_log_softmax(vocab, dtype, chunk, monkeypatch):
    """In chunks and whole; only the gradients are rounded to the inputs' dtype."""
    monkeypatch.setattr(HEAD, "_chunk", lambda vocab: chunk)
    x, w, y = torch.randn(50, 16).to(dtype), torch.randn(vocab, 16).to(dtype), torch.randint(vocab, (50,))
    y[::3] = -100
    upstream = torch.randn(2, 50)
    values, gradients = run(lambda x, w: kernels.linear_logp(x, w, y, 0.6), (x, w), upstream)
    exact_values, exact_gradients = run(head(y, 0.6), (x.double(), w.double()), upstream)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for ours, exact in zip(values, exact_values, strict=True):
        assert ours.dtype == (dtype if dtype == torch.float64 else torch.float32) and not ours[::3].any()
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    tolerance = max(tolerance, torch.finfo(dtype).eps)
    for ours, exact in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == dtype and (ours - exact).abs().max() <= tolerance * max(1, exact.abs().max())
    assert not gradients[0][::3].any()


def test_linear_logp_of_ignored_rows_alone_is_zero():
    x, w, y = torch.randn(4, 8), torch.randn(9, 8), torch.full((4,), -100)
    values, gradients = run(lambda x, w: kernels.linear_logp(x, w, y), (x, w), torch.ones(2, 4))
    assert not any(t.any() for t in (*values, *gradients))


def test_linear_logp_frozen_head_makes_no_dw(monkeypatch):
    x, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8), torch.tensor([1, 2, 3, 4])
    monkeypatch.setattr(torch.Tensor, "addmm_", None)  # how dw is summed
    kernels.linear_logp(x, w, y)[0].sum().backward()
    assert x.grad.any() and w.grad is None


def test_linear_logp_never_holds_all_logits():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    x, w, y = torch.randn(2000, 4, requires_grad=True), torch.randn(20_000, 4), torch.randint(20_000, (2000,))
    with Sizes():
        kernels.linear_logp(x, w, y)[0].sum().backward()
    assert 20_000 < max(sizes) <= 256 * 20_000  # of 2000 * 20,000


# -------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("lengths", [[1], [0, 5, 0, 9], [64, 1, 63, 100]])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 16), (6, 2, 64), (7, 1, 80)])
def test_attention_against_the_mask(lengths, heads, kv_heads, dim):
    inputs, cu_seqlens = packed(lengths, heads, kv_heads, dim, torch.float64)
    upstream = [torch.randn_like(inputs[0])]
    ours = run(lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, max(lengths)), inputs, upstream)
    torch.testing.assert_close(ours, run(masked(cu_seqlens), inputs, upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_document_is_the_same_bits_packed_and_alone(dtype):
    (q, k, v), cu_seqlens = packed([40, 7, 120], 3, 1, 64, dtype)
    whole = kernels.attention(q, k, v, cu_seqlens, 120)
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        only = torch.tensor([0, end - begin], dtype=torch.int32)
        alone = kernels.attention(q[begin:end], k[begin:end], v[begin:end], only, end - begin)
        assert torch.equal(alone, whole[begin:end])


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_decode_attention_against_each_row_by_itself(kv_heads):
    inputs = paged([1, 64, 0, 65, 130, 9], 6, kv_heads, 64, torch.float64)
    out = kernels.decode_attention(*inputs)
    torch.testing.assert_close(out, one_by_one(*inputs))
    assert not out[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_attention_of_many_rows(dtype):
    """More rows of a length than are read at a time, one row longer than that alone; behind every length lies NaN."""
    inputs = paged([*range(1, 34), *[17] * 70, 2100], 2, 1, 64, dtype)
    error = kernels.decode_attention(*inputs) - one_by_one(*in_fp64(inputs))
    assert error.abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_decode_attention_row_does_not_depend_on_its_batch(kv_heads):
    """Bitwise: in whatever company, a sample is the same."""
    q, k, v, table, lengths = paged([1, 64, 65, 130, 9, 300, 100, 101], 6, kv_heads, 64)
    together = kernels.decode_attention(q, k, v, table, lengths)
    for rows in ([0], [3], [5, 1], [7, 6, 4]):
        assert torch.equal(kernels.decode_attention(q[rows], k, v, table[rows], lengths[rows]), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation_are_hugging_faces(dtype):
    norm = Qwen2RMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(9, 48).to(dtype), torch.randn(9, 48).to(dtype)
    assert torch.equal(kernels.rms_norm(x, norm.weight, 1e-5), norm(x))
    out, s = kernels.rms_norm(x, norm.weight, 1e-5, residual)
    assert torch.equal(s, x + residual) and torch.equal(out, norm(x + residual))

    q, k = torch.randn(9, 4, 16).to(dtype), torch.randn(9, 2, 16).to(dtype)
    angle = torch.arange(9)[:, None] * torch.rand(8)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    theirs = apply_rotary_pos_emb(q.float(), k.float(), cos, sin)
    joint = torch.cat((q, k, k + 1), dim=1).flatten(1)
    *turned, v = kernels.rope(joint, 4, cos, sin)
    for a, b in zip(turned, theirs, strict=True):
        torch.testing.assert_close(a, b.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
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
