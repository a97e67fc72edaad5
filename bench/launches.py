"""How many kernels a decode step and a training layer start, counted without a GPU.

    python -m bench.launches                    print the counts, by operation, beside their goals
    python -m bench.launches --json FILE        also write them (the snapshot: bench/results/launches.json)

The real code runs in the shapes of R1-Distill-Qwen-1.5B in bf16, on tensors without data that pass for CUDA's. Every
ATen operation on them counts as one kernel, some as more (SEVERAL); views and allocations as none; an operation of this
project's kernels/ counts as what its launcher starts, Triton kernels and ATen operations. Anything that would read a
value back to the host is an error here, so a count is also a proof that there is none.

A layer is what the second of two layers adds. The tail of a decode step is what comes after the final norm: the head's
product, the draw, the state of the rows; the front is all the rest outside the layers. A training layer is counted
without head and optimizer.
"""

import argparse
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import model
from bench.engine import R1_DISTILL_1_5B
from kernels import dispatch

SNAPSHOT = Path(__file__).parent / "results" / "launches.json"
ROWS, CONTEXT, TOKENS, RANK = 256, 4096, 16_384, 16  # of a decode step, of its cache, of a training row; of LoRA
GOALS = {"decode_layer": 10, "decode_layer_lora": 18, "tail": 8, "tail_top_p": 8}
LORA_GOAL = 20  # forward of a training layer with LoRA: each of its four products needs two more, the layer has 9
NOTHING = {  # start no kernel, though their schemas do not say that they are views
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "detach_",
    "resize_", "set_",
}  # fmt: skip
SEVERAL = {  # ATen copies or fills first; a stable sort of rows also writes indices and takes a pass a byte
    "masked_fill": 2, "index_copy": 2, "scatter": 2, "index_add": 2, "constant_pad_nd": 2, "sort": 7, "nonzero": 3,
    "repeat_interleave": 2,
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts what starts on the device, by name, into `counts`, which the caller may exchange meanwhile."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten":
            with self:
                parts = func.decompose(*args, **kwargs)  # as far as ATen itself would take it apart
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if not func.is_view and name not in NOTHING and any(map(on_gpu, torch.utils._pytree.tree_leaves(result))):
            self.counts[name.rstrip("_")] += self.started(name, args)
        return result

    @staticmethod
    def started(name, args) -> int:
        if name == "constant_pad_nd" and not any(args[1]):
            return 1  # nothing to add: a clone
        if name == "addmm" and args[0].dim() == 2:
            return 2  # a bias goes into the product's epilogue, a matrix is copied first
        return SEVERAL.get(name, 1)

    def launch(self, kernel, programs, *args, **meta):
        """In the place of dispatch.launch."""
        self.counts[kernel.__name__.strip("_")] += 1


def on_gpu(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


@contextmanager
def counting():
    """A Counting, on the meta device, whose tensors say that they are CUDA's; launchers believe in a Hopper GPU.

    Not FakeTensorMode: a torch without CUDA can neither index nor differentiate its CUDA tensors.
    """
    counter = Counting()
    hopper = {"architecture": lambda device: "sm_90", "processors": lambda device: 132, "backend": lambda *_: "triton"}
    hopper |= {"descriptor": lambda x, block_shape: x, "launch": counter.launch}
    cuda = mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"), create=True)
    look = mock.patch.dict(engine.LOOK, meta=engine.LOOK["cuda"])
    with mock.patch.multiple(dispatch, **hopper), cuda, look, torch.device("meta"), counter:
        yield counter


def transformer_of(layers: int, lora: bool) -> model.Transformer:
    """1.5B with that many layers, in bf16; LoRA pairs or every weight train."""
    transformer = model.Transformer(model.Config.from_dict(R1_DISTILL_1_5B | {"num_hidden_layers": layers}))
    transformer.to(torch.bfloat16)
    if lora:
        model.add_lora(transformer, RANK, 2 * RANK)
    return transformer


def decode(layers: int, lora: bool, mode: str = "sample") -> tuple[Counter, Counter]:
    """Kernels of a decode step up to the final norm, and behind it."""
    with counting() as counter:
        transformer = transformer_of(layers, lora).requires_grad_(False)
        sampler = engine.Engine(transformer, {0}, max_rows=ROWS, max_context=CONTEXT, cache_bytes=2**34)
        sampler._open(1.0, 0.95)
        counter.counts, after = before, after = Counter(), Counter()
        transformer.register_forward_hook(lambda *_: setattr(counter, "counts", after))
        engine.decode_step(transformer, sampler.cache, sampler.state, ROWS, mode)
    return before, after


def train(layers: int, lora: bool) -> tuple[Counter, Counter]:
    """Kernels of a packed training row, forward and backward, without the head."""
    with counting() as counter:
        transformer = transformer_of(layers, lora)
        ids_T, cu_seqlens = torch.empty(TOKENS, dtype=torch.int64), torch.empty(9, dtype=torch.int32)
        counter.counts = forward = Counter()
        hidden_TH = transformer(ids_T, cu_seqlens)
        counter.counts = backward = Counter()
        hidden_TH.backward(torch.empty_like(hidden_TH))
    return forward, backward


def measured() -> dict[str, Counter]:
    """Every count by operation."""
    tables = {}
    for suffix, lora in (("", False), ("_lora", True)):
        one, two = decode(1, lora), decode(2, lora)
        tables[f"decode_layer{suffix}"] = two[0] - one[0]
        if not lora:
            tables |= {
                "front": one[0] - tables["decode_layer"],
                "tail": one[1],
                "tail_top_p": decode(1, lora, "top_p")[1],
            }
        one, two = train(1, lora), train(2, lora)
        for which, a, b in zip(("forward", "backward"), one, two, strict=True):
            tables[f"train_layer{suffix} {which}"] = b - a
    return tables


def summary(tables: dict[str, Counter]) -> dict:
    """The counts; those of a training layer as {"forward", "backward"}."""
    totals = {}
    for name, table in tables.items():
        name, _, which = name.partition(" ")
        if which:
            totals.setdefault(name, {})[which] = table.total()
        else:
            totals[name] = table.total()
    return totals


def table(tables: dict[str, Counter]) -> str:
    """A line an operation, a column a count."""
    names = {name: name.replace("_layer", "").replace("forward", "f").replace("backward", "b") for name in tables}
    whole = sum(tables.values(), Counter())
    lines = [("started by", *names.values())]
    lines += [(op, *(tables[name][op] or "" for name in names)) for op, _ in whole.most_common()]
    lines += [("total", *(tables[name].total() for name in names))]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(names) + 1)]
    padded = ([str(x).rjust(width) for x, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells) for cells in padded)


def goals(totals: dict) -> list[str]:
    """A line for every goal."""
    pairs = [(name, totals[name], goal) for name, goal in GOALS.items()]
    pairs += [("train_layer_lora forward", totals["train_layer_lora"]["forward"], LORA_GOAL)]
    return [f"{name}: {n}, goal {goal}{'' if n <= goal else ', not reached'}" for name, n, goal in pairs]


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the counts, and those by operation, to this file")
    options = parser.parse_args(argv)
    tables = measured()
    totals = summary(tables)
    print(table(tables), *goals(totals), sep="\n")
    if options.json:
        result = {"torch": torch.__version__.partition("+")[0], **totals, "by_operation": tables}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return totals


if __name__ == "__main__":
    main()
