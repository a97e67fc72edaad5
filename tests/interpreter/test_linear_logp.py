"""linear_logp: the fused head."""

import sys

import pytest
import torch
import torch.nn.functional as F
from interpreter.compare import DTYPES, compare

import kernels
from kernels import dispatch

HEAD = sys.modules["kernels.linear_logp"]
FORWARD = ["_score_kernel", "_combine_kernel"]
ALL = [*FORWARD, "_dlogits_kernel"]


def problem(tokens, width, vocab, dtype=torch.float32, scale=1.0):
    x = torch.randn(tokens, width).to(dtype)
    w = (torch.randn(vocab, width) * scale / width**0.5).to(dtype)
    return x, w, torch.randint(vocab, (tokens,))


def naive(y, temperature):
    """Logits in the inputs' dtype, as a plain model has them."""

    def function(x, w):
        logp = (x @ w.T / temperature).log_softmax(-1)
        keep = y != -100
        return logp.gather(1, y.clamp_min(0)[:, None]).squeeze(1) * keep, -(logp.exp() * logp).sum(1) * keep

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 32), (5, 7, 37), (21, 40, 130)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(shape, dtype, temperature):
    x, w, y = problem(*shape, dtype)
    y[0], y[-1] = 0, shape[2] - 1  # first and last word
    if len(y) > 2:
        y[2] = -100
    compare(
        lambda x, w: kernels.linear_logp(x, w, y, temperature),
        naive(y, temperature),
        naive(y, temperature),
        (x, w),
        ALL,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["peaky", "negative", "huge", "equal"])
def test_hard_logits_keep_fp32_precision(kind, dtype):
    x, w, y = problem(6, 64, 70, dtype)
    if kind == "peaky":
        w[y] = x  # the target's logit stands far above the rest
    if kind == "negative":
        x, w = x.abs(), -100 * w.abs()  # a padded word's 0 would stand far above all words
    if kind == "huge":
        x = x * 1000
    if kind == "equal":
        w[:] = w[0]
    logp, entropy = kernels.linear_logp(x, w, y)
    z = x.double() @ w.double().T
    exact = z.log_softmax(-1)
    scale = z.abs().max().clamp_min(1)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp - exact.gather(1, y[:, None]).squeeze(1)).abs().max() <= 2e-7 * scale
    assert (entropy + (exact.exp() * exact).sum(1)).abs().max() <= 2e-7 * scale * (kind in ("huge", "negative")) + 5e-6
    assert logp.max() <= 1e-6 and entropy.min() >= -1e-6 and entropy.max() <= torch.tensor(70.0).log() + 1e-5


def test_blocks_of_tokens_in_groups_change_no_bit_and_narrow_logits_little(monkeypatch):
    """Settings that bench.kernels knows as candidates: five blocks of tokens in groups of two, three splits."""
    x, w, y = problem(70, 16, 130, torch.bfloat16)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        logp, entropy = kernels.linear_logp(*leaves, y)
        (logp.sum() + entropy.sum()).backward()
        return [logp.detach(), entropy.detach(), *(t.grad for t in leaves)]

    before = run()
    monkeypatch.setattr(HEAD, "GROUP", 2)
    assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))
    monkeypatch.setattr(HEAD, "NARROW", True)
    narrow = run()
    assert torch.equal(narrow[0], before[0]) and not torch.equal(narrow[2], before[2])
    for a, b in zip(narrow[2:], before[2:], strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_ignored_rows_are_zero_with_zero_gradients():
    x, w, y = problem(9, 16, 40)
    y[::2] = -100
    x.requires_grad_(), w.requires_grad_()
    logp, entropy = kernels.linear_logp(x, w, y)
    (logp.sum() + entropy.sum()).backward()
    assert (logp[::2] == 0).all() and (entropy[::2] == 0).all() and (x.grad[::2] == 0).all()
    alone = x.detach()[1::2].clone().requires_grad_()
    w_alone = w.detach().clone().requires_grad_()
    sum(t.sum() for t in kernels.linear_logp(alone, w_alone, y[1::2])).backward()
    assert torch.equal(x.grad[1::2], alone.grad) and torch.equal(w.grad, w_alone.grad)


def test_everything_ignored_gives_zero_gradients_not_none():
    x, w, _ = problem(4, 16, 40)
    x.requires_grad_(), w.requires_grad_()
    logp, entropy = kernels.linear_logp(x, w, torch.full((4,), -7), ignore_index=-7)
    (logp.sum() + entropy.sum()).backward()
    assert (logp == 0).all() and (x.grad == 0).all() and (w.grad == 0).all()


def test_frozen_head_computes_no_dw(monkeypatch):
    x, w, y = problem(5, 16, 40)
    products = []
    product = HEAD._product
    monkeypatch.setattr(HEAD, "_product", lambda a, b: products.append((a.shape, b.shape)) or product(a, b))
    x.requires_grad_()
    kernels.linear_logp(x, w, y)[0].sum().backward()
    assert products == [((5, 16), (16, 40))] and w.grad is None


def test_chunks_add_up(monkeypatch):
    x, w, y = problem(11, 16, 40)
    whole = gradients(x, w, y)
    monkeypatch.setattr(HEAD, "CHUNK", 4)
    monkeypatch.setattr(HEAD, "CHUNK_LOGITS", 1)
    for a, b in zip(whole, gradients(x, w, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def gradients(x, w, y):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    logp, entropy = kernels.linear_logp(x, w, y)
    (logp.sum() + 0.3 * entropy.sum()).backward()
    return x.grad, w.grad


def test_gradients_of_a_row_sum_to_nothing():
    """Probabilities always sum to one: no upstream gradient can move all logits of a row together."""
    x, w, y = problem(6, 16, 40)
    _, entropy, lse = HEAD.launch_score(x, w, y, 0.7)
    dz = HEAD.launch_dlogits(x @ w.T, torch.float32, y, lse, entropy, torch.randn(6), torch.randn(6), 0.7)
    assert dz.sum(1).abs().max() < 2e-6 and dz.abs().max() > 0.1


def test_a_row_does_not_depend_on_its_batch_nor_on_the_run():
    x, w, y = problem(19, 24, 100)
    together = kernels.linear_logp(x, w, y)
    again = kernels.linear_logp(x, w, y)
    alone = kernels.linear_logp(x[17:18], w, y[17:18])
    for a, b, c in zip(together, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[17:18], c)


def test_a_target_outside_the_vocabulary_is_loud():
    x, w, _ = problem(2, 16, 40)
    assert kernels.linear_logp(x, w, torch.tensor([40, 3]))[0].isnan().tolist() == [True, False]


def test_scoring_has_no_logits_in_memory(monkeypatch):
    x, w, y = problem(64, 16, 512)
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append((t := empty(*a, **k)).numel()) or t)
    with torch.no_grad():
        kernels.linear_logp(x, w, y)
    assert max(sizes) <= 3 * 64 * 512 // 64  # three numbers a token and split of 64 words


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_descriptor_path_gives_the_same(monkeypatch, dtype):
    """Hopper's loads, with Hopper's tiles: 128 x 128 x 64, 8 tiles a program, ragged at every end."""
    x, w, y = problem(20, 80, 1100, dtype)
    expected = kernels.linear_logp(x, w, y)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    tile = HEAD._score_tile("sm_90", torch.bfloat16)
    monkeypatch.setattr(HEAD, "_score_tile", lambda arch, dtype: tile)
    assert tile["DESCRIPTORS"]
    for a, b in zip(kernels.linear_logp(x, w, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=5e-6)


def test_gradcheck_in_fp64():
    x, w, y = (t.double() if t.is_floating_point() else t for t in problem(5, 7, 37))
    y[1] = -100
    x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: kernels.linear_logp(x, w, y, 0.7), (x, w), fast_mode=True)


@pytest.mark.parametrize("needs", [(True, True), (True, False)])
def test_opcheck(needs):
    x, w, y = problem(5, 16, 40)
    x.requires_grad_(needs[0]), w.requires_grad_(needs[1])
    torch.library.opcheck(HEAD._op, (x, w, y, 0.7, -100))


def test_sft_loss_equals_cross_entropy():
    x, w, y = problem(7, 16, 40)
    y[3] = -100
    loss = -kernels.linear_logp(x, w, y)[0].sum() / (y != -100).sum()
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, y))
