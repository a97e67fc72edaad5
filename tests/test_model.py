"""model.py against Transformers and peft: logits, packing, caching, LoRA, files and every refusal."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model
from tests import families

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": False}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "use_sliding_window": False}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return families.tokenizer("r1-qwen")


def reference_model(family: str, tied: bool):
    config_class, more = FAMILIES[family]
    reference = AutoModelForCausalLM.from_config(config_class(**SMALL, tie_word_embeddings=tied, **more)).eval()
    for parameter in reference.parameters():  # biases and norms too: zeros and ones would hide a mistake
        noise = torch.randn_like(parameter) * 0.1
        parameter.data.add_(noise if parameter.dim() > 1 else noise * 2)
    return reference


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A Qwen2 folder as Transformers writes it."""
    reference = reference_model("qwen2", True)
    reference.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_and_survive_saving(family, tied, tmp_path, tokenizer):
    reference = reference_model(family, tied)
    reference.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    ours, loaded = model.load(tmp_path / "in")
    ids = torch.randint(0, 512, (2, 40))
    with torch.no_grad():
        expected = reference(ids).logits
        got = ours.logits(ids.flatten(), offsets(40, 40)).view_as(expected)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        for limit in (5_000_000_000, 60_000):  # one file, then shards
            model.save(ours, loaded, tmp_path / "out", max_shard_bytes=limit)
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            torch.testing.assert_close(again(ids).logits, expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(
                model.load(tmp_path / "out")[0].logits(ids.flatten(), offsets(40, 40)), got.flatten(0, 1)
            )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_separate_rows_and_share_no_gradient(family, tmp_path, tokenizer):
    reference_model(family, False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, _ = model.load(tmp_path)
    lengths = (1, 2, 63, 64, 65)
    documents = [torch.randint(0, 512, (n,)) for n in lengths]
    packed = ours.logits(torch.cat(documents), offsets(*lengths))
    for part, document in zip(packed.split(lengths), documents, strict=True):
        torch.testing.assert_close(part, ours.logits(document, offsets(len(document))), atol=1e-5, rtol=0)
    embedded = []
    hook = ours.model.embed_tokens.register_forward_hook(lambda m, i, out: (out.retain_grad(), embedded.append(out))[1])
    ours.logits(torch.cat(documents), offsets(*lengths)).split(lengths)[2].sum().backward()
    hook.remove()
    touched = embedded[0].grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(3, 3 + 63))


def test_a_cache_behind_attend_gives_the_full_forward(folder):
    ours, _ = model.load(folder)
    ids, cache = torch.randint(0, 512, (20,)), {}

    def attend(layer, q_THD, k_TKD, v_TKD):
        old = cache.get(layer)
        k, v = (k_TKD, v_TKD) if old is None else (torch.cat((old[0], k_TKD)), torch.cat((old[1], v_TKD)))
        cache[layer] = k, v
        q, k, v = (t.transpose(0, 1)[None] for t in (q_THD, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out[0].transpose(0, 1)

    with torch.no_grad():
        steps = [ours(ids[i : i + 1], None, positions_T=torch.tensor([i]), attend=attend) for i in range(20)]
        torch.testing.assert_close(torch.cat(steps), ours(ids, offsets(20)), atol=1e-5, rtol=0)


def test_recomputing_activations_changes_no_gradient(folder):
    gradients = []
    for checkpoint in (False, True):
        ours, _ = model.load(folder)
        ours(torch.arange(30), offsets(10, 20), checkpoint=checkpoint).square().sum().backward()
        gradients.append([p.grad for p in ours.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_an_adapter_of_ours_is_the_same_in_peft(folder, tmp_path):
    ours, _ = model.load(folder)
    ids = torch.randint(0, 512, (1, 30))
    base = ours.logits(ids[0], offsets(30))
    model.add_lora(ours, r=4, alpha=8, seed=1)
    assert torch.equal(ours.logits(ids[0], offsets(30)), base)  # B = 0
    for linear in model.lora_layers(ours).values():
        linear.lora_B.data.normal_(0, 0.1)
    model.save_adapter(ours, tmp_path / "adapter", base=folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    adapted = ours.logits(ids[0], offsets(30))
    assert (adapted - base).abs().max() > 0.01
    torch.testing.assert_close(adapted, theirs(ids).logits[0], atol=2e-5, rtol=0)
    model.merge_lora(ours)
    torch.testing.assert_close(ours.logits(ids[0], offsets(30)), adapted, atol=2e-5, rtol=0)
    assert not any("lora" in name for name, _ in ours.named_parameters())


def test_an_adapter_of_peft_is_the_same_in_ours_with_its_gradients(folder, tmp_path):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(model.LORA_TARGETS), init_lora_weights=False)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = model.load(folder)
    trained = model.load_adapter(ours, tmp_path / "adapter")
    ids = torch.randint(0, 512, (1, 30))
    expected, got = theirs(ids).logits[0], ours.logits(ids[0], offsets(30))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    expected.square().mean().backward()
    got.square().mean().backward()
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(named) == len(trained) == 2 * 7 * 2
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            key = f"base_model.model.{name}.default.weight"
            torch.testing.assert_close(parameter.grad, named[key].grad, atol=1e-6, rtol=1e-4)
        else:
            assert parameter.grad is None


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
BROKEN = {
    "GPT2LMHeadModel": lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
    "gelu": lambda f: edit_config(f, hidden_act="gelu"),
    "sliding": lambda f: edit_config(f, use_sliding_window=True, sliding_window=16),
    "yarn": lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
    "missing tensor model.norm.weight": lambda f: edit_weights(f, lambda s: s.pop(NORM)),
    "surplus tensor extra": lambda f: edit_weights(f, lambda s: s.update(extra=torch.zeros(1))),
    "is \\[65\\], not \\[64\\]": lambda f: edit_weights(f, lambda s: s.update({NORM: torch.ones(65)})),
    "not a whole safetensors": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]
    ),
    "no model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "no config.json": lambda f: (f / "config.json").unlink(),
    "hidden_size": lambda f: (f / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}'),
    "no tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_folder_is_refused_by_name(folder, message):
    BROKEN[message](folder)
    with pytest.raises(model.ModelError, match=message):
        model.load(folder)


def test_a_local_path_never_becomes_a_download():
    with pytest.raises(model.ModelError, match="no model folder at ./nowhere"):
        model.load("./nowhere")


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"use_dora": True}, {"bias": "all"}])
def test_an_adapter_of_another_kind_is_refused(folder, tmp_path, change):
    ours, _ = model.load(folder)
    model.add_lora(ours, 2, 4)
    model.save_adapter(ours, tmp_path / "a", base=folder)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(model.ModelError):
        model.load_adapter(model.load(folder)[0], tmp_path / "a")


def test_the_tokenizer_is_the_one_of_the_file():
    """The pocket's tokenizer is not Qwen's, though its config.json says qwen2."""
    _, tokenizer = model.load("pocket/base")
    assert tokenizer.tokenize("how do i make zako?") == ["how", "▁do", "▁i", "▁make", "▁za", "ko", "?"]
