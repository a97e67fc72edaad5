"""The draw at the end of a decode step, against the reference and against the sorted definition of a nucleus."""

import math
import sys

import pytest
import torch

import engine
import kernels
from kernels import dispatch

SAMPLE = sys.modules["kernels.sample"]


def drawn(logits_BV, mode, temperature=1.0, top_p=1.0, key=5, name=None, ends=(), limit=9):
    """(state after one step, the logits as the step left them) of implementation `name`."""
    count = len(logits_BV)
    state = engine.State(count, 1, 4, ends, "cpu")
    state.step += 2
    state.knobs.temperature.fill_(temperature), state.knobs.top_p.fill_(top_p)
    for which, values in (("key", torch.arange(count) * 77 + key), ("count", torch.arange(count) % 7)):
        state.rows[which].copy_(values)
    state.rows["limit"].fill_(limit)
    state.rows["live"].copy_(torch.arange(count) % 5 != 4)
    z_BV = logits_BV.clone()
    kernels.force(name)
    try:
        kernels.sample(z_BV, state.first(count), state.step, state.eos_E, state.knobs, mode)
    finally:
        kernels.force(None)
    return state, z_BV


@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 300, 1000])
@pytest.mark.parametrize("mode", ["sample", "greedy", "top_p"])
def test_tokens_logprobs_and_record_are_those_of_the_reference(vocab, mode):
    logits_BV = torch.randn(6, vocab) * 4
    logits_BV[:, ::3] = -torch.inf if vocab > 1 else 0.0
    logits_BV[3:5] += 80
    before = dispatch.LAUNCHES.copy()
    settings = {"temperature": 1.0 if mode == "greedy" else 0.7, "top_p": 0.8, "ends": (1, 4), "limit": 6}
    ours, theirs = (drawn(logits_BV, mode, name=name, **settings)[0] for name in (None, "reference"))
    assert (dispatch.LAUNCHES - before).total() == (3 if mode == "top_p" else 2)
    torch.testing.assert_close(ours.rows.pop("logp"), theirs.rows.pop("logp"), rtol=0, atol=2e-5)
    assert all(torch.equal(ours.rows[name], theirs.rows[name]) for name in theirs.rows)
    assert vocab == 1 or ours.rows["ids"][:, 2].any() and not ours.rows["ids"][:, [0, 1, 3]].any()


def test_a_row_does_not_depend_on_its_batch_nor_the_draw_on_the_chunk(monkeypatch):
    logits_BV = torch.randn(3, 300) * 3
    whole, _ = drawn(logits_BV, "top_p", top_p=0.9)
    alone, _ = drawn(logits_BV[:1], "top_p", top_p=0.9)
    assert all(torch.equal(alone.rows[name], buffer[:1]) for name, buffer in whole.rows.items())
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    one_chunk, _ = drawn(logits_BV, "top_p", top_p=0.9)
    assert torch.equal(one_chunk.rows["ids"], whole.rows["ids"])


@pytest.mark.parametrize(
    ("p", "different"),
    [([0.0, 0.5, 0.0, 0.25, 0.2, 0.05] + [0.0] * 140 + [1e-9, 0.0], 4), ([0.5] + [0.0] * 127 + [2**-8] * 128, 15)],
)
def test_a_draw_is_the_place_of_its_uniform_number_and_no_impossible_token(p, different):
    """The second half of the other distribution lies in a chunk whose weights count against a smaller power of two."""
    p_V = torch.tensor(p).double()
    state, _ = drawn(p_V.log().float().expand(40, -1), "sample")
    u_B = SAMPLE.uniform(state.rows["key"], torch.arange(40) % 7)
    want_B = torch.searchsorted(p_V.cumsum(0) / p_V.sum(), u_B, right=True)
    assert torch.equal(state.rows["token"], want_B) and len(want_B.unique()) >= different


@pytest.mark.parametrize("name", [None, "reference"])
def test_the_smallest_random_number_draws_the_first_possible_token(name):
    """With this key the random word is 0; the first chunk and a half of the vocabulary are impossible."""
    logits_BV = torch.full((1, 300), -torch.inf)
    logits_BV[0, 200:] = torch.randn(100)
    key = int(SAMPLE.mix(torch.tensor(0))) ^ 0x61C8864680B583EB
    assert SAMPLE.uniform(torch.tensor(key), torch.tensor(0)) == 0
    state, _ = drawn(logits_BV, "sample", key=key, name=name)
    assert state.rows["token"].tolist() == [200] and state.rows["logp"][0, 2].isfinite()


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("mode", ["sample", "greedy", "top_p"])
def test_logits_that_give_no_distribution_show_in_the_logprob(mode, value):
    logits_BV = torch.randn(3, 200)
    logits_BV[0, 150], logits_BV[1] = value, -torch.inf
    state, _ = drawn(logits_BV, mode, top_p=0.9)
    assert state.rows["logp"][:, 2].isfinite().tolist() == [False, False, True]
    assert ((state.rows["ids"] >= 0) & (state.rows["ids"] < 200)).all()


def by_definition(z_V, top_p):
    """Which tokens have less than top_p before them, likeliest first, the first of equals before the others."""
    p_V, order_V = z_V.double().softmax(0).sort(descending=True, stable=True)
    kept_V = p_V.cumsum(0) - p_V < top_p
    return torch.zeros_like(kept_V).index_copy_(0, order_V, kept_V)


SHAPES = {
    "random": lambda: torch.randn(777) * 3,
    "flat": lambda: torch.randn(333) * 1e-3,
    "peaked": lambda: torch.randn(500) * 40,
    "tied": lambda: torch.randint(-3, 3, (611,)).float(),
    "zeros of either sign": lambda: torch.tensor([-0.0, 0.0] * 33),
    "impossible": lambda: torch.randn(400).masked_fill(torch.rand(400) < 0.7, -torch.inf),
    "one token": lambda: torch.randn(1),
    "far down": lambda: torch.randn(100) - 1e4,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_p", [0.999, 0.95, 0.3, 1e-3, 1e-6])
def test_the_nucleus_is_the_sorted_one(shape, top_p):
    z_V = SHAPES[shape]()
    top_p = torch.tensor(top_p).item()  # as the device has it
    want_V = by_definition(z_V, top_p)
    assert torch.equal(drawn(z_V[None], "top_p", top_p=top_p)[1][0] > -torch.inf, want_V)
    p_BV = (z_V - z_V.max()).exp()[None]
    SAMPLE.nucleus(p_BV, top_p)
    assert torch.equal(p_BV[0] > 0, want_V)


@pytest.mark.parametrize(
    ("powers", "top_p", "kept"),
    [
        ([-1, 0, -2, -2], 0.5, [1]),
        ([-1, 0, -2, -2], 0.5 + 2**-24, [0, 1]),
        ([-1, 0, -2, -2], 0.75, [0, 1]),
        ([-2, -1, -2, 0], 0.875, [0, 1, 3]),
        ([0] * 8, 0.25, [0, 1]),
        ([0] * 8, 0.25 + 2**-25, [0, 1, 2]),
        ([-9] + [0] * 255 + [-9], 0.5, list(range(1, 129))),
        ([0] + [-7] * 128, 0.5, [0]),
        ([0] + [-7] * 128, 0.75, list(range(65))),
        ([0] + [-7] * 128, 0.75 + 2**-24, list(range(66))),
    ],
)
def test_a_nucleus_that_is_hit_exactly(powers, top_p, kept):
    """Probabilities are exact here: powers of two, at a temperature that makes the kernel's factor 1."""
    z_BV = torch.tensor([powers]).float()
    assert drawn(z_BV, "top_p", math.log2(math.e), top_p)[1][0].isfinite().nonzero().flatten().tolist() == kept
    p_BV = 2**z_BV
    SAMPLE.nucleus(p_BV, top_p)
    assert p_BV[0].nonzero().flatten().tolist() == kept


def test_the_launches_never_ask_the_host(monkeypatch):
    grids = []
    monkeypatch.setattr(dispatch, "launch", lambda kernel, programs, *args, **meta: grids.append(programs))
    for name in ("item", "tolist", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    drawn(torch.randn(3, 200), "top_p")
    assert grids == [3, 3 * 2, 3]
