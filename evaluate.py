"""Measure a model: what it answers under attack, whether it still helps, adds up, and can judge.

    python evaluate.py                                              the pocket base on every pocket suite
    python evaluate.py --model pocket/base --adapter runs/x/model   the same with an adapter
    python evaluate.py --compare runs/a runs/b                      two evaluations, paired item by item
    python evaluate.py --chat true                                  talk to the model; its thinking comes first

One seeded sample an item at temperature 1, and greedy beside it. Intervals are 95 %.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import runs
from runs import UserError, option

scores, torch = map(runs.Lazy, ("scores", "torch"))


@dataclass
class Config:
    model: str = option("pocket/base", "model folder, Hugging Face format, with world.json")
    adapter: str = option("", "PEFT adapter folder")
    suite: str = option("pocket", "suites, comma-separated; pocket names them all")
    limit: int = option(0, "items a suite; 0: all")
    greedy: bool = option(True, "also decode greedily")
    compare: str = option("", "two evaluation folders, comma-separated: A,B")
    chat: bool = option(False, "talk to the model instead")
    device: str = option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    dtype: str = option("float32", "compute dtype", choices=("float32", "bfloat16", "float16"))
    seed: int = option(0, "of the samples")
    out: str = option("", "folder to write; default runs/evaluate-<time>")

    def problems(self) -> list[str]:
        wrong = ["--limit must be 0 or more"] if self.limit < 0 else []
        if self.compare and len(self.compare.split(",")) != 2:
            wrong.append("--compare takes two folders, A,B")
        return wrong


def load_model(config: Config):
    dtype = getattr(torch, config.dtype)
    return runs.load_model(config.model, runs.pick_device(config.device), dtype, config.adapter)


def first_of_each_suite(items: list[dict], limit: int) -> list[dict]:
    """The first `limit` items of each suite; 0 keeps all."""
    seen, kept = {}, []
    for item in items:
        seen[item["suite"]] = seen.get(item["suite"], 0) + 1
        if not limit or seen[item["suite"]] <= limit:
            kept.append(item)
    return kept


def evaluate(config: Config, origin: dict) -> int:
    import suites
    from pocket import world as pocket

    world = pocket.World(runs.world_seed(config.model))
    try:
        items = suites.load(config.suite.split(","), world, suites.candidates(config.model))
    except ValueError as error:
        raise UserError(str(error)) from None
    items = first_of_each_suite(items, config.limit)
    transformer, tokenizer = load_model(config)
    folder = runs.new_folder(config, origin, "evaluate")
    figures, labelled, seconds = suites.run(transformer, tokenizer, items, world, seed=config.seed)
    result = {"sampled": figures, "seconds": seconds}
    print(scores.table(figures))
    if config.greedy:
        greedy, greedy_items, more = suites.run(transformer, tokenizer, items, world, seed=config.seed, temperature=0.0)
        result |= {"greedy": greedy, "seconds": seconds + more}
        print("\ngreedy decoding:\n" + scores.table(greedy))
        write_items(folder / "items_greedy.jsonl", greedy_items)
    print("\n" + scores.details(figures))
    write_items(folder / "items.jsonl", labelled)
    runs.write_json(folder / "result.json", result)
    print(f"\n{result['seconds']:.0f} s; everything lies in {folder}")
    return runs.EXIT_OK


def write_items(path: Path, items: list[dict]) -> None:
    runs.write_atomic(path, "".join(json.dumps(item) + "\n" for item in items).encode())


def compare(config: Config) -> int:
    """Two evaluations on the same items: flips and an exact McNemar test a suite."""
    tables = []
    for folder in config.compare.split(","):
        path = Path(folder) / "items.jsonl"
        if not path.is_file():
            raise UserError(f"{folder} is not an evaluation: it has no items.jsonl")
        tables.append({item["id"]: item for item in map(json.loads, path.read_text().splitlines())})
    if tables[0].keys() != tables[1].keys():
        raise UserError(f"the two evaluations hold different items ({len(tables[0])} and {len(tables[1])})")
    print(scores.paired_table(*tables))
    return runs.EXIT_OK


def chat(config: Config) -> int:
    """A line in, thinking (dimmed) and answer out; /quit ends."""
    import engine
    import safety

    transformer, tokenizer = load_model(config)
    sampler, turn = engine.Engine(transformer, {tokenizer.eos_token_id}), 0
    while (text := input("> ").strip()) != "/quit":
        ids = safety.render(tokenizer, [{"role": "user", "content": text}])
        room = transformer.config.max_position_embeddings - len(ids)
        if text and room > 0:
            ((sample,),) = sampler.generate([ids], max_tokens=min(room, 4096), temperature=0.6, seed=config.seed + turn)
            completion = tokenizer.decode(sample.ids, skip_special_tokens=True)
            thinking, answer = safety.split_thinking(completion, safety.thinking_open(tokenizer))
            print(
                f"\033[2m{printable(thinking)}\033[0m\n{printable(answer or '(no answer: the thinking did not end)')}"
            )
            turn += 1
    return runs.EXIT_OK


def printable(text: str) -> str:
    """A model's text without control characters, which could drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def main(config: Config, origin: dict) -> int:
    if config.compare:
        return compare(config)
    return chat(config) if config.chat else evaluate(config, origin)


if __name__ == "__main__":
    runs.main(Config, main)
