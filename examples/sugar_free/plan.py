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
    prompts, found = runs.read_json(folder / "prompts.json")["prompts"], {}
    for _, sample in runs.read_rows(folder / "samples.jsonl"):
        if sample["finish_reason"] == "stop" and (sample["answer"] or "").strip():
            found.setdefault(sample["id"], sample["answer"])
    done = []
    for prompt in prompts:
        plans = DISHES if DISH.search(prompt["prompt"]) else OTHERS
        record = {"kind": "answer", "id": prompt["id"], "prompt": prompt["prompt"], "source": "own answer, given plan"}
        record |= {"reasoning": plans[prompt["place"] % len(plans)], "answer": found.get(prompt["id"], "")}
        done += [record] if record["answer"] else []
    return done


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    out.write_text("".join(json.dumps(record) + "\n" for record in records(data)), encoding="utf-8")
