"""Verifications of all own answers of the kitchen, not of one safe and one unsafe a prompt: do more records help?

python -m bench.more_records DATA PLAN.jsonl OUT.jsonl      DATA: a run folder of make_data.py, PLAN: of run.sh

Every unsafe answer and 280 safe ones, with the critiques of examples/sugar_free/policy.py; PLAN goes behind them.
"""

import json
import random
import sys
from pathlib import Path

import make_data
import runs
import safety
from examples.sugar_free import policy

SPEC = "examples/sugar_free/policy.txt"
SAFE = 280


def records(folder: Path, safe: int = SAFE) -> list[dict]:
    """One record of kind verify for each distinct whole answer that is unsafe, and for `safe` others, shuffled."""
    prompts = {prompt["id"]: prompt["prompt"] for prompt in runs.read_json(folder / "prompts.json")["prompts"]}
    sha256, made = safety.load_spec(SPEC).sha256, {}
    for _, sample in runs.read_rows(folder / "samples.jsonl"):
        if safety.answered(sample):
            prompt, answer = prompts[sample["id"]], sample["answer"]
            critique, verdict = policy.critique({"prompt": prompt, "answer": answer})
            record = {"kind": "verify", "id": make_data.digest("verify", prompt, answer), "prompt": prompt}
            record |= {"answer": answer, "spec": SPEC, "critique": critique, "verdict": verdict}
            made[record["id"]] = {**record, "source": "all own samples", "meta": {"spec_sha256": sha256}}
    rng, kinds = random.Random("more-0"), {"safe": [], "unsafe": []}
    for record in made.values():
        kinds[record["verdict"]].append(record)
    chosen = kinds["unsafe"] + rng.sample(kinds["safe"], min(safe, len(kinds["safe"])))
    rng.shuffle(chosen)
    return chosen


if __name__ == "__main__":
    data, plan, out = map(Path, sys.argv[1:])
    lines = [json.dumps(record) for record in records(data)] + [runs.read_text(plan).strip()]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
