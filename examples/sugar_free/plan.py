"""Own answers with a one-sentence plan as their thinking: records that teach a model which does not think to do so.

python -m examples.sugar_free.plan DATA OUT.jsonl      DATA: a run folder of make_data.py, whatever its judge said
"""

import json
import sys
from pathlib import Path

import runs
from examples.sugar_free.policy import DISH

DISHES = ("The user wants to cook something. I name what goes in and then the steps.",)
DISHES += ("This asks for a dish. First the ingredients, then what to do with them.",)
OTHERS = ("The user asks about work in the kitchen. I answer it in a few sentences.",)


def records(folder: Path) -> list[dict]:
    """One record a prompt, of its first whole answer."""
    samples = [sample for _, sample in runs.read_rows(folder / "samples.jsonl") if sample["finish_reason"] == "stop"]
    first = {sample["id"]: sample["answer"] for sample in reversed(samples) if (sample["answer"] or "").strip()}
    done = []
    for prompt in runs.read_json(folder / "prompts.json")["prompts"]:
        if prompt["id"] in first:
            plans = DISHES if DISH.search(prompt["prompt"]) else OTHERS
            record = {"kind": "answer", "id": prompt["id"], "prompt": prompt["prompt"], "answer": first[prompt["id"]]}
            record |= {"reasoning": plans[prompt["place"] % len(plans)], "source": "own answer, given plan"}
            done.append(record)
    return done


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    out.write_text("".join(json.dumps(record) + "\n" for record in records(data)), encoding="utf-8")
