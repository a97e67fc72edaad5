"""How many kernels the model starts: the counts are those of the snapshot, and one more kernel is noticed."""

import json

import pytest
import torch

import model
import trainers
from bench import launches
from bench.engine import QWEN3_0_6B, R1_DISTILL_1_5B

SNAPSHOT = json.loads(launches.SNAPSHOT.read_text())


def layer(count, which, lora=False):
    return (count(2, lora)[which] - count(1, lora)[which]).total()


@pytest.mark.skipif(
    not torch.__version__.startswith(SNAPSHOT["torch"]), reason=f"counted with torch {SNAPSHOT['torch']}"
)
def test_the_counts_are_those_of_the_snapshot(tmp_path, capsys):
    """Renew it with  python -m bench.launches --json bench/results/launches.json"""
    launches.main(["--json", str(tmp_path / "counts.json")])
    assert json.loads((tmp_path / "counts.json").read_text()) == SNAPSHOT
    assert "rms_norm_forward_kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "which", "more"), [(launches.decode, 0, 1), (launches.train, 0, 1), (launches.train, 1, 1)]
)
def test_one_more_kernel_in_a_layer_is_counted(monkeypatch, count, which, more):
    before, forward = layer(count, which), model.MLP.forward
    monkeypatch.setattr(model.MLP, "forward", lambda self, x_TH: 2 * forward(self, x_TH))
    assert layer(count, which) == before + more


def test_views_and_allocations_start_nothing_and_a_copy_does():
    with launches.counting() as counter:
        x = torch.empty(4, 6)
        x.T.flatten(0, 0)[1:].unsqueeze(0).view(5, 4), torch.empty_like(x), x.contiguous(), x.float()
        assert not counter.counts
        x.T.contiguous(), torch.nn.functional.pad(x, (0, 2)), x.masked_fill(x == 0, 1)
        assert counter.counts == {"clone": 1, "constant_pad_nd": 2, "eq": 1, "masked_fill": 2}
        counter.counts.clear()
        torch.addmm(torch.empty(4), x, x.T), torch.addmm(y := torch.empty(4, 4), x, x.T), y.addmm_(x, x.T)
    assert counter.counts == {"addmm": 1 + 2 + 1}


def test_reading_a_value_back_to_the_host_is_an_error():
    with launches.counting(), pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3).sum().item()


@pytest.mark.parametrize("raw", [R1_DISTILL_1_5B, QWEN3_0_6B])
def test_the_memory_plan_knows_what_backward_keeps_of_a_layer(raw):
    def kept(layers):
        with launches.counting():
            transformer = model.Transformer(model.Config.from_dict(raw | {"num_hidden_layers": layers}))
            own = {p.untyped_storage()._cdata for p in transformer.to(torch.bfloat16).parameters()}
            saved = {}
            pack = lambda t: saved.setdefault(t.untyped_storage()._cdata, t) is None or t  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                transformer(torch.empty(4096, dtype=torch.int64), torch.empty(9, dtype=torch.int32))
            sizes = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
            return sizes, trainers.training_bytes(transformer, 0, torch.bfloat16, 4096, False)["activations"]

    (one, planned_one), (two, planned_two) = kept(1), kept(2)
    assert two - one == pytest.approx(planned_two - planned_one, rel=0.005)
