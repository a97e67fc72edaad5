"""train_rl's step against TRL's GRPOTrainer: its own loss on identical answers, log-probs and advantages."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import model
import train_rl
from tests import families, tiny
from tests.test_rl import drawn, loss_and_gradient, off_policy, settings

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def transformer(folder):
    return model.load(str(folder))[0]


def trainer_of(folder, out, config, micro_batches):
    """TRL's trainer over the same weights, told to clip, divide and heat as we do."""
    arguments = trl.GRPOConfig(
        output_dir=str(out), loss_type="dapo", epsilon=config.clip_low, epsilon_high=config.clip_high,
        delta=train_rl.CLIP_DUAL, beta=0.0, temperature=config.temperature, max_completion_length=config.max_tokens,
        num_generations=4, per_device_train_batch_size=12 // micro_batches, gradient_accumulation_steps=micro_batches,
        use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = Dataset.from_list([{"prompt": "x"}] * 12)
    made = trl.GRPOTrainer(
        network, reward_funcs=lambda completions, **more: [0.0] * len(completions), args=arguments,
        train_dataset=rows, processing_class=families.tokenizer("r1-qwen"),
    )  # fmt: skip
    made.current_gradient_accumulation_steps = micro_batches
    made.model.train()
    return made


def padded(rows: list[list], left: bool, value=0):
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows, strict=True)])


def batch(live) -> dict:
    """The inputs of GRPOTrainer._compute_loss: prompts padded on the left, answers on the right."""
    prompts, actions = [d.prompt_ids for d in live], [d.action for d in live]
    return {
        "prompt_ids": padded(prompts, True), "prompt_mask": padded([[1] * len(p) for p in prompts], True),
        "completion_ids": padded(actions, False), "completion_mask": padded([[1] * len(a) for a in actions], False),
        "old_per_token_logps": padded([d.logprobs for d in live], False, 0.0),
        "advantages": torch.tensor([d.advantage for d in live]),
    }  # fmt: skip


def theirs(trainer, live, micro_batches) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one of TRL's optimizer steps, summed over its micro-batches."""
    size, loss = len(live) // micro_batches, 0.0
    for i in range(0, len(live), size):
        inputs = batch(live[i : i + size])
        inputs["num_items_in_batch"] = torch.tensor(float(sum(len(d.action) for d in live)))
        part = trainer._compute_loss(trainer.model, inputs)
        part.backward()
        loss += part.item()
    return loss, torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())])


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("changes", "spread"),
    [({}, 0.0), ({}, 0.5), ({"temperature": 0.7}, 0.3), ({"clip_low": 0.1, "clip_high": 0.4}, 0.8)],
)
def test_a_step_is_that_of_trl(folder, transformer, tmp_path, changes, spread, micro_batches):
    config = settings(**changes, prompts_per_step=3, group=4)
    live = off_policy(drawn(transformer, config.temperature, stop=True), spread)
    assert len({len(d.action) for d in live}) > 3  # padding matters
    wanted, gradient = theirs(trainer_of(folder, tmp_path, config, micro_batches), live, micro_batches)
    loss, mine, _ = loss_and_gradient(transformer, live, config)
    assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert (mine - gradient).norm() < 1e-5 * gradient.norm()


def test_the_check_notices_another_clip(folder, transformer, tmp_path):
    live = off_policy(drawn(transformer, stop=True), 0.5)
    wanted, _ = theirs(trainer_of(folder, tmp_path, settings(clip_low=0.3), 1), live, 1)
    assert abs(loss_and_gradient(transformer, live, settings())[0] - wanted) > 1e-4


def test_the_std_advantage_is_that_of_trl():
    """TRL adds 1e-4 to the deviation, we add 1e-6; on rewards of 0 and 1 that is 2e-4 apart."""
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    r = torch.tensor(rewards)
    wanted = ((r - r.mean()) / (r.std() + 1e-4)).tolist()
    assert train_rl.advantages(rewards, "std") == pytest.approx(wanted, rel=5e-4)
