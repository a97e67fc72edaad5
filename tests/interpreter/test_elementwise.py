"""RMSNorm, RoPE, SwiGLU: the passes bound by memory bandwidth."""

import sys

import pytest
import torch
from interpreter.compare import DTYPES, compare

import kernels
from kernels import dispatch

NORM, ROPE, SWIGLU = (sys.modules[f"kernels.{name}"] for name in ("rms_norm", "rope", "swiglu"))
NORM_KERNELS = ["_rms_norm_forward_kernel", "_rms_norm_backward_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (300, 37), (3, 1000), (5, 3, 128)])
def test_rms_norm(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    with_eps = [lambda x, w, f=f: f(x, w, 1e-6) for f in (kernels.rms_norm, NORM.reference)]
    compare(*with_eps, with_eps[1], (x, weight), NORM_KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 37), (2, 3, 128), (150, 64)])
def test_rms_norm_with_residual(shape, dtype):
    """The yardstick rounds x + residual to the dtype as torch does, so the truth gets the same sum."""
    x, weight, residual = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    rounded = (x + residual).double() - (x.double() + residual.double())

    def exact(x, w, r):
        s = x + r + rounded
        return NORM.reference(s, w, 1e-6), s

    ours, same = (lambda x, w, r, f=f: f(x, w, 1e-6, r) for f in (kernels.rms_norm, NORM.reference))
    compare(ours, same, exact, (x, weight, residual), NORM_KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_where_hugging_face_rounds(dtype):
    """Normalised value rounded first, then multiplied: bitwise, apart from the last bit of the root."""
    x, weight = (torch.randn(64, 128) * 3).to(dtype), torch.randn(128).to(dtype)
    ours, theirs = kernels.rms_norm(x, weight, 1e-6), NORM.reference(x, weight, 1e-6)
    assert (ours != theirs).float().mean() < (0.5 if dtype == torch.float32 else 0.002)


def test_rms_norm_extreme_rows():
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e4), torch.full((64,), 1e-5)])
    out = kernels.rms_norm(x, torch.ones(64), 1e-6)
    torch.testing.assert_close(out, NORM.reference(x, torch.ones(64), 1e-6))


def test_rms_norm_trains_its_weight_alone_and_frozen():
    x, weight = torch.randn(5, 16), torch.randn(16, requires_grad=True)
    kernels.rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad.abs().min() > 0
    x.requires_grad_()
    kernels.rms_norm(x, weight.detach(), 1e-6).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(2, 1, 64), (7, 2, 64), (9, 1, 128)])
def test_rope(heads, kv_heads, dim, dtype):
    tokens = 19
    angle = torch.arange(tokens)[:, None] * 10000 ** (-torch.arange(dim // 2) / (dim // 2))
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    launched = ["_rope_kernel", "_rope_backward_kernel"]
    angles = [(cos, sin), (cos, sin), (cos.double(), sin.double())]
    ours, same, exact = (
        lambda qkv, *norms, f=f, angle=a: f(qkv, heads, *angle, (*norms, 1e-6) if norms else None)
        for f, a in zip((kernels.rope, ROPE.reference, ROPE.reference), angles, strict=True)
    )
    for norms in ((), torch.randn(2, dim).to(dtype)):
        compare(ours, same, exact, (qkv, *norms), launched)


def test_rope_into_the_cache():
    tokens, slot = 19, torch.randperm(40)[:19]
    cos, sin = torch.randn(2, tokens, 32).repeat(1, 1, 2)
    qkv, arenas = torch.randn(tokens, 8 * 64), torch.full((2, 40, 2, 64), torch.nan)
    expected = kernels.rope(qkv, 4, cos, sin)
    assert torch.equal(kernels.rope(qkv, 4, cos, sin, cache=(slot, *arenas)), expected[0])
    assert all(torch.equal(arena[slot], x) for arena, x in zip(arenas, expected[1:], strict=True))
    assert arenas.isnan().sum() == 2 * 21 * 2 * 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (5, 1000)])
def test_swiglu(shape, dtype):
    both = torch.cat((torch.randn(shape) * 4, torch.randn(shape)), dim=-1).to(dtype)
    kernels_run = ["_swiglu_forward_kernel", "_swiglu_backward_kernel"]
    compare(kernels.swiglu, SWIGLU.reference, SWIGLU.reference, (both,), kernels_run)


def test_swiglu_where_exp_overflows():
    both = torch.tensor([-200.0, -88.0, 0.0, 88.0, 200.0, *[1.0] * 5], requires_grad=True)
    out = kernels.swiglu(both)
    out.sum().backward()
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 88.0, 200.0]), rtol=0, atol=1e-30)
    torch.testing.assert_close(both.grad[:5], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), rtol=0, atol=1e-30)


def test_views_are_read_as_what_they_are():
    both = torch.randn(6, 32)
    assert torch.equal(kernels.swiglu(both[:, :16]), kernels.swiglu(both[:, :16].contiguous()))
    normed, expected = (kernels.rms_norm(x, torch.ones(6), 1e-6) for x in (both.T, both.T.contiguous()))
    assert torch.equal(normed, expected)


def test_gradcheck_in_fp64():
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    cos, sin = torch.randn(2, 5, 32, dtype=torch.float64).repeat(1, 1, 2)
    check = lambda f, *inputs: torch.autograd.gradcheck(f, inputs, fast_mode=True)  # noqa: E731
    assert check(lambda x, w: kernels.rms_norm(x, w, 1e-6), random(5, 7), random(7))
    assert check(lambda x, w, r: kernels.rms_norm(x, w, 1e-6, r), random(5, 7), random(7), random(5, 7))
    joint = lambda qkv, *w: kernels.rope(qkv, 3, cos, sin, (*w, 1e-6) if w else None)  # noqa: E731
    assert check(joint, random(5, 320)) and check(joint, random(5, 320), random(64), random(64))
    assert check(kernels.swiglu, random(5, 14))


def test_what_no_kernel_supports_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="9000 exceeds 8192"):
        kernels.rms_norm(torch.ones(1, 9000), torch.ones(9000), 1e-6)
    with pytest.raises(ValueError, match="head dim 96"):
        kernels.rope(torch.ones(1, 288), 1, torch.ones(1, 96), torch.ones(1, 96))
    with pytest.raises(ValueError, match="head dim 32"):
        kernels.attention(*[torch.ones(2, 1, 32)] * 3, torch.tensor([0, 2], dtype=torch.int32), 2)
    with pytest.raises(ValueError, match="int32"):
        kernels.swiglu(torch.ones(2, dtype=torch.int32))
    assert kernels.backend() == "triton-interpreter"


def test_every_launch_is_counted_once():
    before = dispatch.LAUNCHES["_swiglu_forward_kernel"]
    kernels.swiglu(torch.ones(2))
    assert dispatch.LAUNCHES["_swiglu_forward_kernel"] == before + 1
