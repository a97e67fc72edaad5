"""What a model must have to be loaded, and what is said where it has not: template, end tokens, ids, rope, folders."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig

import model
import runs
from tests import families, tiny
from tests import tiny_models as tiny_lm


@pytest.fixture
def folder(tmp_path):
    """A tied Qwen2 folder with an R1-style tokenizer, as Transformers writes it."""
    return tiny.model_folder(tmp_path / "m")


def edit_tokenizer(folder, **changes):
    tiny_lm.edit_json(folder / "tokenizer_config.json", **changes)


def edit_weights(folder, change):
    tiny_lm.edit_tensors(folder / "model.safetensors", change)


def end_at(folder, ids):
    """The end tokens of generation_config.json and config.json."""
    for name in ("generation_config.json", "config.json"):
        tiny_lm.edit_json(folder / name, eos_token_id=ids)


# ------------------------------------------------------------------------------------------------- tokenizer and ends


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


def raising_template(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no user may speak') }}")


def deaf_template(folder):
    (folder / "chat_template.jinja").write_text("hello")


def fewer_embeddings(folder):
    edit_weights(folder, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-3].clone()}))
    tiny_lm.edit_json(folder / "config.json", vocab_size=len(families.tokenizer("r1-qwen")) - 3)


def no_end(folder):
    edit_tokenizer(folder, eos_token=None)
    end_at(folder, None)


UNUSABLE = {
    "no chat template": no_template,
    "chat template.* cannot render .*no user may speak": raising_template,
    "chat template.* cannot render": deaf_template,
    r"3 tokens, such as '.*', have ids beyond the \d+ rows of the embedding; take the": fewer_embeddings,
    "no end token, so no answer would ever end; name it as eos_token": no_end,
    "eos_token_id 99999 is no id of a vocabulary": lambda folder: end_at(folder, 99999),
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_a_model_that_cannot_answer_is_refused_before_its_weights_are_read(folder, message, monkeypatch):
    UNUSABLE[message](folder)
    monkeypatch.setattr(model, "load_weights", lambda *_: pytest.fail("read the weights"))
    with pytest.raises(runs.UserError, match=message):
        model.load(folder)


def test_a_guard_needs_no_chat_template(folder):
    no_template(folder)
    assert model.load(folder, chat=False)[1].chat_template is None


def test_a_padding_token_needs_no_embedding(folder):
    size = len(families.tokenizer("r1-qwen"))
    edit = {"id": size, "content": "<pad>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append(edit | {"normalized": False})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(model.ModelError, match="1 tokens, such as '<pad>'"):
        model.load(folder)
    edit_tokenizer(folder, pad_token="<pad>")
    assert model.load(folder)[1].pad_token_id == size


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
def test_what_ends_a_turn_in_the_template_is_trained_and_every_end_stops(
    tmp_path, capsys, name, eos, stored, trained, stops
):
    """After saving, too, and for whoever reads generation_config.json."""
    folder, tokenizer = tmp_path / "m", families.tokenizer(name)
    tiny.model_folder(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    edit_tokenizer(folder, eos_token=eos)
    end_at(folder, stored and tokenizer.convert_tokens_to_ids(stored))
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
        written = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
        assert set(written) == model.end_ids(ours, loaded)


@pytest.mark.parametrize(
    ("turn", "end"),
    [
        ("{{ m['content'] }}<|im_end|>\n<|endoftext|>", "<|im_end|>"),  # the first of several
        ("<|im_start|>{{ m['content'] }}\n", None),  # nothing ends a turn
        ("<|im_end|>{{ raise_exception('no assistant') if m['role'] == 'assistant' }}", None),
        ("{{ m['content'] if m['role'] == 'user' }}<|im_end|>", None),  # an assistant's turn is not shown
    ],
)
def test_the_end_of_a_turn_is_the_first_control_token_after_it(turn, end):
    tokenizer = copy.deepcopy(families.tokenizer("qwen2.5"))
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    assert model.turn_end(tokenizer) == (end and tokenizer.convert_tokens_to_ids(end))


def test_the_pocket_ends_turns_as_its_template_does(capsys):
    """And its tokenizer is not Qwen's, though its config.json says qwen2."""
    ours, tokenizer = model.load("pocket/base")
    assert model.turn_end(tokenizer) == tokenizer.eos_token_id and model.end_ids(ours, tokenizer) == {928}
    assert capsys.readouterr().out == "" and ours.generation == {"bos_token_id": 927, "eos_token_id": 928}
    assert tokenizer.tokenize("how do i make zako?") == ["how", "▁do", "▁i", "▁make", "▁za", "ko", "?"]


# ------------------------------------------------------------------------------------------------- tied heads, rope


def test_a_tied_head_is_read_under_either_name(folder):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    want = model.load(folder)[0].head_weight
    edit_weights(folder, lambda t: t.update({head: t[embedding].clone()}))
    assert torch.equal(model.load(folder)[0].head_weight, want)  # both, alike
    edit_weights(folder, lambda t: t.pop(embedding))
    assert torch.equal(model.load(folder)[0].head_weight, want)
    edit_weights(folder, lambda t: t.update({embedding: t[head] + 1}))
    with pytest.raises(model.ModelError, match="lm_head.weight is not the embedding"):
        model.load(folder)
    edit_weights(folder, lambda t: (t.pop(embedding), t.pop(head)))
    with pytest.raises(model.ModelError, match="missing tensor model.embed_tokens.weight"):
        model.load(folder)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 7.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 7e4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 7e4},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e4},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": LLAMA3},  # the original context is then the context
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 96}},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
    ],
)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(rope):
    raw = {**tiny_lm.SIZES, "architectures": ["LlamaForCausalLM"], **rope}
    ours = model.Config.from_dict(json.loads(json.dumps(raw))).rope
    theirs = LlamaConfig.from_dict(raw).rope_parameters
    assert ours == {key: theirs[key] for key in ours} and {*ours} <= {*theirs}


@pytest.mark.parametrize(
    "rope",
    [{"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {"full_attention": {}}, [1]],
)
def test_rope_settings_for_each_layer_type_are_refused(rope):
    with pytest.raises(model.ModelError, match="rope settings that differ from layer to layer"):
        model.Config.from_dict({**tiny_lm.SIZES, "architectures": ["LlamaForCausalLM"], "rope_parameters": rope})


# ------------------------------------------------------------------------------------------------- folders, device


def test_folders_that_are_something_else_say_what_to_type(folder, tmp_path):
    ours, tokenizer = model.load(folder)
    model.add_lora(ours, 2, 4)
    model.save_adapter(ours, tmp_path / "adapter", base=str(folder))
    for name in ("full", "lora", "evaluation"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "source.json"):
            (tmp_path / name / file).write_text('{"values": {}}')
    model.merge_lora(ours)
    model.save(ours, tokenizer, tmp_path / "full" / "model")
    (tmp_path / "adapter").rename(tmp_path / "lora" / "model")
    adapter = f"--model {folder} --adapter {tmp_path / 'lora' / 'model'}"

    def refused(message, name, attach=False):
        with pytest.raises(model.ModelError) as error:
            model.load(folder, adapter=str(name)) if attach else model.load(name)
        assert str(error.value) == message

    for attach in (False, True):
        run = "is the folder of a run; to use what it holds, type"
        refused(f"{tmp_path / 'full'} {run} --model {tmp_path / 'full' / 'model'}", tmp_path / "full", attach)
        refused(f"{tmp_path / 'lora'} {run} {adapter}", tmp_path / "lora", attach)
        refused(f"{tmp_path / 'evaluation'} is the folder of a run", tmp_path / "evaluation", attach)
    inner = tmp_path / "lora" / "model"
    refused(f"{inner} has no config.json; to use what it holds, type {adapter}", inner)
    refused(f"{folder} has no adapter_config.json; to use what it holds, type --model {folder}", folder, True)
    hub = "some-org/some-adapter"
    refused(f"no adapter folder at {hub}; from the hub: hf download {hub} --local-dir DIR", hub, True)
    (tmp_path / "empty").mkdir()
    refused(f"{tmp_path / 'empty'} has no config.json", tmp_path / "empty")
    assert model.load(folder, adapter=str(inner))[0].lora["r"] == 2


def test_device_dtype_and_kernels_are_settled_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.pick_device("auto") == model.pick_device("cpu") == "cpu"
    assert model.pick_dtype("auto", "cpu") == torch.float32 and model.pick_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(runs.UserError, match="--device cuda: this machine has no usable GPU"):
        model.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old 1")
    assert (model.pick_device("auto"), model.pick_dtype("auto", "cuda")) == ("cuda", torch.float32)
    assert model.device_name("cuda") == "Old 1" and "threads" in model.device_name("cpu")
    with pytest.raises(runs.UserError, match="older than sm_80"):
        model.pick_dtype("bfloat16", "cuda")


@pytest.mark.parametrize(
    ("name", "works"), [("", True), ("auto", True), ("reference", True), ("triton", False), ("x", False)]
)
def test_kernels_are_chosen_by_an_environment_variable(name, works, monkeypatch):
    monkeypatch.setenv("KERNELS", name) if name else monkeypatch.delenv("KERNELS", raising=False)
    try:
        if works:
            model.pick_kernels("cpu")
            assert model.kernels.backend("cpu") == "reference"
        else:
            with pytest.raises(runs.UserError, match=f"KERNELS={name}: kernels: '{name}'"):
                model.pick_kernels("cpu")
    finally:
        model.kernels.force(None)
