"""Packed attention and paged decode attention."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interpreter.compare import DTYPES, compare, run

import kernels
from kernels import dispatch
from tests.kernel_cases import in_fp64, masked, one_by_one, packed, paged

ATTENTION, DECODE = sys.modules["kernels.attention"], sys.modules["kernels.decode_attention"]
ALL = [f"_attention_{name}_kernel" for name in ("forward", "delta", "dkdv", "dq")]


def check(lengths, heads, kv_heads, dim, dtype, scale=1.0):
    inputs, cu_seqlens = packed(lengths, heads, kv_heads, dim, dtype)
    inputs[0] *= scale
    q, k = (t.double().flatten(0, 1) for t in inputs[:2])
    exponent = (q @ k.T).abs().max() / dim**0.5 * math.log2(math.e)
    ours, plain = lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, max(lengths)), masked(cu_seqlens)
    compare(ours, plain, plain, inputs, ALL, exponent)


@pytest.mark.parametrize("lengths", [[1], [7], [0, 5, 0, 9], [1, 33, 64, 7], [70, 3]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_document_lengths(lengths, dtype):
    check(lengths, 2, 1, 64, dtype)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1), (6, 1), (7, 1), (8, 1)])
def test_groups_one_to_eight(heads, kv_heads):
    check([5, 36], heads, kv_heads, 64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dim_128(dtype):
    check([9, 40], 2, 1, 128, dtype)


def test_large_scores():
    check([40, 9], 2, 1, 64, torch.float32, scale=30)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[256], [130, 126], [1, 63, 64, 65, 7], [100, 37, 119]])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (7, 1, 128), (10, 2, 64)])
def test_longer_documents(lengths, heads, kv_heads, dim, dtype):
    check(lengths, heads, kv_heads, dim, dtype)


def values_and_gradients(inputs, cu_seqlens, g_o):
    longest = int(cu_seqlens.diff().max())
    (o,), gradients = run(lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, longest), inputs, [g_o])
    return o, *gradients


def test_a_document_is_the_same_bits_packed_and_alone():
    inputs, cu_seqlens = packed([33, 1, 70], 2, 1, 64)
    g_o = torch.randn_like(inputs[0])
    together = values_and_gradients(inputs, cu_seqlens, g_o)
    assert all(torch.equal(a, b) for a, b in zip(together, values_and_gradients(inputs, cu_seqlens, g_o), strict=True))
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        only = torch.tensor([0, end - begin], dtype=torch.int32)
        alone = values_and_gradients([t[begin:end] for t in inputs], only, g_o[begin:end])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[begin:end], b)


def check_for_leaks(dim=64, dtype=torch.float32):
    """A neighbour full of NaN changes nothing, forward or backward, pointers or descriptors."""
    (q, k, v), cu_seqlens = packed([20, 30, 10], 2, 1, dim, dtype)
    g_o = torch.randn_like(q)
    clean = values_and_gradients((q, k, v), cu_seqlens, g_o)
    for t in (q, k, v, g_o):
        t[:20], t[50:] = torch.nan, torch.nan
    for a, b in zip(clean, values_and_gradients((q, k, v), cu_seqlens, g_o), strict=True):
        assert torch.equal(a[20:50], b[20:50])


def test_nothing_leaks_between_documents():
    check_for_leaks()


def use_tiles(monkeypatch, arch, chosen_for):
    """The tiles that a GPU gets, whatever they are and whatever dtype runs here."""
    tile = ATTENTION._tile
    monkeypatch.setattr(dispatch, "architecture", lambda device: arch)
    monkeypatch.setattr(ATTENTION, "_tile", lambda arch, kernel, _, dim: tile(arch, kernel, chosen_for, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_tiles_and_descriptors(monkeypatch, dtype, dim):
    use_tiles(monkeypatch, "sm_90", torch.bfloat16)
    assert ATTENTION._tile("sm_90", "forward", None, dim)["DESCRIPTORS"]
    check([9, 150, 20], 2, 1, dim, dtype)
    check_for_leaks(dim, dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("arch", "chosen_for", "longest"),
    [("sm_80", torch.bfloat16, 150), ("sm_80", torch.float32, 50), ("sm_89", torch.bfloat16, 150)],
)
def test_ampere_tiles(monkeypatch, arch, chosen_for, longest, dim):
    use_tiles(monkeypatch, arch, chosen_for)
    check([9, longest], 2, 1, dim, torch.float32)


def test_gradcheck_in_fp64():
    inputs, cu_seqlens = packed([3, 0, 5], 2, 1, 64, torch.float64)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *i: kernels.attention(*i, cu_seqlens, 5), inputs, fast_mode=True)


def test_views_and_no_tokens_at_all():
    qkv = torch.randn(12, 4, 64)
    cu_seqlens = torch.tensor([0, 12], dtype=torch.int32)
    parts = [qkv[:, :2], qkv[:, 2:3], qkv[:, 3:]]
    whole = kernels.attention(*parts, cu_seqlens, 12)
    assert torch.equal(whole, kernels.attention(*(t.contiguous() for t in parts), cu_seqlens, 12))
    none = [t[:0].clone().requires_grad_() for t in parts]
    kernels.attention(*none, torch.zeros(2, dtype=torch.int32), 0).sum().backward()
    assert none[0].grad.shape == (0, 2, 64)


def test_the_tasks_cover_every_position_once():
    cu_seqlens = torch.tensor([0, 0, 5, 5, 70, 71], dtype=torch.int32)
    for last_first in (True, False):
        document, first = ATTENTION._tasks(cu_seqlens, 71, 16, last_first)
        tasks = [(d, f) for d, f in zip(document.tolist(), first.tolist(), strict=True) if f < cu_seqlens.diff()[d]]
        assert sorted(tasks) == [(1, 0), (3, 0), (3, 16), (3, 32), (3, 48), (3, 64), (4, 0)]
        assert [f for d, f in tasks if d == 3] == sorted([0, 16, 32, 48, 64], reverse=last_first)


# ------------------------------------------------------------------------------------------------------------- decode
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (5, 1, 64), (7, 1, 128), (8, 1, 64), (2, 2, 128)])
def test_decode(heads, kv_heads, dim, dtype):
    inputs = paged([0, 1, 64, 65, 257, 300], heads, kv_heads, dim, dtype)
    before = dispatch.LAUNCHES.copy()
    ours, theirs = kernels.decode_attention(*inputs), one_by_one(*inputs)
    assert dispatch.LAUNCHES["_decode_kernel"] > before["_decode_kernel"]
    exact = one_by_one(*in_fp64(inputs))
    allowed = 1.5 * (theirs - exact).abs().max() + 3e-6 * exact.abs().max()
    assert ours.isfinite().all() and (ours[0] == 0).all()
    assert (ours - exact).abs().max() <= allowed


def test_decode_row_does_not_depend_on_its_batch():
    q, k, v, table, lengths = paged([3, 300, 90], 4, 2, 64, pages=7)
    together = kernels.decode_attention(q, k, v, table, lengths)
    for b in range(3):
        alone = kernels.decode_attention(q[b : b + 1], k, v, table[b : b + 1, :5].contiguous(), lengths[b : b + 1])
        assert torch.equal(together[b : b + 1], alone)


@pytest.mark.parametrize("heaviest", [0, 4, 9])
def test_decode_combines_parts_of_any_weight(heaviest):
    """The largest score in the first, second or last of three parts of 256 tokens."""
    q, k, v, table, lengths = paged([600], 4, 2, 64)
    k[table[0, heaviest], :20] *= 8
    ours, theirs = kernels.decode_attention(q, k, v, table, lengths), one_by_one(q, k, v, table, lengths)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_decode_agrees_with_the_packed_row():
    (q, k, v), cu_seqlens = packed([130], 4, 2, 64)
    whole = kernels.attention(q, k, v, cu_seqlens, 130)
    arenas = [F.pad(t, (0, 0, 0, 0, 0, 62)).view(3, 64, 2, 64) for t in (k, v)]
    table = torch.arange(3, dtype=torch.int32)[None].expand(3, 3)
    lengths = torch.tensor([1, 64, 130], dtype=torch.int32)
    step = kernels.decode_attention(q[lengths.long() - 1], *arenas, table, lengths)
    torch.testing.assert_close(step, whole[lengths.long() - 1], rtol=1e-6, atol=1e-6)


def test_decode_never_asks_the_host(monkeypatch):
    """What can be captured in a CUDA graph: no length is read back, the grid comes from shapes alone."""
    inputs = paged([3, 70], 4, 2, 64)
    grids = []
    monkeypatch.setattr(dispatch, "launch", lambda kernel, programs, *args, **meta: grids.append(programs))
    for name in ("item", "tolist", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    DECODE.launch(*inputs)
    assert grids == [2 * 2 * 1, 2 * 4]


# ------------------------------------------------------------------------------------ more than 2^31 elements
@pytest.fixture
def sparse(tmp_path):
    """fp16 tensors of any size in files that take no room."""

    def make(name, *shape):
        return torch.from_numpy(np.memmap(tmp_path / name, dtype=np.float16, mode="w+", shape=shape))

    return make


def test_decode_reads_pages_behind_two_to_the_31(sparse):
    pages = 2**31 // (64 * 64) + 2
    k, v = sparse("k", pages, 64, 1, 64), sparse("v", pages, 64, 1, 64)
    q, k_page, v_page = (torch.randn(shape).half() for shape in ((2, 64), (64, 1, 64), (64, 1, 64)))
    k[-1], v[-1] = k_page, v_page
    table, lengths = torch.tensor([[pages - 1]], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    far = kernels.decode_attention(q[None], k, v, table, lengths)
    near = kernels.decode_attention(q[None], k_page[None], v_page[None], torch.zeros_like(table), lengths)
    assert torch.equal(far, near) and far.abs().max() > 0


def test_attention_reads_tokens_behind_two_to_the_31(sparse):
    start, n = 2**31 // 64 + 3, 9
    far = [sparse(name, start + n, 1, 64) for name in "qkvo"]
    near = [torch.randn(n, 1, 64).half() for _ in range(3)]
    for big, small in zip(far, near, strict=False):
        big[start:] = small
    lse = torch.empty(1, start + n)
    zero = torch.zeros(1, dtype=torch.int32)
    cu_seqlens = torch.tensor([start, start + n], dtype=torch.int32)
    tile, meta = ATTENTION._prepare(*near, "forward")
    dispatch.launch(
        ATTENTION._attention_forward_kernel, 1, *far, lse, cu_seqlens, zero, zero, start + n, 1, 1, **tile, **meta
    )
    expected = kernels.attention(*near, torch.tensor([0, n], dtype=torch.int32), n)
    assert torch.equal(far[3][start:], expected)
