"""The whole model and the sampler on the kernels, against the same on the references."""

import pytest
import torch

import engine
import kernels
from kernels import dispatch
from tests import tiny_models

EVERY_KERNEL_OF_TRAINING = [
    "_attention_delta_kernel", "_attention_dkdv_kernel", "_attention_dq_kernel", "_attention_forward_kernel",
    "_combine_kernel", "_dlogits_kernel", "_rms_norm_backward_kernel", "_rms_norm_forward_kernel",
    "_rope_backward_kernel", "_rope_kernel", "_score_kernel", "_swiglu_backward_kernel", "_swiglu_forward_kernel",
]  # fmt: skip


@pytest.fixture(params=["qwen2", "qwen3"])
def transformer(request):
    return tiny_models.pair(request.param, tied=True, hidden_size=128, num_attention_heads=2, head_dim=64)[1]


def loss_and_gradients(transformer, ids_T, labels_T, cu_seqlens):
    transformer.zero_grad()
    logp_T, entropy_T = kernels.linear_logp(transformer(ids_T, cu_seqlens), transformer.head_weight, labels_T, 0.8)
    (-logp_T.sum() - 0.1 * entropy_T.sum()).backward()
    return logp_T.detach(), entropy_T.detach(), {n: p.grad.clone() for n, p in transformer.named_parameters()}


def both(function, *arguments):
    """The same on the kernels and on the references."""
    before = dispatch.LAUNCHES.copy()
    ours = function(*arguments)
    launched = dispatch.LAUNCHES - before
    try:
        kernels.force("reference")
        return ours, function(*arguments), launched
    finally:
        kernels.force(None)


def test_training_step(transformer):
    ids_T = torch.randint(160, (40,))
    labels_T = torch.randint(160, (40,)).masked_fill(torch.arange(40) % 3 == 0, -100)
    cu_seqlens = torch.tensor([0, 7, 7, 40], dtype=torch.int32)
    ours, theirs, launched = both(loss_and_gradients, transformer, ids_T, labels_T, cu_seqlens)
    assert sorted(launched) == EVERY_KERNEL_OF_TRAINING
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sampler(transformer):
    def sample():
        prompts = [[5, 6, 7], list(range(10, 80))]
        sampler = engine.Engine(transformer, [0])
        return [s for group in sampler.generate(prompts, n=1, max_tokens=3, seed=3) for s in group]

    ours, theirs, launched = both(sample)
    assert launched["_decode_kernel"] and launched["_attention_forward_kernel"]
    for a, b in zip(ours, theirs, strict=True):
        assert a.ids == b.ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-5)
