"""The README's study: every method with several seeds, each a run of the scripts as a user would start them.

    python -m bench.study                                   SFT methods on the shipped pocket, seeds 0 1 2
    python -m bench.study --methods base+grpo star+grpo verification+grpo
    python -m bench.study --model DIR --data DIR            another pocket world (python -m pocket.build)

A run that has its result.json is not repeated, so an interrupted study goes on where it stopped. "+grpo" runs start
from the adapter of the SFT run of the same seed. The table shows every seed; the last lines are mean and 95 % t
interval over seeds, the sample that a claim about a method takes.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import runs
import train_sft
from runs import UserError, option

SFT = {
    "verification": ("verify.jsonl", "both"),
    "no-critique": ("verify.jsonl", "judgment"),
    "no-judgment": ("verify.jsonl", "critique"),
    "star": ("star.jsonl", "both"),
    "safechain": ("safechain.jsonl", "both"),
}
GRPO = ("base+grpo", "star+grpo", "safechain+grpo", "verification+grpo")
WRAPPERS = ("role", "story", "urgent", "encoded")
COLUMNS = ("plain", *WRAPPERS, "hcot", "prefill", "benign", "lookalike", "sums", "verify")


@dataclass
class Config:
    methods: tuple = option(("verification", "no-critique", "star", "safechain"), f"of {', '.join((*SFT, *GRPO))}")
    seeds: tuple = option(("0", "1", "2"), "of LoRA, split, data order and samples")
    model: str = option("pocket/base", "a pocket model")
    data: str = option("pocket/data", "folder with verify.jsonl, star.jsonl, safechain.jsonl of that model")
    out: str = option("runs/study", "folder of the runs; finished ones are kept")

    def problems(self) -> list[str]:
        unknown = [m for m in self.methods if m not in (*SFT, *GRPO)]
        wrong = [f"--methods {m}: not one of {', '.join((*SFT, *GRPO))}" for m in unknown]
        return wrong + [f"--seeds {s}: not a whole number" for s in self.seeds if not s.isdecimal()]


def command(config: Config, method: str, seed: str) -> list[str]:
    """The command line of one run."""
    out = ["--model", config.model, "--seed", seed, "--out", str(Path(config.out) / f"{method}-{seed}")]
    start = method.removesuffix("+grpo")
    if method in SFT:
        file, target = SFT[method]
        words = ["--data", str(Path(config.data) / file), "--target", target, "--tokens-per-step"]
        return ["train_sft.py", *words, str(tokens_per_step(config, file)), *out]
    adapter = [] if start == "base" else ["--adapter", str(Path(config.out) / f"{start}-{seed}" / "model")]
    return ["train_rl.py", *adapter, *out]


def tokens_per_step(config: Config, file: str) -> int:
    """As many optimizer steps for every method: records of the baselines hold the same supervised tokens after shorter
    prompts, so a step takes the same share of the file."""
    files = json.loads((Path(config.data) / "data_card.json").read_text())["files"]
    usual = runs.parse(train_sft.Config, ["--model", config.model])[0].tokens_per_step
    return round(usual * files[file]["all"] / files["verify.jsonl"]["all"])


def finished(config: Config, method: str, seed: str) -> dict:
    """The result of one run, which is made, or gone on with, where it is missing."""
    folder = Path(config.out) / f"{method}-{seed}"
    if not (folder / "result.json").exists():
        words = command(config, method, seed)
        words = [words[0], "--resume", str(folder)] if (folder / "config.json").exists() else words
        print("python " + " ".join(words), flush=True)
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            if subprocess.run([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT).returncode:
                raise UserError(f"{method}, seed {seed} failed; its output is in {log}")
    return json.loads((folder / "result.json").read_text())


def t_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % t interval) of two values or more."""
    from scipy import stats

    mean, n = sum(values) / len(values), len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)


def row(figures: dict) -> dict[str, float]:
    """{column: percent} of one evaluation, with the mean over the four wrappers."""
    values = {name: 100 * figures[f"pocket:{name}"]["value"] for name in COLUMNS}
    return {**values, "wrappers": sum(values[name] for name in WRAPPERS) / len(WRAPPERS)}


def line(name: str, values: dict[str, float], minutes: str = "") -> str:
    return f"| {name} | " + " | ".join(f"{values[c]:.1f}" for c in (*COLUMNS, "wrappers")) + f" | {minutes} |"


def table(results: dict[tuple[str, str], dict]) -> str:
    """Markdown: the base before training, every run, then each method's mean and interval over its seeds."""
    head = ["run", *COLUMNS, "mean of 4", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    bases = {seed: row(r["before"]) for (method, seed), r in results.items() if method in SFT}
    lines += [line(f"base, sample seed {seed}", values) for seed, values in bases.items()]
    by_method = {}
    for (method, seed), result in results.items():
        after = row(result["after"])
        by_method.setdefault(method, []).append(after)
        lines.append(line(f"{method}, seed {seed}", after, f"{result['minutes']:.1f}"))
    for method, rows in by_method.items():
        if len(rows) == 1:  # no interval
            continue
        intervals = {c: t_interval([r[c] for r in rows]) for c in rows[0]}
        cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in (intervals[c] for c in (*COLUMNS, "wrappers"))]
        lines.append(f"| **{method}, {len(rows)} seeds** | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def main(config: Config, origin: dict) -> int:
    results = {(m, s): finished(config, m, s) for m in config.methods for s in config.seeds}
    shown = table(results)
    runs.write_atomic(Path(config.out) / "table.md", (shown + "\n").encode())
    print(shown)
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)
