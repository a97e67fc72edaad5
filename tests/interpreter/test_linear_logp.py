"""linear_logp: the fused head."""

import sys

import pytest
import torch
from interpreter.compare import DTYPES, compare, run

import kernels
from kernels import dispatch
from tests.kernel_cases import head

HEAD = sys.modules["kernels.linear_logp"]
ALL = ["_score_kernel", "_combine_kernel", "_dlogits_kernel"]


def problem(tokens, width, vocab, dtype=torch.float32, scale=1.0):
    x = torch.randn(tokens, width).to(dtype)
    w = (torch.randn(vocab, width) * scale / width**0.5).to(dtype)
    return x, w, torch.randint(vocab, (tokens,))


def learn(x, w, y, ignore_index=-100):
    """[log-probs, entropies, dx, dw] of the sum of both outputs."""
    function = lambda x, w: kernels.linear_logp(x, w, y, ignore_index=ignore_index)  # noqa: E731
    values, gradients = run(function, (x, w), torch.ones(2, len(y)))
    return [*values, *gradients]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 32), (5, 7, 37), (21, 40, 130)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(shape, dtype, temperature):
    x, w, y = problem(*shape, dtype)
    y[0], y[-1] = 0, shape[2] - 1  # first and last word
    if len(y) > 2:
        y[2] = -100
    plain = head(y, temperature)
    compare(lambda x, w: kernels.linear_logp(x, w, y, temperature), plain, plain, (x, w), ALL)


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
    before = learn(x, w, y)
    monkeypatch.setattr(HEAD, "GROUP", 2)
    assert all(torch.equal(a, b) for a, b in zip(learn(x, w, y), before, strict=True))
    monkeypatch.setattr(HEAD, "NARROW", True)
    narrow = learn(x, w, y)
    assert torch.equal(narrow[0], before[0]) and not torch.equal(narrow[2], before[2])
    for a, b in zip(narrow[2:], before[2:], strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_ignored_rows_are_zero_with_zero_gradients_and_change_no_bit_of_others():
    x, w, y = problem(9, 16, 40)
    y[::2] = -100
    logp, entropy, dx, dw = learn(x, w, y)
    assert not (logp[::2].any() or entropy[::2].any() or dx[::2].any())
    *_, dx_alone, dw_alone = learn(x[1::2], w, y[1::2])
    assert torch.equal(dx[1::2], dx_alone) and torch.equal(dw, dw_alone)
    assert not any(t.any() for t in learn(x, w, torch.full((9,), -7), ignore_index=-7))


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
    whole = learn(x, w, y)
    monkeypatch.setattr(HEAD, "CHUNK", 4)
    monkeypatch.setattr(HEAD, "CHUNK_LOGITS", 1)
    torch.testing.assert_close(learn(x, w, y), whole, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_row_sum_to_nothing():
    """Probabilities always sum to one: no upstream gradient can move all logits of a row together."""
    x, w, y = problem(6, 16, 40)
    _, entropy, lse = HEAD.launch_score(x, w, y, 0.7)
    dz = HEAD.launch_dlogits(x @ w.T, torch.float32, y, lse, entropy, torch.randn(6), torch.randn(6), 0.7)
    assert dz.sum(1).abs().max() < 2e-6 and dz.abs().max() > 0.1


def test_a_row_does_not_depend_on_its_batch_nor_on_the_run():
    x, w, y = problem(19, 24, 100)
    together, again = (kernels.linear_logp(x, w, y) for _ in range(2))
    for a, b, c in zip(together, again, kernels.linear_logp(x[17:18], w, y[17:18]), strict=True):
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
