"""The kernels on a real GPU, alone and in model, sampler, trainer: what neither interpreter nor compiler can show."""

import functools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from interpreter.compare import compare

import engine
import kernels
import model
import trainers
from kernels import dispatch
from tests import tiny_models
from tests.kernel_cases import head, in_fp64, packed, paged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def reference(name):
    return sys.modules[f"kernels.{name}"].reference


def per_document(cu_seqlens):
    """One document at a time, every product and the softmax rounded to the inputs' dtype.

    Not F.scaled_dot_product_attention, which widens 16-bit inputs to fp32 where it has no fused kernel.
    """
    lengths = cu_seqlens.diff().tolist()

    def one(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
        score = q.transpose(0, 1) @ k.mT * q.shape[2] ** -0.5
        return ((score + torch.full_like(score[0], -torch.inf).triu(1)).softmax(-1) @ v).transpose(0, 1)

    def function(q, k, v):
        return torch.cat([one(*d) for d in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)])

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (7, 1, 128), (32, 8, 128), (12, 2, 128)])
def test_attention(heads, kv_heads, dim, dtype):
    inputs, cu_seqlens = packed([700, 1, 63, 0, 64, 65, 1000], heads, kv_heads, dim, dtype, DEVICE)
    plain = per_document(cu_seqlens)
    launched = [f"_attention_{name}_kernel" for name in ("forward", "delta", "dkdv", "dq")]
    slacks = (1.5, 3.0)  # a fused backward takes sum(o g_o) from the rounded o, this yardstick from the probabilities
    compare(lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, 1000), plain, plain, inputs, launched, slacks=slacks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_document_is_the_same_bits_packed_and_alone(dtype):
    """Also with neighbours full of NaN: descriptors read on into them."""
    (q, k, v), cu_seqlens = packed([130, 300, 70], 12, 2, 128, dtype, DEVICE)
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
    inputs, plain = [x.to(dtype), w.to(dtype)], head(y, 0.7)
    launched = ["_score_kernel", "_combine_kernel", "_dlogits_kernel"]
    compare(lambda x, w: kernels.linear_logp(x, w, y, 0.7), plain, plain, inputs, launched)
    for ours, exact in zip(kernels.linear_logp(*inputs, y, 0.7), plain(*in_fp64(inputs)), strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()  # whatever the dtype: logits are never rounded


def test_linear_logp_of_a_trained_head_in_chunks():
    """Several chunks forward and backward; the logits would take 2.4 GB."""
    x = torch.randn(5000, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(120_000, 256, device=DEVICE) / 16).bfloat16().requires_grad_()
    y = torch.randint(120_000, (5000,), device=DEVICE)
    y[::9] = -100
    upstream = torch.randn(2, 5000, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        kernels.linear_logp(x, w, y)
    assert torch.cuda.max_memory_allocated() - before < 2**27
    chunks = dispatch.LAUNCHES["_dlogits_kernel"]
    torch.autograd.backward(kernels.linear_logp(x, w, y), list(upstream))
    assert torch.cuda.max_memory_allocated() - before < 2.25 * 2**30
    assert dispatch.LAUNCHES["_dlogits_kernel"] - chunks > 1
    exact = [t.detach().float().requires_grad_() for t in (x, w)]
    torch.autograd.backward(reference("linear_logp")(*exact, y), list(upstream))
    for ours, truth in zip((x, w), exact, strict=True):
        assert (ours.grad - truth.grad).abs().max() <= 0.02 * truth.grad.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rotation_and_gate(dtype):
    norm, rotate, gate = map(reference, ("rms_norm", "rope", "swiglu"))
    x, weight = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((300, 1536), 1536))
    launched = ["_rms_norm_forward_kernel", "_rms_norm_backward_kernel"]
    compare(*(lambda x, w, f=f: f(x, w, 1e-6) for f in (kernels.rms_norm, norm, norm)), [x, weight], launched)
    launched = ["_swiglu_forward_kernel", "_swiglu_backward_kernel"]
    compare(kernels.swiglu, gate, gate, [x], launched)
    cos, sin = torch.randn(2, 300, 64, device=DEVICE).repeat(1, 1, 2)
    qkv, launched = torch.randn(300, 9 * 128, device=DEVICE).to(dtype), ["_rope_kernel", "_rope_backward_kernel"]
    ours, plain = (lambda x, *w, f=f: f(x, 7, cos, sin, (*w, 1e-6) if w else None) for f in (kernels.rope, rotate))
    for norms in ((), torch.randn(2, 128, device=DEVICE).to(dtype)):
        compare(ours, plain, plain, [qkv, *norms], launched)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float32, 3e-6)])
def test_decode_attention_also_in_a_cuda_graph(dtype, floor):
    """The reference rounds once, at the end; the kernel rounds the probabilities, too: hence the floor."""
    inputs, plain = paged([0, 1, 64, 1000, 257], 14, 2, 128, dtype, DEVICE), reference("decode_attention")
    exact = plain(*in_fp64(inputs))
    eager = kernels.decode_attention(*inputs)
    assert dispatch.LAUNCHES["_decode_kernel"] and eager.isfinite().all() and not eager[0].any()
    assert (eager - exact).abs().max() <= 1.5 * (plain(*inputs) - exact).abs().max() + floor * exact.abs().max()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.decode_attention(*inputs)
    inputs[0].mul_(0.5), inputs[4].sub_(1).clamp_(min=0)  # other queries, other lengths, the same graph
    graph.replay()
    assert torch.equal(captured, kernels.decode_attention(*inputs))
    q, k, v, table, lengths = inputs
    for b in range(5):
        alone = kernels.decode_attention(q[b : b + 1], k, v, table[b : b + 1], lengths[b : b + 1])
        assert torch.equal(captured[b : b + 1], alone)


@pytest.mark.parametrize("mode", ["sample", "greedy", "top_p"])
@pytest.mark.parametrize("vocab", [1000, 151_936])
def test_sample_also_in_a_cuda_graph(vocab, mode):
    """The tokens of the reference, but for a number that falls between two roundings; then the graph's are the same."""
    logits, found = torch.randn(64, vocab, device=DEVICE) * 4, []

    def step(state, z):
        kernels.sample(z, state.first(64), state.step, state.eos_E, state.knobs, mode)

    for name in ("reference", "triton", "graph"):
        state, z = engine.State(64, 1, 2, {7}, DEVICE), logits.clone()
        state.rows["key"].copy_(torch.arange(64) * 99), state.rows["limit"].fill_(9)
        state.knobs.temperature.fill_(1.0 if mode == "greedy" else 0.7), state.knobs.top_p.fill_(0.9)
        if name == "graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(state, z)
        state.rows["live"].fill_(True)
        kernels.force("reference" if name == "reference" else None)
        graph.replay() if name == "graph" else step(state, z)
        kernels.force(None)
        found.append(state.rows | {"kept": z.isfinite().sum(1)})
    reference, eager, graphed = found
    assert all(torch.equal(eager[name], graphed[name]) for name in eager)
    same = eager["ids"][:, 0] == reference["ids"][:, 0]
    assert same.float().mean() > 0.95 and (eager["count"] == 1).all()
    assert (eager["logp"] - reference["logp"])[same, 0].abs().max() < 2e-5
    if mode == "top_p":
        p = (logits / 0.7).double().softmax(1).sort(descending=True).values
        assert ((p.cumsum(1) - p < 0.9).sum(1) - eager["kept"]).abs().max() <= 1


def test_a_document_of_32k():
    """Its last queries against the plain formula over all keys: values and their gradient."""
    (q, k, v), cu_seqlens = packed([32_768], 12, 2, 128, torch.bfloat16, DEVICE)
    q.requires_grad_()
    o = kernels.attention(q, k, v, cu_seqlens, 32_768)
    o[-64:].float().sum().backward()
    last = q.detach()[-64:].float().requires_grad_()
    k, v = (t.float().repeat_interleave(6, 1).transpose(0, 1) for t in (k, v))
    score = last.transpose(0, 1) @ k.mT * 128**-0.5
    score[:, :, -64:].masked_fill_(torch.ones(64, 64, dtype=torch.bool, device=DEVICE).triu(1), -torch.inf)
    plain = (score.softmax(-1) @ v).transpose(0, 1)
    plain.sum().backward()
    assert (o[-64:] - plain).abs().max() <= 0.02 * plain.abs().max() and not q.grad[:-64].any()
    assert (q.grad[-64:] - last.grad).abs().max() <= 0.02 * last.grad.abs().max()


def test_fifty_runs_are_the_same_bits():
    """What a race between the threads of a program, or between programs, would break."""
    (q, k, v), cu_seqlens = packed([700, 1, 300, 1000], 12, 2, 128, torch.bfloat16, DEVICE)
    x, w = torch.randn(1500, 1536, device=DEVICE).bfloat16(), torch.randn(32_000, 1536, device=DEVICE).bfloat16() / 40
    weight, y = torch.randn(1536, device=DEVICE).bfloat16(), torch.randint(32_000, (1500,), device=DEVICE)
    leaves = [t.requires_grad_() for t in (q, k, v, x, w, weight)]

    def everything():
        o = kernels.attention(q, k, v, cu_seqlens, 1000)
        logp, entropy = kernels.linear_logp(kernels.rms_norm(x, weight, 1e-6), w, y)
        gradients = torch.autograd.grad(o.float().square().sum() + logp.sum() + entropy.sum(), leaves)
        return [o.detach(), logp.detach(), entropy.detach(), kernels.decode_attention(*decoding), *gradients]

    decoding = paged([1, 64, 1000, 257], 14, 2, 128, torch.bfloat16, DEVICE)
    first = everything()
    for run in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True)), f"run {run}"


# ------------------------------------------------------------------------------------------------- the whole model
row = functools.partial(tiny_models.row, device=DEVICE)
QWEN2 = {  # heads of 128, six on a key head, biases; a vocabulary that is no multiple of 16
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def qwen2(dtype=torch.float32, **changes):
    with torch.device(DEVICE):
        transformer = model.Transformer(model.Config.from_dict(QWEN2 | changes))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.05)
    return transformer.to(dtype)


def learn(transformer, ids_T, cu_seqlens, checkpoint=False):
    """logp and entropy of the next tokens, and by name the gradients of their sum, which are left in the parameters."""
    transformer.zero_grad()
    x_TH = transformer(ids_T, cu_seqlens, checkpoint=checkpoint)
    logp_T, entropy_T = kernels.linear_logp(x_TH, transformer.head_weight, ids_T.roll(-1))
    (logp_T + entropy_T).mean().backward()
    return logp_T.detach(), entropy_T.detach(), {name: p.grad for name, p in transformer.named_parameters()}


def test_the_model_is_that_of_the_references():
    """Odd lengths and one token come after a multiple of 16: what was compiled for that must not serve the others."""
    transformer = qwen2()
    for lengths in ((100, 60), (100, 61), (1,)):
        inputs, found = row(*lengths), []
        for name in ("triton", "reference"):
            kernels.force(name)
            *values, gradients = learn(transformer, *inputs)
            found.append([*values, *gradients.values()])
            kernels.force(None)
        largest = max(b.abs().max() for b in found[1][2:])
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            assert (a - b).abs().max() <= 1e-4 * (b.abs().max() if i < 2 else largest), (lengths, i)


def test_recomputed_activations_change_no_bit_of_a_gradient():
    transformer, inputs = qwen2(torch.bfloat16), row(300, 1, 77)
    plain, again = (learn(transformer, *inputs, checkpoint=checkpoint)[2] for checkpoint in (False, True))
    assert all(torch.equal(plain[name], again[name]) for name in plain if "embed" not in name)


# ------------------------------------------------------------------------------------------------- sampler and trainer
def prompts_of(*lengths):
    return [torch.randint(QWEN2["vocab_size"], (n,)).tolist() for n in lengths]


@torch.no_grad()
def scored(transformer, prompts, drawn):
    """(logits [N,V] of the packed forward, drawn ids [N]) of all samples, in their order."""
    logits, ids = [], []
    for prompt, samples in zip(prompts, drawn, strict=True):
        for sample in samples:
            ids_T = torch.tensor(prompt + sample.ids, device=DEVICE)
            cu_seqlens = torch.tensor([0, len(ids_T)], dtype=torch.int32, device=DEVICE)
            logits.append(transformer.logits(ids_T, cu_seqlens)[len(prompt) - 1 : -1])
            ids.append(ids_T[len(prompt) :])
    return torch.cat(logits), torch.cat(ids)


def gap(transformer, prompts, drawn):
    """|log-prob of the sampler - that of the packed forward| of every drawn token."""
    logits, ids = scored(transformer, prompts, drawn)
    given = torch.tensor([x for samples in drawn for s in samples for x in s.logprobs], device=DEVICE)
    return (given - logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)).abs()


@pytest.mark.parametrize("lora", [False, True])
def test_a_rollout_follows_the_optimizer_through_the_same_graphs(lora):
    """Full: of fp32 masters the bf16 copy is refreshed in place. LoRA: the pairs are read as they are."""
    transformer, prompts = qwen2(torch.bfloat16 if lora else torch.float32), prompts_of(5, 64, 90)
    if lora:
        model.add_lora(transformer, 16, 32)
    trainee = trainers.Trainee(transformer, torch.bfloat16, (0.9, 0.95), 0.0)
    sampler = engine.Engine(transformer, (), max_context=256, cache_bytes=1 << 26)
    first = sampler.generate(prompts, n=4, max_tokens=40)
    graphs = dict(sampler.graphs)
    assert graphs and gap(transformer, prompts, first).mean() < 0.02
    for _ in range(2):
        learn(transformer, *row(200, 100))
        trainee.step(0.02, 1e9)
    assert gap(transformer, prompts, first).mean() > 0.05  # another model now
    second = sampler.generate(prompts, n=4, max_tokens=40)
    assert all(sampler.graphs[key] is graph for key, graph in graphs.items())
    found = gap(transformer, prompts, second)
    assert found.mean() < 0.02 and found.max() < 0.5


def test_top_p_in_a_graph_draws_from_the_nucleus():
    transformer, prompts = qwen2(), prompts_of(5, 64, 90)
    sampler = engine.Engine(transformer, (), max_context=256, cache_bytes=1 << 26)
    beyond = []
    for top_p in (0.7, 1.0):
        drawn = sampler.generate(prompts, n=8, max_tokens=40, temperature=0.8, top_p=top_p, logprobs=False)
        logits, ids = scored(transformer, prompts, drawn)
        p = (logits / 0.8).softmax(1)
        likelier = (p * (p > p.gather(1, ids[:, None]))).sum(1)  # a token of the nucleus has less than top_p before it
        beyond.append((likelier > 0.7 + 1e-4).sum().item())
    assert beyond[0] == 0 < beyond[1] and {mode for _, mode in sampler.graphs} == {"sample", "top_p"}


def test_close_lets_everything_go():
    transformer, prompts = qwen2(), prompts_of(5, 64, 190)
    sampler = engine.Engine(transformer, (), max_context=512, cache_bytes=1 << 26)
    before = torch.cuda.memory_allocated()
    first = sampler.generate(prompts, n=4, max_tokens=40)
    assert gap(transformer, prompts, first).max() < 1e-3
    sampler.close()
    assert not sampler.graphs and torch.cuda.memory_allocated() - before < 1 << 24
    assert sampler.generate(prompts, n=4, max_tokens=40) == first and sampler.graphs


def test_rows_that_are_sent_back_for_want_of_pages_start_over(monkeypatch):
    transformer, prompts, ends = qwen2(), prompts_of(20, 40, 60, 63), []
    end = engine.Rollout.end
    monkeypatch.setattr(engine.Rollout, "end", lambda self, row: ends.append(row) or end(self, row))
    sampler = engine.Engine(transformer, (), max_rows=16, max_context=256, cache_bytes=1 << 30)
    sampler.pages = 24  # the 16 rows come to 60
    drawn = sampler.generate(prompts, n=4, max_tokens=150)
    assert len(ends) > 16 and all(len(s.ids) == 150 for samples in drawn for s in samples)
    assert gap(transformer, prompts, drawn).max() < 1e-3


def test_policy_and_guard_together_stay_within_the_plan(tmp_path):
    shape = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | shape))
    config = SimpleNamespace(model=str(tmp_path), lora_r=0, micro_tokens=4096)
    sizes = {"longest": 2048, "rows": 128, "answer": 2048, "guard": str(tmp_path)}
    plan = trainers.plan_memory(config, torch.bfloat16, 16 << 30, **sizes)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy, guard = qwen2(**shape), qwen2(torch.bfloat16, **shape)
    trainee = trainers.Trainee(policy, torch.bfloat16, (0.9, 0.95), 0.0)
    samplers = [
        engine.Engine(transformer, (), max_rows=128, max_context=2048, cache_bytes=plan.sizes[f"{name} cache"])
        for name, transformer in (("policy", policy), ("guard", guard.requires_grad_(False)))
    ]
    for _ in range(2):
        for sampler in samplers:
            sampler.generate(prompts_of(*[64] * 128), max_tokens=24)
        learn(policy, *row(*[plan.micro_tokens // 2] * 2), checkpoint=plan.checkpointing)
        trainee.step(1e-3, 1.0)
    assert torch.cuda.max_memory_allocated() - before <= sum(plan.sizes.values())
