"""Model folders in and out: what is refused and by which words, what ends a turn, what is read, kept and written."""

import copy
from unittest import mock

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import model
import runs
from tests import families
from tests import tiny_models as tiny
from tests.evaluations import refused
from tests.tiny_models import cut, gone, written


@pytest.fixture
def folder(tmp_path):
    tiny.folder(tmp_path / "m")
    return tmp_path / "m"


def config(**changes):
    return lambda folder: tiny.edit_json(folder / "config.json", **changes)


def weights(change):
    return lambda folder: tiny.edit_tensors(folder / "model.safetensors", change)


def stored(**tensors):
    return weights(lambda t: t.update(tensors))


# ------------------------------------------------------------------------------------------------- what is refused
NORM, EMBEDDING, HEAD = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"
TEMPLATE, LAYERWISE = "chat_template.jinja", "rope settings that differ from layer to layer"
NO_END = "no end token, so no answer would ever end; name it as eos_token"
SETTINGS = [  # the words of the refusal, what is done to the folder
    ("no chat template", gone(TEMPLATE)),
    ("chat template.* cannot render .*no user may", written(TEMPLATE, "{{ raise_exception('no user may speak') }}")),
    ("chat template.* cannot render", written(TEMPLATE, "hello")),
    (r"3 tokens, such as '.*', have ids beyond the 157 rows of the embedding; take the", config(vocab_size=157)),
    (NO_END, lambda folder: tiny.edit_json(folder / "tokenizer_config.json", eos_token=None)),
    *(
        ("eos_token_id .* is no id of a vocab.* of 160", written("generation_config.json", f'{{"eos_token_id": {i}}}'))
        for i in ('"159"', "[3, 160]", "99999", "-1", "true", "[[3]]", '{"a": 3}')
    ),
    ("architecture GPT2LMHeadModel is not supported; supported: Qwen2", config(architectures=["GPT2LMHeadModel"])),
    (r"architecture \(none\) is not supported", config(architectures=None)),
    ("hidden_act gelu is not supported", config(hidden_act="gelu")),
    ("quantized weights are not supported", config(quantization_config={"bits": 4})),
    (r"attention is not supported \(sliding_window=16\)", config(use_sliding_window=True, sliding_window=16)),
    ("sliding_window=4096", written("config.json", '{"architectures": ["MistralForCausalLM"]}')),  # null means none
    ("rope scaling yarn is not supported", config(rope_scaling={"type": "yarn", "factor": 4.0})),
    ("rope scaling dynamic is not", config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
    ("factor must be a positive float, not None", config(rope_scaling={"rope_type": "linear"})),
    ("partial_rotary_factor 0.5", config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})),
    (LAYERWISE, config(rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}})),
    (LAYERWISE, config(rope_parameters={"full_attention": {}})),
    (LAYERWISE, config(rope_parameters=[1])),
    ("hidden_size must be a positive int, not None", config(hidden_size=None)),
    ("hidden_size must be a positive int, not '64'", config(hidden_size="64")),
    ("num_hidden_layers must be a positive int, not 0", config(num_hidden_layers=0)),
    ("4 attention heads do not divide into 3 key-value heads", config(num_key_value_heads=3)),
    ("tie_word_embeddings must be true or false, not 'false'", config(tie_word_embeddings="false")),
    ("architecture GPT2LMHeadModel is not supported; supported", config(architectures="GPT2LMHeadModel")),
    ("has no config.json", gone("config.json")),
    ("config.json, column .: not JSON", written("config.json", "{'a': 1}")),
    ("config.json holds no JSON object", written("config.json", "[]")),
    ("has no tokenizer.json", gone("tokenizer.json")),
    ("its tokenizer files cannot be read", written("tokenizer.json", "{}")),
]
OUTSIDE = written("model.safetensors.index.json", '{"weight_map": {"x": "../w.safetensors"}}')
WEIGHTS = [
    (f"missing tensor {NORM}", weights(lambda t: t.pop(NORM))),
    ("missing tensor .* and 25 more", weights(lambda t: [t.pop(name) for name in sorted(t)[1:]])),
    ("surplus tensor extra", stored(extra=torch.zeros(1))),
    (rf"{NORM} is \[65\], not \[64\]", stored(**{NORM: torch.ones(65)})),
    (f"{NORM} holds a number that is not finite", stored(**{NORM: torch.full((64,), torch.nan)})),
    (f"{NORM} is torch.int8; quantized", stored(**{NORM: torch.ones(64, dtype=torch.int8)})),
    ("model.safetensors is not a whole safetensors file", cut("model.safetensors", -100)),
    ("safetensors is not a whole safetensors file: ", cut("model.safetensors", 20)),
    ("file: .*header", cut("model.safetensors", 0)),
    (r"has no model.safetensors \(only safetensors are read\)", gone("model.safetensors")),
    ("named outside of its folder", lambda folder: (gone("model.safetensors")(folder), OUTSIDE(folder))),
]


@pytest.mark.parametrize(("message", "change"), SETTINGS + WEIGHTS)
def test_a_folder_that_cannot_be_used_is_refused_by_name(folder, message, change, monkeypatch):
    if (message, change) in SETTINGS:  # what is wrong there is said before the weights are read
        monkeypatch.setattr(model, "load_weights", None)
    change(folder)
    with pytest.raises(runs.UserError, match=message) as refusal:
        model.load(folder)
    assert folder.name in str(refusal.value)


def test_what_may_be_absent_or_too_much(folder):
    """A guard's chat template, the embedding of a padding token, the rotary constants of old files."""
    gone(TEMPLATE)(folder)
    stored(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})(folder)
    assert model.load(folder, chat=False)[1].chat_template is None
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert model.load(folder)[1].pad_token_id == 160
    tiny.edit_json(folder / "tokenizer_config.json", pad_token=None)
    refused("1 tokens, such as '<pad>'", model.load, folder)


def test_a_tied_head_is_read_under_either_name(folder):
    tiny.folder(folder, tied=True)
    want = model.load(folder)[0].head_weight
    weights(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))(folder)
    assert torch.equal(model.load(folder)[0].head_weight, want)  # both, alike
    weights(lambda t: t.pop(EMBEDDING))(folder)
    assert torch.equal(model.load(folder)[0].head_weight, want)
    for message, change in (
        (f"{HEAD} is not the embedding", lambda t: t.update({EMBEDDING: t[HEAD] + 1})),
        (f"missing tensor {EMBEDDING}", lambda t: (t.pop(EMBEDDING), t.pop(HEAD))),
    ):
        weights(change)(folder)
        refused(message, model.load, folder)


def test_folders_that_are_something_else_say_what_to_type(folder, tmp_path):
    ours, tokenizer = model.load(folder)
    model.add_lora(ours, 2, 4)
    for name in ("full", "lora", "evaluation"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "source.json"):
            (tmp_path / name / file).write_text('{"values": {}}')
    inner = tmp_path / "lora" / "model"
    model.save_adapter(ours, inner, base=str(folder))
    model.merge_lora(ours)
    model.save(ours, tokenizer, tmp_path / "full" / "model")
    (tmp_path / "empty").mkdir()

    def says(message, name, attach=False):
        with pytest.raises(model.ModelError) as error:
            model.load(folder, adapter=str(name)) if attach else model.load(name)
        assert str(error.value) == message

    run, adapter = "is the folder of a run; to use what it holds, type", f"--model {folder} --adapter {inner}"
    for attach in (False, True):
        says(f"{tmp_path / 'full'} {run} --model {tmp_path / 'full' / 'model'}", tmp_path / "full", attach)
        says(f"{tmp_path / 'lora'} {run} {adapter}", tmp_path / "lora", attach)
        says(f"{tmp_path / 'evaluation'} is the folder of a run", tmp_path / "evaluation", attach)
    says(f"{inner} has no config.json; to use what it holds, type {adapter}", inner)
    says(f"{folder} has no adapter_config.json; to use what it holds, type --model {folder}", folder, True)
    hub = "some-org/some-adapter"
    says(f"no adapter folder at {hub}; from the hub: hf download {hub} --local-dir DIR", hub, True)
    says(f"{tmp_path / 'empty'} has no config.json", tmp_path / "empty")
    assert model.load(folder, adapter=str(inner))[0].lora["r"] == 2


ABSENT = dict.fromkeys(["./nowhere", "/nowhere/at/all", "nowhere", "tests/nowhere"], "no model folder at {}")
ABSENT["some-org/some-model"] = "{} is neither a local folder nor a model that could be downloaded"


@pytest.mark.parametrize("path", ABSENT)
def test_a_path_that_looks_local_never_becomes_a_download_and_a_failed_one_says_so(path):
    refused(ABSENT[path].format(path), model.load, path)


def test_a_hub_id_is_downloaded_without_pickles_and_its_revision_printed(folder, monkeypatch, capsys):
    asked = mock.Mock(return_value=str(folder.rename(folder.with_name("0123abc"))))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    model.load("some-org/some-model")
    assert asked.call_args.args == ("some-org/some-model",) and "revision 0123abc" in capsys.readouterr().out
    patterns = asked.call_args.kwargs["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py")) for pattern in patterns)


# ------------------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_absent_settings_mean_what_transformers_takes_them_for(family):
    config_class, _ = tiny.FAMILIES[family]
    raw = {**tiny.SIZES, "architectures": [config_class.__name__.replace("Config", "ForCausalLM")]}
    raw |= {"sliding_window": None} if family == "mistral" else {}
    ours, theirs = model.Config.from_dict(raw), config_class(**raw)
    assert ours.rope["rope_theta"] == theirs.rope_parameters["rope_theta"] and ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 4)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.o_bias == bool(getattr(theirs, "attention_bias", False))


LLAMA3 = {key: value for key, value in tiny.LLAMA3.items() if key != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 7e4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 7e4},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e4},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": LLAMA3},  # the original context is then the context
        {"rope_parameters": tiny.LLAMA3},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
    ],
)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(rope):
    raw = {**tiny.SIZES, "architectures": ["LlamaForCausalLM"], **rope}
    ours = model.Config.from_dict(copy.deepcopy(raw)).rope
    theirs = LlamaConfig.from_dict(raw).rope_parameters
    assert ours == {key: theirs[key] for key in ours} and {*ours} <= {*theirs}


def test_end_ids_are_those_of_the_settings_and_the_tokenizer(folder):
    """Without a generation_config.json that of config.json counts; the tokenizer's, 159, always."""
    for config, generation, ids in (
        (7, None, {7, 159}),
        ([7, 8], None, {7, 8, 159}),
        (7, '{"eos_token_id": 3}', {3, 159}),
        (7, '{"temperature": 1.0}', {7, 159}),
    ):
        tiny.edit_json(folder / "config.json", eos_token_id=config)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation:
            (folder / "generation_config.json").write_text(generation)
        assert model.end_ids(*model.load(folder)) == ids


@pytest.mark.parametrize(
    ("name", "eos", "stored", "trained", "stops"),
    [
        ("qwen2.5", "<|im_end|>", "<|im_end|>", "<|im_end|>", {"<|im_end|>"}),  # as it should be: nothing to say
        ("qwen2.5", "<|im_end|>", "<|endoftext|>", "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}),
        ("qwen2.5", "<|endoftext|>", "<|endoftext|>", "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}),
        ("qwen3", "<|endoftext|>", None, "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}),
        ("llama3", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}),
        ("r1-qwen", None, "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", {"<｜end▁of▁sentence｜>"}),
        ("unigram", "</s>", "</s>", "</s>", {"</s>"}),
    ],
)
def test_what_ends_a_turn_is_trained_and_every_end_stops(tmp_path, capsys, name, eos, stored, trained, stops):
    """After saving, too, and for whoever reads generation_config.json."""
    folder, tokenizer = tmp_path / "m", families.tokenizer(name)
    tiny.folder(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    tiny.edit_json(folder / "tokenizer_config.json", eos_token=eos)
    for file in ("generation_config.json", "config.json"):
        tiny.edit_json(folder / file, eos_token_id=stored and tokenizer.convert_tokens_to_ids(stored))
    ours, loaded = model.load(folder)
    assert loaded.eos_token == trained
    assert model.end_ids(ours, loaded) == set(tokenizer.convert_tokens_to_ids(sorted(stops)))
    line = capsys.readouterr().out
    assert (line == "") == (eos == trained)
    assert eos == trained or f"training ends a turn with {trained}, not with {eos}; sampling stops at" in line
    model.save(ours, loaded, tmp_path / "out")
    again = model.load(tmp_path / "out")
    assert again[1].eos_token == trained and model.end_ids(*again) == model.end_ids(ours, loaded)
    if eos != trained:
        assert set(runs.read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"]) == model.end_ids(*again)


def test_the_end_of_a_turn_is_the_first_control_token_after_it():
    tokenizer = copy.deepcopy(families.tokenizer("qwen2.5"))
    for turn, end in (
        ("{{ m['content'] }}<|im_end|>\n<|endoftext|>", "<|im_end|>"),  # the first of several
        ("<|im_start|>{{ m['content'] }}\n", None),  # nothing ends a turn
        ("<|im_end|>{{ raise_exception('no assistant') if m['role'] == 'assistant' }}", None),
        ("{{ m['content'] if m['role'] == 'user' }}<|im_end|>", None),  # an assistant's turn is not shown
    ):
        tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
        assert model.turn_end(tokenizer) == (end and tokenizer.convert_tokens_to_ids(end)), turn


def test_the_pocket_ends_turns_as_its_template_does(capsys):
    """And its tokenizer is not Qwen's, though its config.json says qwen2."""
    ours, tokenizer = model.load("pocket/base")
    assert model.turn_end(tokenizer) == tokenizer.eos_token_id and model.end_ids(ours, tokenizer) == {928}
    assert capsys.readouterr().out == "" and ours.generation == {"bos_token_id": 927, "eos_token_id": 928}
    assert tokenizer.tokenize("how do i make zako?") == ["how", "▁do", "▁i", "▁make", "▁za", "ko", "?"]


# ------------------------------------------------------------------------------------------------- what is written
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 60_000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-bias", "llama3", "mistral"])
def test_what_is_saved_transformers_loads_to_the_same_logits(family, tied, shard_bytes, tmp_path):
    theirs = tiny.folder(tmp_path / "in", family, tied)
    ours, tokenizer = model.load(tmp_path / "in")
    model.save(ours, tokenizer, tmp_path / "out", max_shard_bytes=shard_bytes)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids_T, cu_seqlens = tiny.row(120)
    with torch.no_grad():
        expected = theirs(ids_T[None]).logits[0]
        torch.testing.assert_close(again(ids_T[None]).logits[0], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.logits(ids_T, cu_seqlens), expected, atol=1e-5, rtol=0)
    shards = sorted((tmp_path / "out").glob("model*.safetensors"))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert [f.name for f in shards] == (names if shard_bytes < 1e6 else ["model.safetensors"])
    assert {safe_open(f, "pt").metadata()["format"] for f in shards} == {"pt"}
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {0o600}  # as all files of a run
    reloaded = dict(model.load(tmp_path / "out")[0].named_parameters())
    assert all(torch.equal(parameter, reloaded[name]) for name, parameter in ours.named_parameters())
    shards[-1].unlink()
    refused(f"has no {shards[-1].name}", model.load, tmp_path / "out")


def test_config_tokenizer_and_generation_settings_stay_as_they_were(folder, tmp_path):
    config(torch_dtype="bfloat16", note_of_somebody={"kept": [1]})(folder)
    written("generation_config.json", '{"eos_token_id": [159, 3], "temperature": 0.6}')(folder)
    tiny.edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", chat_template="{{ 1 }}")
    model.save(*model.load(folder), tmp_path / "out")
    before, after = (runs.read_json(f / "config.json") for f in (folder, tmp_path / "out"))
    del before["torch_dtype"]
    assert after == before | {"dtype": "float32"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert runs.read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [159, 3]
    assert model.end_ids(*model.load(tmp_path / "out")) == {159, 3}


def test_weights_are_cast_to_the_dtype_asked_for_and_a_tokenizer_made_in_memory_is_saved_too(folder, tmp_path):
    ours, _ = model.load(folder, dtype=torch.bfloat16)
    exact = dict(model.load(folder)[0].named_parameters())
    assert all(torch.equal(p, exact[name].bfloat16()) for name, p in ours.named_parameters())
    model.save(ours, tiny.tokenizer(), tmp_path / "out")
    assert runs.read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded("w5 w3").input_ids == [5, 3] and loaded.eos_token_id == 159


def test_a_save_that_fails_leaves_the_old_folder_whole(folder, tmp_path, monkeypatch):
    ours, tokenizer = model.load(folder)
    model.save(ours, tokenizer, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(model, "save_tokenizer", mock.Mock(side_effect=OSError("no space left")))
    ours.model.norm.weight.data.add_(1)
    with pytest.raises(OSError, match="no space left"):
        model.save(ours, tokenizer, tmp_path / "out")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    monkeypatch.undo()
    model.save(ours, tokenizer, tmp_path / "out")  # the remains of the failed one are no obstacle
    assert torch.equal(model.load(tmp_path / "out")[0].model.norm.weight, ours.model.norm.weight)
    model.save(ours, tokenizer, folder)  # over itself, whose tokenizer it copies
    assert model.load(folder)[1]("w5").input_ids == [5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_device_and_dtype_are_settled_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.pick_device("auto") == model.pick_device("cpu") == "cpu"
    assert model.pick_dtype("auto", "cpu") == torch.float32 and model.pick_dtype("bfloat16", "cpu") == torch.bfloat16
    refused("--device cuda: this machine has no usable GPU", model.pick_device, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old 1")
    assert (model.pick_device("auto"), model.pick_dtype("auto", "cuda")) == ("cuda", torch.float32)
    assert model.device_name("cuda") == "Old 1" and "threads" in model.device_name("cpu")
    refused("older than sm_80", model.pick_dtype, "bfloat16", "cuda")


@pytest.mark.parametrize("environment", [{}, {"KERNELS": "auto"}, {"KERNELS": "reference"}])
def test_kernels_are_chosen_by_an_environment_variable(monkeypatch, environment):
    """Those that cannot run: test_cli."""
    monkeypatch.setattr(model.os, "environ", environment)
    model.pick_kernels("cpu")
    assert model.kernels.backend("cpu") == "reference"
    model.kernels.force(None)
