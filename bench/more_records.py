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

POLICY, SPEC = "examples/sugar_free/policy.py", "examples/sugar_free/policy.txt"
SAFE = 280


def records(folder: Path, safe: int = SAFE) -> list[dict]:
    """One record of kind verify for each distinct whole answer that is unsafe, and for `safe` others, shuffled."""
    prompts = {prompt["id"]: prompt for prompt in runs.read_json(folder / "prompts.json")["prompts"]}
    jobs = [{**prompts[sample["id"]], **sample} for _, sample in runs.read_rows(folder / "samples.jsonl")]
    for job in (jobs := [job for job in jobs if safety.answered(job)]):
        critique, verdict = policy.critique(job)
        job |= {"spec": SPEC, "critique": critique, "verdict": verdict, "safe": verdict == "safe"}
    config = make_data.Config(guard=POLICY, expert=POLICY)
    made = {record["id"]: record for record in make_data.verification_records(jobs, config, safety.load_spec(SPEC))[0]}
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
