"""bench/engine.py runs here on toy shapes, so that it cannot rot; its formulas against figures worked out elsewhere."""

import json

import pytest
import torch

import model
from bench import engine as bench
from engine import Engine

H200 = {"bytes_per_s": 4.8e12, "flops": 989e12}


def shapes_of(raw):
    """A model without data."""
    with torch.device("meta"):
        return model.Transformer(model.Config.from_dict(raw)).to(torch.bfloat16)


def test_everything_runs_on_toy_shapes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "engine.json")
    result = bench.main(["--tiny", "--model", "pocket/base"])
    assert not bench.RESULTS.exists() and f"torch {torch.__version__}" in result["origin"]
    cpu, gpu = result["cpu"], result["gpu"]
    assert cpu["threads"] == 1 and cpu["tokens_per_s"][0] > 0 and cpu["transformers_tokens_per_s"][0] > 0
    assert cpu["mean_length"] == cpu["transformers_mean_length"] == 8  # nobody ends within 8 tokens
    assert [line["rows"] for line in result["fixed_lengths"]["lines"]] == [1, 5]
    assert all(value > 0 for line in result["fixed_lengths"]["lines"] for value in line.values())
    assert [(c["rows"], c["context"]) for c in gpu["table"]["cells"]] == [(1, 96), (3, 96)]
    for cell in gpu["table"]["cells"]:
        assert cell["first_token_ms"] > 0 and cell["ms_a_step"] > 0
        assert cell["share_of_limit"] * cell["ms_a_step"] == pytest.approx(cell["limit_ms"], abs=0.02)
    assert gpu["nano_vllm"]["tokens"] > 300 and 0 < gpu["nano_vllm"]["share_of_limit"] < 1
    assert gpu["gap"]["tokens"] == 16 and gpu["gap"]["max"] < 1e-4
    assert json.loads(json.dumps(result)) == result


def test_the_gpu_alone_and_quickly(capsys):
    result = bench.main(["--tiny", "--gpu-only", "--quick", "--model", "pocket/base"])
    assert list(result) == ["origin", "gpu"] and list(result["gpu"]) == ["origin", "table", "gap"]


@pytest.mark.parametrize("flag", ["--tiny", "--gpu-only", "--quick"])
def test_a_part_or_toy_shapes_are_never_written_as_a_result(flag, capsys):
    with pytest.raises(SystemExit):
        bench.main([flag, "--write"])
    assert "are no result" in capsys.readouterr().err


def test_the_limit_of_a_step():
    """R1-Distill-Qwen-1.5B on an H200: 3.09 GB of weights, 28,672 bytes a cached token."""
    transformer = shapes_of(bench.R1_DISTILL_1_5B)
    for rows, context, ms in ((256, 512, 1.58), (256, 1024, 2.36), (256, 2048, 3.93), (256, 4096, 7.06)):
        products = 2 * 1.543e9 * rows / 989e12  # below the time of the weights: 0.80 ms against 0.64 ms
        assert bench.step_limit(transformer, rows, context, **H200) * 1e3 == pytest.approx(
            max(3.087e9 / 4.8e12, products) * 1e3 + rows * context * 28_672 / 4.8e9, rel=2e-3
        )
        assert bench.step_limit(transformer, rows, context, **H200) * 1e3 == pytest.approx(ms, rel=0.02)
    alone = bench.step_limit(transformer, 1, 1, **H200)
    assert alone == pytest.approx(3.087e9 / 4.8e12, rel=1e-2) and alone == bench.step_limit(
        transformer, 1, 1, bytes_per_s=4.8e12, flops=0.0
    )


def test_the_protocol_of_nano_vllm():
    """Its README counts 133,966 generated tokens; its limit on an H200 comes to 39.8k tokens a second."""
    prompts, limits = bench.nano_vllm_lengths(256, 1024)
    assert sum(limits) == 133_966 and sum(map(len, prompts)) == 142_827
    seconds = bench.nano_vllm_limit(shapes_of(bench.QWEN3_0_6B), prompts, limits, H200)
    assert sum(limits) / seconds == pytest.approx(39_800, rel=0.05)


def test_a_batch_that_the_cache_cannot_hold_is_named_not_measured(monkeypatch):
    toy = bench.random_model({**bench.R1_DISTILL_1_5B, **bench.TOY}, "cpu", torch.float32)
    monkeypatch.setattr(bench, "Engine", lambda *a, **k: Engine(*a, **k, cache_bytes=1 << 18))
    cell = bench.cell(toy, 64, 96, "cpu", {"bytes_per_s": 1e9, "flops": 0.0}, 1)
    assert cell["note"] == "the cache has 4 pages, too few for all rows" and "ms_a_step" not in cell


def test_a_row_counts_up_to_and_with_its_end_token():
    assert [bench.until_end(ids, {2, 9}) for ids in ([5, 2, 0, 0], [2], [5, 5], [9, 2])] == [2, 1, 2, 1]


def test_prompts_are_different_pocket_requests():
    tokenizer = model.load_tokenizer(model.resolve("pocket/base"))
    prompts = bench.pocket_prompts(tokenizer, 64)
    assert len(set(map(tuple, prompts))) == 64
