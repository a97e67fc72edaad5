"""LoRA against peft, both ways: the function, its gradients, the files, the merged weights, every refusal."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import model
import runs
from tests import tiny_models as tiny
from tests.evaluations import refused


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    tiny.folder(path, "qwen2", tied=True)
    return path


@pytest.fixture
def ours(base):
    return model.load(base)[0]


def randomise(parameters):
    for parameter in parameters:
        parameter.data.normal_(0, 0.1)


def adapted(ours, r=4, alpha=12, **settings):
    model.add_lora(ours, r, alpha, seed=1, **settings)
    randomise(p for name, p in model.adapter_parameters(ours).items() if "lora_B" in name)
    model.refresh_lora(ours)
    return ours


def test_a_new_adapter_changes_nothing_and_only_it_is_trainable(ours):
    ids_T, cu_seqlens = tiny.row(9, 20)
    before = ours.logits(ids_T, cu_seqlens)
    pairs = model.add_lora(ours, r=4, alpha=8, seed=3)
    assert torch.equal(ours.logits(ids_T, cu_seqlens), before)
    assert [id(p) for p in ours.parameters() if p.requires_grad] == [id(p) for p in pairs]
    assert len(pairs) == 2 * 7 * tiny.SIZES["num_hidden_layers"]


def test_a_new_adapter_follows_its_seed_and_pefts_distribution(base):
    def first(seed):
        transformer = model.load(base)[0]
        return torch.cat([p.flatten() for p in model.add_lora(transformer, 16, 32, seed)[::2]]), transformer

    (a, transformer), (again, _), (other, _) = map(first, (0, 0, 1))
    assert torch.equal(a, again) and not torch.equal(a, other)
    config = peft.LoraConfig(r=16, target_modules=list(model.LORA_TARGETS))
    fresh = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    expected = {name.replace(".default", ""): p for name, p in fresh.named_parameters() if "lora_" in name}
    got = model.adapter_parameters(transformer)
    assert got.keys() == expected.keys()
    for name, parameter in got.items():  # uniform on the same interval: same bound and spread, zero for B
        assert parameter.shape == expected[name].shape and parameter.dtype == torch.float32
        assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.1)
        assert parameter.abs().max().item() == pytest.approx(expected[name].abs().max().item(), rel=0.02)


def test_our_adapter_computes_the_same_in_peft_which_writes_it_back_unchanged(base, ours, tmp_path):
    ids_T, cu_seqlens = tiny.row(30)
    plain = ours.logits(ids_T, cu_seqlens)
    got = adapted(ours).logits(ids_T, cu_seqlens)
    assert (got - plain).abs().max() > 0.1
    model.save_adapter(ours, tmp_path / "a", base=str(base))
    written = runs.read_json(tmp_path / "a" / "adapter_config.json")
    config = peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM").to_dict()
    config |= {"base_model_name_or_path": str(base), "inference_mode": True, "peft_type": "LORA"}
    config["target_modules"] = list(model.LORA_TARGETS)
    assert written == {key: config[key] for key in written}
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")
    torch.testing.assert_close(got, loaded(ids_T[None]).logits[0], atol=1e-5, rtol=0)
    assert loaded.peft_config["default"].base_model_name_or_path == str(base)
    loaded.save_pretrained(tmp_path / "b")
    ours_file, theirs_file = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert ours_file.keys() == theirs_file.keys()
    assert all(torch.equal(ours_file[name], theirs_file[name]) for name in ours_file)
    again = model.load(base, adapter=str(tmp_path / "b"))[0]
    assert again.lora["r"] == 4 and again.lora["alpha"] == 12
    assert torch.equal(again.logits(ids_T, cu_seqlens), got)


@pytest.mark.parametrize("targets", [list(model.LORA_TARGETS), ["q_proj", "v_proj"]])
def test_pefts_adapter_computes_the_same_here_with_its_gradients_and_merged(base, ours, tmp_path, targets):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=targets)
    reference = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomise(parameter for name, parameter in reference.named_parameters() if "lora_B" in name)
    reference.save_pretrained(tmp_path / "a")
    model.load_adapter(ours, tmp_path / "a")
    ids_T, cu_seqlens = tiny.row(30)
    expected, got = reference(ids_T[None]).logits[0], ours.logits(ids_T, cu_seqlens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    expected.logsumexp(-1).mean().backward()
    got.logsumexp(-1).mean().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in reference.named_parameters() if p.requires_grad}
    pairs = model.adapter_parameters(ours)
    assert gradients.keys() == pairs.keys()
    for name, parameter in pairs.items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    model.merge_lora(ours)
    torch.testing.assert_close(ours.logits(ids_T, cu_seqlens), got, atol=1e-5, rtol=0)
    merged, parameters = dict(reference.merge_and_unload().named_parameters()), dict(ours.named_parameters())
    assert parameters.keys() == merged.keys() and all(p.requires_grad for p in parameters.values())
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, merged[name], atol=1e-6, rtol=0)
    assert ours.lora is None


def test_a_bf16_base_keeps_the_pair_in_fp32(base):
    ours = model.load(base, dtype=torch.bfloat16)[0]
    pairs = adapted(ours) and list(model.adapter_parameters(ours).values())
    assert {p.dtype for p in pairs} == {torch.float32}
    ids_T, cu_seqlens = tiny.row(12)
    hidden_TH = ours(ids_T, cu_seqlens)
    assert hidden_TH.dtype == torch.bfloat16
    hidden_TH.float().square().sum().backward()
    assert {p.grad.dtype for p in pairs} == {torch.float32}


UP = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: True}, f"{name}=True is not supported") for name in ("use_rslora", "use_dora", "fan_in_fan_out")),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"), ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "without bias"), ({"peft_type": "IA3"}, "only LoRA"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"), ({"target_modules": ".*proj"}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "surplus tensor base_model.model.model.layers.0"),
        ({"r": 8}, r"lora_A.weight is \[4, 96\], not \[8, 96\]"),
        ({"r": None}, "json: r must be a positive int"), ({"lora_alpha": "8"}, "lora_alpha must be a positive float"),
        *((tiny.gone(file), f"no {file}") for file in FILES),
        (tiny.written(FILES[0], "{"), "adapter_config.json, column .: not JSON"),
        (tiny.cut(FILES[1], -7), "not a whole safetensors file"),
        (lambda folder: tiny.edit_tensors(folder / FILES[1], lambda tensors: tensors.pop(UP)), f"missing tensor {UP}"),
    ],
)  # fmt: skip
def test_an_adapter_that_would_be_misread_is_refused(ours, base, tmp_path, change, message):
    model.save_adapter(adapted(ours), tmp_path, base=str(base))
    change(tmp_path) if callable(change) else tiny.edit_json(tmp_path / "adapter_config.json", **change)
    refused(message, model.load_adapter, model.load(base)[0], tmp_path)


def test_a_frozen_pair_gets_no_gradient_and_what_an_adapter_forbids_is_refused(ours, tmp_path):
    adapted(ours)
    frozen = model.joints(ours)[0].linears
    for linear in frozen:
        linear.lora_A.requires_grad_(False), linear.lora_B.requires_grad_(False)
    ours.logits(*tiny.row(9)).sum().backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in model.adapter_parameters(ours).values())
    with pytest.raises(TypeError, match="Joint"):
        frozen[0](torch.ones(1, 64))
    refused("has an adapter already", model.add_lora, ours, 4, 8)
    refused("save_adapter", model.save, ours, tiny.tokenizer(), tmp_path / "m")
    assert not list(tmp_path.iterdir())
