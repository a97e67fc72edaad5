"""The forward pass against Transformers: every family, packed rows, a cache behind `attend`, recomputed activations."""

import functools

import pytest
import torch
import torch.nn.functional as F

import model
from tests import tiny_models as tiny

both = functools.cache(tiny.pair)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family, tied):
    theirs, ours = both(family, tied)
    ids_T, cu_seqlens = tiny.row(200)  # past the 96 positions at which llama3's scaling begins to matter
    expected, got = theirs(ids_T[None]).logits[0], ours.logits(ids_T, cu_seqlens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    F.cross_entropy(expected[:-1], ids_T[1:]).backward()
    F.cross_entropy(got[:-1], ids_T[1:]).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    theirs.zero_grad(), ours.zero_grad()


@pytest.mark.parametrize("family", ["llama", "llama3", "llama-linear", "qwen3"])
def test_rope_frequencies_are_those_of_transformers_and_stay_fp32_in_a_cast(family):
    theirs, ours = both(family)
    assert torch.equal(ours.rope, theirs.model.rotary_emb.inv_freq)
    cast = model.Transformer(ours.config)
    for dtype in (torch.bfloat16, torch.float32):
        assert cast.to(dtype).head_weight.dtype == dtype and torch.equal(cast.rope, ours.rope)
    if family == "llama3":  # every branch is in use: kept, blended, divided
        ratio = ours.rope * 500.0 ** (torch.arange(8) / 8)
        assert ratio[0] == 1 and 1 / 7 < ratio[2] < 1 and ratio[-1] == pytest.approx(1 / 7)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3", "mistral"])
def test_packed_documents_are_what_transformers_makes_of_each_alone(family):
    theirs, ours = both(family)
    lengths = [1, 2, 63, 64, 65, 1, 120]
    ids_T, cu_seqlens = tiny.row(*lengths)
    with torch.no_grad():
        packed = ours.logits(ids_T, cu_seqlens).split(lengths)
        for logits_TV, document_T in zip(packed, ids_T.split(lengths), strict=True):
            torch.testing.assert_close(logits_TV, theirs(document_T[None]).logits[0], atol=1e-5, rtol=0)


def test_no_gradient_reaches_another_document_or_a_later_token():
    _, ours = both("qwen3")
    ids_T, cu_seqlens = tiny.row(3, 10, 5)
    embedded = []
    hook = ours.model.embed_tokens.register_forward_hook(lambda _, __, out: embedded.append(out))
    hidden_TH = ours(ids_T, cu_seqlens)
    hook.remove()
    (gradient_TH,) = torch.autograd.grad(hidden_TH[9].sum(), embedded)  # position 6 of the second document
    reached = gradient_TH.abs().sum(1).nonzero().flatten().tolist()
    assert reached == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_a_product_of_few_rows_is_that_of_many(rows):
    x_TI, weight_OI, bias_O = torch.randn(rows, 48), torch.randn(80, 48), torch.randn(80)
    for bias in (None, bias_O):
        y_TO = model.linear(x_TI, weight_OI, bias)
        assert y_TO.is_contiguous()
        torch.testing.assert_close(y_TO, F.linear(x_TI, weight_OI, bias), atol=1e-5, rtol=1e-5)


def test_positions_restart_in_every_document():
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32)  # the second document is empty
    assert model.packed_positions(cu_seqlens, 5).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_activations_give_the_same_gradients_and_keep_less(lora):
    _, ours = tiny.pair("qwen3")
    trained = model.add_lora(ours, 4, 8) if lora else list(ours.model.parameters())
    for parameter in trained[1::2] if lora else ():
        parameter.data.normal_(0, 0.1)
    ids_T, cu_seqlens = tiny.row(20, 44)
    gradients, kept = [], []
    for recompute in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):  # noqa: B023
            loss = ours(ids_T, cu_seqlens, checkpoint=recompute).square().sum()
        kept.append(sum(saved))
        gradients.append(torch.autograd.grad(loss, trained))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("recompute", [False, True])
def test_wanted_rows_are_those_of_the_whole_forward_and_the_last_layer_computes_no_others(recompute):
    _, ours = tiny.pair("qwen3")
    ids_T, cu_seqlens = tiny.row(20, 44)
    rows_N, seen = torch.tensor([0, 7, 19, 20, 63]), []
    for layer in ours.model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    whole_NH = ours(ids_T, cu_seqlens)[rows_N]
    wanted_NH = ours(ids_T, cu_seqlens, rows_N=rows_N, checkpoint=recompute)
    assert seen == [64] * len(ours.model.layers) + [64] * (len(ours.model.layers) - 1) + [5]
    torch.testing.assert_close(wanted_NH, whole_NH, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(h.square().sum(), list(ours.model.parameters())) for h in (whole_NH, wanted_NH)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_bf16_model_stays_near_the_fp32_one():
    theirs, ours = tiny.pair("qwen3")
    ids_T, cu_seqlens = tiny.row(64)
    with torch.no_grad():
        exact = ours.logits(ids_T, cu_seqlens)
        got, hidden_TH = ours.to(torch.bfloat16).logits(ids_T, cu_seqlens), ours(ids_T, cu_seqlens)
        peer = theirs.to(torch.bfloat16)(ids_T[None]).logits[0].float()
    assert hidden_TH.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert (got - exact).square().mean() <= 1.2 * (peer - exact).square().mean()  # no worse than Transformers' bf16
