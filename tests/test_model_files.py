"""Model folders in and out: what Transformers reads back, what is kept, what is refused and by which words."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import model
import runs
from tests import tiny_models as tiny


@pytest.fixture
def folder(tmp_path):
    """An untied Qwen2 folder as Transformers writes it."""
    torch.manual_seed(0)
    tiny.folder(tmp_path / "m")
    return tmp_path / "m"


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


def test_config_tokenizer_and_generation_settings_stay_as_they_were(folder, tmp_path):
    tiny.edit_json(folder / "config.json", torch_dtype="bfloat16", note_of_somebody={"kept": [1]})
    (folder / "generation_config.json").write_text('{"eos_token_id": [159, 3], "temperature": 0.6}')
    tiny.edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", chat_template="{{ 1 }}")
    ours, tokenizer = model.load(folder)
    model.save(ours, tokenizer, tmp_path / "out")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    del before["torch_dtype"]
    assert after == before | {"dtype": "float32"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [159, 3]
    assert model.end_ids(*model.load(tmp_path / "out")) == {159, 3}


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (7, None, {7, 159}),  # without a generation_config.json that of config.json counts; the tokenizer's always
        ([7, 8], None, {7, 8, 159}),
        (7, {"eos_token_id": 3}, {3, 159}),
        (7, {"temperature": 1.0}, {7, 159}),
        *((None, {"eos_token_id": wrong}, None) for wrong in ("159", [3, 160], -1, True, [[3]], {"a": 3})),
    ],
)
def test_end_ids_are_those_of_the_settings_and_the_tokenizer(folder, config, generation, ids):
    tiny.edit_json(folder / "config.json", eos_token_id=config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if ids:
        assert model.end_ids(*model.load(folder)) == ids
    else:
        with pytest.raises(model.ModelError, match="eos_token_id .* is no id of a vocabulary of 160"):
            model.load(folder)


def test_a_tokenizer_made_in_memory_is_saved_too(folder, tmp_path):
    model.save(model.load(folder)[0], tiny.tokenizer(), tmp_path / "out")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded("w5 w3").input_ids == [5, 3] and loaded.eos_token_id == 159


def test_weights_are_cast_to_the_dtype_asked_for(folder, tmp_path):
    ours, tokenizer = model.load(folder, dtype=torch.bfloat16)
    exact = dict(model.load(folder)[0].named_parameters())
    assert all(torch.equal(p, exact[name].bfloat16()) for name, p in ours.named_parameters())
    model.save(ours, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_save_that_fails_leaves_the_old_folder_whole(folder, tmp_path, monkeypatch):
    ours, tokenizer = model.load(folder)
    model.save(ours, tokenizer, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(model, "save_tokenizer", full_disk)
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


def test_the_rotary_constants_of_old_files_are_skipped(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tiny.edit_tensors(folder / "model.safetensors", lambda t: t.update({name: torch.ones(8)}))
    model.load(folder)


CONFIGS = {  # changes to config.json -> words of the refusal
    "architecture GPT2LMHeadModel is not supported; supported: Qwen2": {"architectures": ["GPT2LMHeadModel"]},
    r"architecture \(none\) is not supported": {"architectures": None},
    "hidden_act gelu is not supported": {"hidden_act": "gelu"},
    "quantized weights are not supported": {"quantization_config": {"bits": 4}},
    r"attention is not supported \(sliding_window=16\)": {"use_sliding_window": True, "sliding_window": 16},
    "rope scaling yarn is not supported": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "rope scaling dynamic is not": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "factor must be a positive float, not None": {"rope_scaling": {"rope_type": "linear"}},
    "partial_rotary_factor 0.5": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "hidden_size must be a positive int, not None": {"hidden_size": None},
    "hidden_size must be a positive int, not '64'": {"hidden_size": "64"},
    "num_hidden_layers must be a positive int, not 0": {"num_hidden_layers": 0},
    "4 attention heads do not divide into 3 key-value heads": {"num_key_value_heads": 3},
}  # fmt: skip


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_would_be_misread_is_refused(folder, message):
    tiny.edit_json(folder / "config.json", **CONFIGS[message])
    with pytest.raises(model.ModelError, match=message):
        model.load(folder)


def test_a_mistral_config_without_the_word_null_has_a_window():
    with pytest.raises(model.ModelError, match="sliding_window=4096"):
        model.Config.from_dict({"architectures": ["MistralForCausalLM"]})


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


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {  # the words of the refusal -> what is done to the folder
    f"missing tensor {NORM}": lambda f: tiny.edit_tensors(f / "model.safetensors", lambda t: t.pop(NORM)),
    "missing tensor .* and 25 more": lambda f: tiny.edit_tensors(f / "model.safetensors", keep_one),
    "surplus tensor extra.weight": lambda f: tiny.edit_tensors(
        f / "model.safetensors", lambda t: t.update({"extra.weight": torch.zeros(1)})
    ),
    rf"{NORM} is \[65\], not \[64\]": lambda f: tiny.edit_tensors(
        f / "model.safetensors", lambda t: t.update({NORM: torch.ones(65)})
    ),
    "model.safetensors is not a whole safetensors file": lambda f: cut(f / "model.safetensors", -100),
    "safetensors is not a whole safetensors file: ": lambda f: cut(f / "model.safetensors", 20),
    "file: .*header": lambda f: cut(f / "model.safetensors", 0),
    r"has no model.safetensors \(only safetensors are read\)": lambda f: (f / "model.safetensors").unlink(),
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "config.json cannot be read": lambda f: (f / "config.json").write_text("{'a': 1}"),
    "config.json holds no JSON object": lambda f: (f / "config.json").write_text("[]"),
    "has no tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "its tokenizer files cannot be read": lambda f: (f / "tokenizer.json").write_text("{}"),
    f"{NORM} is torch.int8; quantized": lambda f: tiny.edit_tensors(
        f / "model.safetensors", lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})
    ),
    "named outside of its folder": lambda f: (
        (f / "model.safetensors").rename(f.parent / "w.safetensors"),
        (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../w.safetensors"}}'),
    ),
}


def keep_one(tensors):
    for name in sorted(tensors)[1:]:
        del tensors[name]


def cut(file, end):
    file.write_bytes(file.read_bytes()[:end])


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(folder, message):
    DAMAGE[message](folder)
    with pytest.raises(runs.UserError, match=message):
        model.load(folder)


def test_a_missing_shard_is_named(folder, tmp_path):
    ours, tokenizer = model.load(folder)
    model.save(ours, tokenizer, tmp_path / "out", max_shard_bytes=100_000)
    gone = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(model.ModelError, match=f"has no {gone.name}"):
        model.load(tmp_path / "out")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "tests/nowhere"])
def test_a_path_that_looks_local_never_becomes_a_download(path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(model.ModelError, match=f"no model folder at {path}"):
        model.load(path)


def test_a_hub_id_that_cannot_be_had_says_so():
    with pytest.raises(model.ModelError, match="some-org/some-model is neither a local folder nor"):
        model.load("some-org/some-model")


def test_a_hub_id_is_downloaded_without_pickles_and_its_revision_printed(folder, monkeypatch, capsys):
    import huggingface_hub

    asked = {}

    def download(name, **patterns):
        asked.update(patterns, name=name)
        return str(folder.rename(folder.with_name("0123abc")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model.load("some-org/some-model")
    assert asked["name"] == "some-org/some-model" and "revision 0123abc" in capsys.readouterr().out
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py")) for pattern in asked["allow_patterns"])
