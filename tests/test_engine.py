"""The sampler against transformers, against a sampler without a cache, and against itself in other batches."""

import gc
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import engine
import kernels
import model
import safety
import train_rl
from engine import Engine, Sample
from tests import families, tiny, tiny_models
from tests.evaluations import refused
from train_rl import Drawing

SAMPLE = sys.modules["kernels.sample"]
VOCAB = tiny_models.SIZES["vocab_size"]
FAMILIES = ("qwen2", "qwen3", "llama3", "mistral")


def pair(family="qwen2", seed=0):
    """(transformers' model, ours) with the same random weights."""
    return tiny_models.pair(family, seed=seed, max_position_embeddings=512)


@pytest.fixture
def ours():
    return pair()[1]


def prompts_of(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def greedy_of_transformers(theirs, prompt, limit, eos):
    with torch.inference_mode():
        ids = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=limit, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def gaps(transformer, prompts, samples, temperature=1.0):
    """|log-prob of the sampler - what the trainer would say| of every drawn token: one packed forward of them all."""
    pairs = [(prompt, sample) for prompt, group in zip(prompts, samples, strict=True) for sample in group]
    rows = [Drawing({}, prompt, sample.ids, sample.logprobs, advantage=0.0) for prompt, sample in pairs]
    ids_T, rows_N, drawn_N, sampler_N, _, cu_seqlens = train_rl.pack(rows, transformer.head_weight.device)
    with torch.no_grad():
        x_NH = transformer(ids_T, cu_seqlens, rows_N=rows_N)
        logp_N, _ = kernels.linear_logp(x_NH, transformer.head_weight, drawn_N, temperature)
    return (sampler_N - logp_N).abs()


# ------------------------------------------------------------------------------------------------- right tokens
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers(family):
    """Prompts of one token, just under, at and over a page; several end ids; every copy of a group alike."""
    theirs, ours = pair(family)
    prompts = prompts_of(1, 2, 17, 63, 64, 65, 66, 130)
    eos = [3, 5, 8, 13, 21, 34, 55, 89]
    out = Engine(ours, eos).generate(prompts, n=2, max_tokens=40, temperature=0)
    for prompt, group in zip(prompts, out, strict=True):
        want = greedy_of_transformers(theirs, prompt, 40, eos)
        assert [s.ids for s in group] == [want, want]
        assert {s.finish_reason for s in group} == {"stop" if want[-1] in eos else "length"}
    assert {s.finish_reason for group in out for s in group} == {"stop", "length"}


def test_stop_at_the_first_token_and_limit_one():
    theirs, ours = pair()
    (prompt,) = prompts_of(20, seed=2)
    first, second = greedy_of_transformers(theirs, prompt, 2, [])
    assert first != second
    (stopped,) = Engine(ours, {first}).generate([prompt], max_tokens=9, temperature=0)[0]
    assert (stopped.ids, stopped.finish_reason, len(stopped.logprobs)) == ([first], "stop", 1)
    (limited,) = Engine(ours, {second}).generate([prompt], max_tokens=1, temperature=0)[0]
    assert (limited.ids, limited.finish_reason) == ([first], "length")
    (both,) = Engine(ours, {second}).generate([prompt], max_tokens=2, temperature=0)[0]
    assert (both.ids, both.finish_reason) == ([first, second], "stop")  # an end token in the last position is an end
    (rest,) = Engine(ours, {second}).generate([prompt + [first]], max_tokens=2, temperature=0)[0]
    assert rest.ids == [second]  # a prompt may end in a given start of the answer


def sample_without_cache(ours, prompt, key, limit, temperature, eos):
    """Whole forward for every token, softmax and cumulative sum in fp64; only the uniform numbers are the engine's."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] not in eos):
        with torch.no_grad():
            z_V = ours.logits(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))[-1].double()
        u = SAMPLE.uniform(torch.tensor([key]), torch.tensor([len(ids) - len(prompt)]))
        ids.append(int(torch.searchsorted((z_V / temperature).softmax(0).cumsum(0), u, right=True)))
    return ids[len(prompt) :]


def test_samples_are_those_of_a_sampler_without_cache(ours):
    """So shared and copied pages, refill and packed prefill change nothing."""
    prompts, eos = prompts_of(1, 40, 64, 66, 129), {7, 70}
    out = Engine(ours, eos, max_rows=16).generate(prompts, n=4, max_tokens=30, temperature=1.3, seed=11)
    keys = engine.stream_keys(11, range(len(prompts)), 4)
    for i, prompt in enumerate(prompts):
        for k in range(4):
            assert out[i][k].ids == sample_without_cache(ours, prompt, keys[i][k], 30, 1.3, eos), (i, k)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.3])
def test_logprobs_are_those_of_the_packed_forward(family, temperature):
    """Greedy ones are at temperature 1."""
    _, ours = pair(family)
    prompts = prompts_of(3, 64, 100)
    out = Engine(ours, {9, 10}).generate(prompts, n=3, max_tokens=40, temperature=temperature)
    assert gaps(ours, prompts, out, temperature or 1.0).max() < 1e-5


@pytest.mark.parametrize(("dtype", "gap"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision(ours, dtype, gap):
    ours = ours.to(dtype)
    prompts = prompts_of(3, 70)
    out = Engine(ours, {9}).generate(prompts, n=4, max_tokens=30)
    assert gaps(ours, prompts, out).mean() < gap


# ------------------------------------------------------------------------------------------------- distribution
def chi_square(tokens, p_V):
    """p-value; tokens that are expected less than 8 times are counted together."""
    want_V = p_V * len(tokens)
    got_V = torch.bincount(tokens, minlength=len(p_V)).double()
    rare_V = want_V < 8
    want = torch.cat([want_V[~rare_V], want_V[rare_V].sum()[None]])
    got = torch.cat([got_V[~rare_V], got_V[rare_V].sum()[None]])
    kept = want > 0
    return scipy.stats.chisquare(got[kept].numpy(), want[kept].numpy()).pvalue


@pytest.mark.parametrize("vocab", [1, 7, 128, 129, 1000])
def test_inverse_cdf_has_the_frequencies_at_every_vocabulary_size(vocab):
    p_V = torch.randn(vocab).mul(2).exp()
    p_V[::5] = 0 if vocab > 5 else p_V[::5]
    keys = torch.tensor(engine.stream_keys(3, range(50), 1000)).flatten()
    u = SAMPLE.uniform(keys, torch.zeros_like(keys))
    token, total = SAMPLE.inverse_cdf(p_V.expand(len(keys), vocab), u)
    assert torch.allclose(total, p_V.double().sum().expand_as(total))
    assert (p_V[token] > 0).all()
    assert vocab == 1 or chi_square(token, p_V.double() / p_V.double().sum()) > 1e-3


def test_inverse_cdf_at_the_ends_of_the_interval():
    p_V = torch.zeros(300)
    p_V[[5, 140, 250]] = torch.tensor([1e-30, 1.0, 1e-8])
    u = torch.tensor([0.0, 1e-31, 0.5, 1 - 2**-52], dtype=torch.float64)
    assert SAMPLE.inverse_cdf(p_V.expand(4, 300), u)[0].tolist() == [5, 5, 140, 250]


def test_uniforms_do_not_repeat_and_are_uniform_in_each_key():
    keys = torch.tensor(engine.stream_keys(0, range(20), 20)).flatten()
    u = SAMPLE.uniform(keys.repeat_interleave(200), torch.arange(200).repeat(400))
    assert len(u.unique()) == len(u) and u.min() >= 0 and u.max() < 1
    for view in (u, u.view(400, 200)[:, 0], u.view(400, 200)[0]):
        assert scipy.stats.kstest(view.numpy(), "uniform").pvalue > 1e-3
    u_KP = u.view(400, 200) - 0.5
    assert abs((u_KP[1:] * u_KP[:-1]).mean() * 12) < 0.02 and abs((u_KP[:, 1:] * u_KP[:, :-1]).mean() * 12) < 0.02
    assert engine.stream_keys(1, [0, 1], 2) != engine.stream_keys(0, [0, 1], 2)


def test_mix_is_splitmix64():
    """The generator's published first outputs for seed 1234567: state advanced by its constant, then mixed."""
    states = 1234567 + torch.arange(3) * (0x9E3779B97F4A7C15 - 2**64)
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [x % 2**64 for x in SAMPLE.mix(states).tolist()] == want


@pytest.mark.parametrize("top_p", [0.95, 0.7, 0.5, 1e-6, 1e-9])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = torch.randn(50, VOCAB) * 3
    want, p = transformers.TopPLogitsWarper(top_p)(None, logits), logits.softmax(1)
    SAMPLE.nucleus(p, top_p)
    assert torch.equal(p > 0, want > -torch.inf)


def test_samples_of_a_nucleus_stay_inside_and_carry_no_logprobs():
    theirs, ours = pair()
    prompts = prompts_of(10, 11)
    out = Engine(ours, ()).generate(prompts, n=3, max_tokens=10, top_p=1e-6, logprobs=False)
    for prompt, group in zip(prompts, out, strict=True):
        assert all(s.ids == greedy_of_transformers(theirs, prompt, 10, []) and s.logprobs is None for s in group)


# ------------------------------------------------------------------------------------------------- batches
def test_the_same_sample_in_any_batch(ours, monkeypatch):
    """Bitwise, log-probs too: alone, among others, in narrow and wide batches, with another look, with two threads,
    and with prompts that are prefilled in other company."""
    prompts, eos = prompts_of(1, 2, 40, 64, 70, 128, 140, 33), {4, 44}
    limits = [20, 3, 60, 40, 21, 7, 30, 10]

    def run(max_rows=256, look=4, only=None):
        sampler = Engine(ours, eos, max_rows=max_rows)
        sampler.look = look
        if only is None:
            return sampler.generate(prompts, n=3, max_tokens=limits, seed=2)
        return sampler.generate([prompts[only]], n=3, max_tokens=limits[only], seed=2, places=[only])[0]

    want = run()
    assert run(max_rows=16) == want
    assert run(max_rows=48, look=1) == want
    assert run(look=13) == want
    assert [run(only=i) for i in range(len(prompts))] == want
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 128)
    torch.set_num_threads(2)
    try:
        assert run() == want
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [1, 3])
def test_without_whole_tiles_a_sample_is_the_same_up_to_rounding(ours, rows):
    prompts = prompts_of(40, 1, 70)[:rows]
    want, sampler = Engine(ours, {4}).generate(prompts, max_tokens=30), Engine(ours, {4}, max_rows=3, row_tile=1)
    got = sampler.generate(prompts, max_tokens=30)
    assert [s.ids for (s,) in got] == [s.ids for (s,) in want] and sampler.step.args[3] <= rows
    assert gaps(ours, prompts, got).max() < 1e-5


def test_draws_follow_the_seed_the_sample_and_the_place(ours):
    """A call for what an earlier one left undone, named by its places, draws what that one would have."""
    sampler, prompts = Engine(ours, {5}), prompts_of(8, 9, 10, 11)
    a, b, whole = (sampler.generate(prompts, n=2, max_tokens=12, seed=seed) for seed in (0, 1, 0))
    assert a == whole and a != b and a[0][0].ids != a[0][1].ids
    rest = sampler.generate([prompts[3], prompts[1]], n=2, max_tokens=12, places=[3, 1])
    assert rest == [whole[3], whole[1]]


def spy(sampler, monkeypatch):
    """(what an engine prefills from now on, whether the pages of its one call have all come back)."""
    prefilled, calls, prefill, pages = [], [], sampler.prefill, engine.Pages

    def spied(prompts):
        prefilled.extend(tuple(ids) for ids, _ in prompts)
        prefill(prompts)

    def all_came_back(total):
        (call,) = calls
        return sorted(call.free) == list(range(1, total)) and not any(call.references.values())

    monkeypatch.setattr(sampler, "prefill", spied)
    monkeypatch.setattr(engine, "Pages", lambda total: calls.append(pages(total)) or calls[-1])
    return prefilled, all_came_back


def test_a_small_cache_starts_rows_over_and_changes_nothing(ours, monkeypatch):
    prompts, eos = prompts_of(60, 130, 10, 64), {3}
    want = Engine(ours, eos).generate(prompts, n=3, max_tokens=150)
    probe = Engine(ours, eos)
    for pages in (7, 14):  # the second prompt needs 5 and the copy of its partial page
        sampler = Engine(ours, eos, cache_bytes=pages * probe.page_bytes)
        _, all_came_back = spy(sampler, monkeypatch)
        assert sampler.generate(prompts, n=3, max_tokens=150) == want
        assert all_came_back(pages)
        assert sampler.cache.k_LPSKD.nbytes + sampler.cache.v_LPSKD.nbytes == pages * probe.page_bytes
        monkeypatch.undo()
    small = Engine(ours, eos, cache_bytes=6 * probe.page_bytes)
    refused("prompt 1: needs 6 pages of 32,768 bytes, the cache has 5", small.generate, prompts, n=3, max_tokens=150)


def test_a_prompt_is_prefilled_once_though_its_samples_begin_at_different_times(ours, monkeypatch):
    """Prompts of one token, to a page's end and over it; a first token alone needs no prefill."""
    prompts, eos = prompts_of(1, 30, 64, 65, 128, 130), {3, 6, 9}
    sampler = Engine(ours, eos, max_rows=16)
    prefilled, all_came_back = spy(sampler, monkeypatch)
    assert gaps(ours, prompts, sampler.generate(prompts, n=7, max_tokens=40)).max() < 1e-5
    assert prefilled == [tuple(prompt[:-1]) for prompt in prompts[1:]]
    assert all_came_back(sampler.pages)


def test_an_update_of_the_weights_is_seen_by_the_next_rollout(ours):
    theirs, new = pair(seed=1)
    sampler, prompts = Engine(ours, ()), prompts_of(40, 41)
    before = sampler.generate(prompts, max_tokens=20, temperature=0)
    ours.load_state_dict(new.state_dict())
    after = sampler.generate(prompts, max_tokens=20, temperature=0)
    assert before != after
    assert [g[0].ids for g in after] == [greedy_of_transformers(theirs, p, 20, []) for p in prompts]


def test_lora_is_sampled_unmerged_and_the_backward_pass_still_works(ours):
    prompts = prompts_of(20, 70)
    base = Engine(ours, ()).generate(prompts, n=2, max_tokens=20)
    pairs = model.add_lora(ours, r=4, alpha=8, seed=0)
    for parameter in pairs[1::2]:
        parameter.data.normal_(std=0.1)
    out = Engine(ours, ()).generate(prompts, n=2, max_tokens=20)
    assert out != base
    assert gaps(ours, prompts, out).max() < 1e-5
    ours(torch.tensor(prompts[0]), torch.tensor([0, 20], dtype=torch.int32)).sum().backward()
    assert all(parameter.grad is not None for parameter in pairs)


def test_weights_that_give_no_distribution_are_an_error(ours):
    weight, sampler = ours.model.layers[1].mlp.down_proj.weight.data, Engine(ours, ())
    weight[0, 0] = math.nan
    refused("prompt 0, sample 0: the model's logits are not finite", sampler.generate, prompts_of(5), max_tokens=3)
    weight[0, 0] = 0
    want = Engine(ours, ()).generate(prompts_of(70, 5), max_tokens=3)
    assert sampler.generate(prompts_of(70, 5), max_tokens=3) == want  # what the cache still holds does no harm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1: empty"),
        ({"prompts": [[1] * 500], "max_tokens": 13}, "500 tokens and max_tokens=13 make 513, over the context of 512"),
        ({"prompts": [[1, VOCAB]]}, "ids 1 to 160 for a vocabulary of 160"),
        ({"prompts": [[-1]]}, "ids -1 to -1"),
        *(({name: x}, f"{name}={x}") for name, x in {"n": 0, "max_tokens": 0, "temperature": -0.1}.items()),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"max_tokens": [3, 3]}, "1 prompts, but 2 limits and 1 places"),
        ({"top_p": 0.9}, "logprobs=False"),
        ({"top_p": 0.0, "logprobs": False}, "top_p=0.0"),
        ({"places": [0, 1]}, "1 prompts, but 1 limits and 2 places"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(change, message, ours, monkeypatch):
    sampler = Engine(ours, {3})
    monkeypatch.setattr(ours, "forward", lambda *_, **__: pytest.fail("the model ran"))
    refused(message, sampler.stream, **({"prompts": [[1, 2]], "max_tokens": 4} | change))  # not at the first sample
    assert sampler.cache is None


# ------------------------------------------------------------------------------------------------- streams
def test_a_stream_yields_samples_as_they_end(ours):
    call = {"prompts": prompts_of(3, 4), "n": 3, "max_tokens": [2, 30]}
    want, sampler, seen = Engine(ours, {5}).generate(**call), Engine(ours, {5}), []
    for i, k, sample in sampler.stream(**call):
        assert sample == want[i][k] and not torch.is_inference_mode_enabled()  # the loop's body may train
        seen.append((i, k))
        if len(seen) <= 3:  # nobody waits for the others
            assert i == 0 and sampler.state.rows["count"].max() <= sampler.look
    assert sorted(seen) == [(i, k) for i in range(2) for k in range(3)]


def test_a_partial_stream_shows_every_sample_as_it_grows(ours):
    call = {"prompts": prompts_of(3, 70), "n": 2, "max_tokens": [3, 20], "seed": 1}
    want, seen = Engine(ours, {5}).generate(**call), {}
    for i, k, sample in Engine(ours, {5}).stream(**call, partial=True):
        before, whole = seen.get((i, k), []), want[i][k]
        assert sample == whole or (sample.finish_reason == "" and sample.ids == whole.ids[: len(sample.ids)])
        assert sample.ids[: len(before)] == before and len(sample.ids) - len(before) <= 4
        seen[i, k] = sample.ids
    assert seen == {(i, k): want[i][k].ids for i in range(2) for k in range(2)}


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_stream_that_is_left_early_leaves_the_engine_usable(ours, taken):
    prompts = prompts_of(3, 70, 66, 130)
    sampler = Engine(ours, {5}, max_rows=16, cache_bytes=14 * Engine(ours, ()).page_bytes)
    want = sampler.generate(prompts, n=4, max_tokens=[2, 30, 40, 50])
    stream = sampler.stream(prompts, n=4, max_tokens=[2, 30, 40, 50])
    for _ in range(taken):
        i, k, sample = next(stream)
        assert sample == want[i][k]
    stream.close()
    assert sampler.generate(prompts, n=4, max_tokens=[2, 30, 40, 50]) == want


def test_a_new_call_ends_the_stream_before(ours):
    sampler, prompts = Engine(ours, ()), prompts_of(3, 70)
    stream = sampler.stream(prompts, max_tokens=[2, 30])
    next(stream)
    want = Engine(ours, ()).generate(prompts, max_tokens=9)
    assert sampler.generate(prompts, max_tokens=9) == want
    refused("another call", next, stream)
    stream = sampler.stream(prompts, max_tokens=9)
    sampler.close()
    refused("was closed", next, stream)
    assert sampler.generate(prompts, max_tokens=9) == want


# ------------------------------------------------------------------------------------------------- text
def ids_of(tokenizer, text):
    return safety.encode(tokenizer, [(text, True)], continued=True)


@pytest.mark.parametrize(
    ("name", "start", "text", "thinking", "answer"),
    [
        ("r1-qwen", {}, "mud\n</think>\n\niron", "mud", "iron"),  # the prompt opens the thinking
        ("qwen2.5", {}, "<think>\nmud\n</think>\n\niron", "mud", "iron"),
        ("llama3", {}, "<think> mud", "mud", None),
        ("r1-qwen", {"prefill": "mud and"}, " iron.\n</think>\n\nno", "mud and iron.", "no"),
        ("qwen2.5", {"prefill": "mud and"}, " iron.", "", "mud and iron."),
        ("r1-qwen", {"prefill": "mud and", "prefill_thinking": True}, " iron.\n</think>\n\nno", "mud and iron.", "no"),
        ("qwen3", {"prefill": "mud and", "prefill_thinking": True}, " iron.\n</think>\n\nno", "mud and iron.", "no"),
        ("qwen2.5", {"prefill": "mud and", "prefill_thinking": True}, " iron", "mud and iron", None),
    ],
)
def test_completions_are_split_under_any_template_and_any_given_start(name, start, text, thinking, answer):
    tokenizer, item = families.tokenizer(name), {"prompt": "a", "id": 7, **start}
    sample = Sample([*ids_of(tokenizer, text), tokenizer.eos_token_id], None, "stop")
    done = engine.completed(tokenizer, {tokenizer.eos_token_id}, item, sample, safety.thinking_open(tokenizer))
    made = {"completion": text, "tokens": len(sample.ids), "finish_reason": "stop", "thinking": thinking}
    assert done == {**item, **made, "answer": answer}
    if item.get("prefill_thinking"):
        shown = tokenizer.decode(engine.prompt_ids(tokenizer, item), skip_special_tokens=False)
        assert shown.endswith("<think>\nmud and")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return model.load(tiny.model_folder(tmp_path_factory.mktemp("tiny")))


def test_completions_come_as_they_end_with_what_the_engine_draws(loaded):
    """Limits one an item, cut to the context; what fills that gets an empty completion; places as in the engine."""
    ours, tokenizer = loaded
    items = [{"id": f"i{i}", "prompt": f"brew {i}"} for i in range(4)]
    items[1]["prompt"] = "mud " * 900
    settings = {"seed": 3, "temperature": 0.8, "top_p": 0.9, "samples": 2}
    got = list(engine.complete(ours, tokenizer, items, max_tokens=[60, 8, 2, 8], places=[4, 5, 6, 7], **settings))
    assert [i for i, _ in got][:4] == [2, 3, 4, 5]
    done = dict(got)
    for i, item in done.items():
        assert item["id"] == items[i // 2]["id"] and item["sample"] == i % 2
    assert [done[3][key] for key in ("completion", "tokens", "finish_reason", "answer")] == ["", 0, "length", None]
    ends, prompts = {tokenizer.eos_token_id}, [engine.prompt_ids(tokenizer, items[i]) for i in (0, 2, 3)]
    sampler = Engine(ours, ends)
    drawn = sampler.generate(prompts, 2, [60, 2, 8], 0.8, 3, top_p=0.9, logprobs=False, places=[4, 6, 7])
    texts = [safety.decode(tokenizer, s.ids, ends) for group in drawn for s in group]
    assert [done[i]["completion"] for i in (0, 1, 4, 5, 6, 7)] == texts and done[4]["tokens"] == 2


@pytest.mark.parametrize("room", [-1, 0, 1, 3])
def test_a_completion_ends_with_the_context(loaded, monkeypatch, room):
    ours, tokenizer = loaded
    item = {"id": "i", "prompt": "mud and iron"}
    context = len(engine.prompt_ids(tokenizer, item)) + room
    monkeypatch.setattr(ours, "config", replace(ours.config, max_position_embeddings=context))
    ((index, done),) = engine.complete(ours, tokenizer, [item], max_tokens=50, seed=1)
    assert (index, done["tokens"], done["finish_reason"]) == (0, max(0, room), "length") and "sample" not in done


def test_without_places_an_items_draws_are_the_same_in_every_selection(loaded):
    items = [{"id": f"i{i}", "prompt": "brew"} for i in range(4)]
    whole, some = (dict(engine.complete(*loaded, x, seed=3, max_tokens=8)) for x in (items, items[:1:-1]))
    assert [some[0], some[1]] == [whole[3], whole[2]] and whole[0]["completion"] != whole[1]["completion"]


# ------------------------------------------------------------------------------------------------- the step, memory
def test_the_step_keeps_its_buffers_and_leaves_ended_rows_alone(ours):
    sampler = Engine(ours, {7})
    sampler.generate(prompts_of(66), n=2, max_tokens=3)
    s = sampler.state.rows
    buffers = {name: t.data_ptr() for name, t in s.items()}
    s["live"][:16], s["limit"][:] = torch.arange(16) % 2 == 0, 100
    s["length"][:16] = torch.arange(56, 72)
    s["table"][:16, :2] = torch.arange(1, 33).view(16, 2)
    before = {name: s[name].clone() for name in ("length", "count")}
    sampler.cache.k_LPSKD.zero_()
    for _ in range(3):
        sampler.state.step.zero_()
        engine.decode_step(ours, sampler.cache, sampler.state, 16, "sample")
    assert {name: t.data_ptr() for name, t in s.items()} == buffers
    ended = torch.arange(len(s["length"])) % 2 == 1
    ended[16:] = True
    assert all(torch.equal(s[name][ended], before[name][ended]) for name in before)
    assert (s["length"][:16:2] > before["length"][:16:2]).all()
    used = sampler.cache.k_LPSKD.flatten(2).any(2).any(0).nonzero().flatten().tolist()
    pages = [row * 2 + 1 + (56 + row) // 64 for row in range(0, 16, 2)]  # those that the live rows begin to write
    assert used == sorted([0, *pages, 6 * 2 + 2])  # page 0; and row 6 goes on from its 62nd token into a second page


def test_the_step_never_looks_at_a_value_on_the_host(monkeypatch):
    """Fake tensors have no values: what reads one raises. Attention and draw are kernels of their own on a GPU."""
    with FakeTensorMode():
        ours = model.Transformer(tiny_models.config("qwen2"))
        cache, state = engine.Cache(ours, 9), engine.State(16, 8, 4, {1, 2}, "cpu")
        monkeypatch.setattr(kernels, "decode_attention", lambda q, *_: torch.empty_like(q))
        monkeypatch.setattr(kernels, "decode_plan", lambda *_: None)
        monkeypatch.setattr(kernels, "sample", lambda *_: None)
        for mode in ("sample", "greedy", "top_p"):
            engine.decode_step(ours, cache, state, 16, mode)


def test_rollouts_leave_nothing_behind(ours):
    """No live tensors and, where the system tells, no resident memory; the arena stays where it is."""
    sampler, prompts, marks = Engine(ours, {7}), prompts_of(5, 66, 20), []
    for i in range(35):
        sampler.generate(prompts, n=4, max_tokens=12, seed=i)
        if i in (4, 34):
            gc.collect()
            tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
            with open("/proc/self/statm") as file:
                marks.append((tensors, sampler.cache.k_LPSKD.data_ptr(), int(file.read().split()[1]) * 4096))
    assert marks[1][0] <= marks[0][0] and marks[1][1] == marks[0][1]
    assert marks[1][2] - marks[0][2] < 4 << 20


# ------------------------------------------------------------------------------------------------- GPU
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: captures CUDA graphs")


def on_gpu(family):
    """Heads of 64, as the kernels take them."""
    return tiny_models.pair(family, max_position_embeddings=512, head_dim=64)[1].cuda().to(torch.bfloat16)


@cuda
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_graphs_give_what_the_eager_step_gives(family, monkeypatch):
    """Same kernels, same random numbers; then the log-probs against the packed forward on the GPU."""
    ours, prompts = on_gpu(family), prompts_of(3, 64, 100)
    graphed = Engine(ours, {9}, max_context=256)
    got = graphed.generate(prompts, n=8, max_tokens=60)
    assert len(graphed.graphs) > 1  # a batch that shrinks
    eager = Engine(ours, {9}, max_context=256)
    monkeypatch.setattr(eager, "_capture", lambda: SimpleNamespace(replay=eager.step))
    assert eager.generate(prompts, n=8, max_tokens=60) == got
    gap = gaps(ours, prompts, got)
    assert gap.mean() < 0.02 and gap.max() < 0.5


@cuda
def test_fifty_rollouts_do_not_grow_on_the_gpu():
    sampler, marks = Engine(on_gpu("qwen3"), {7}, max_context=256, cache_bytes=1 << 26), []
    for i in range(55):
        sampler.generate(prompts_of(5, 66, 20), n=4, max_tokens=12, seed=i)
        marks.append((torch.cuda.memory_allocated(), len(sampler.graphs)))
    assert marks[-1][0] <= marks[4][0] + (1 << 20) * (marks[-1][1] - marks[4][1])  # a graph that came later


@cuda
def test_uniforms_are_the_same_on_both_devices():
    keys = torch.tensor(engine.stream_keys(9, range(7), 7)).flatten()
    places = torch.arange(len(keys)) * 12345
    assert torch.equal(SAMPLE.uniform(keys, places), SAMPLE.uniform(keys.cuda(), places.cuda()).cpu())
