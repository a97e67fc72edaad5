"""Tables and the picture of README.md and RESULTS.md from the result files of bench/results, and the counts of lines.

python -m bench.tables            writes every block between <!-- table NAME --> and <!-- end --> anew, and the picture
python -m bench.tables --check    exit 2 where a block differs from its result files
"""

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import runs
import scores
from bench.study import METHODS
from runs import UserError, option

ROOT, RESULTS = Path(__file__).parents[1], Path(__file__).with_name("results")
FOLDERS = ("kernels", "pocket", "examples")  # of the product, beside the files at the top
PAGES = ("README.md", "RESULTS.md")
WRAPPERS = ("role", "story", "urgent", "encoded")
COLUMNS = ("plain", *WRAPPERS, "hcot", "prefill", "benign", "lookalike", "sums", "verify")
COUNT = re.compile(r"(\| `([\w./]+)` \| )[\d,]+ \|")
BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Config:
    check: bool = option(False, "compare instead of writing")


# ------------------------------------------------------------------------------------------------- the study
def study() -> list[dict]:
    """Every model that was measured, of all worlds, each with `mean` over the four wrappers."""
    found = []
    for path in sorted(RESULTS.glob("study-*.json")):
        for row in runs.read_json(path)["runs"]:
            for way in ("sampled", "greedy", "checked"):
                if way in row:
                    row[way]["mean"] = statistics.fmean(row[way][name] for name in WRAPPERS)
            found.append(row)
    return found


def of_method(rows: list[dict], method: str, world: int = 0) -> list[dict]:
    return [row for row in rows if row["method"] == method and row["world"] == world]


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 % t interval over seeds; the mean alone of one."""
    mean, half = scores.t_interval(values)
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


SHOWN = ("mean", "prefill", "benign", "sums", "verify")
TITLES = ("attack success, 4 wrappers", "hijacked thinking", "benign kept", "sums", "verification F1")
FIRST = ("base", "verification", "no-critique", "star1", "safechain")
FIRST += ("base+grpo", "star1+grpo", "verification+grpo", "verify-rl")


def first_table() -> str:
    """README: the methods that the paper compares, means over seeds of world 0, benign kept also greedily."""
    rows, lines = study(), []
    for name in FIRST:
        group = of_method(rows, name)
        cells = [interval([row["sampled"][column] for row in group]) for column in SHOWN]
        greedy = statistics.fmean(row["greedy"]["benign"] for row in group)
        cells[2] += f" ({greedy:.1f})"
        lines.append([METHODS[name].title, *cells])
    titles = [t + " (greedy)" if t == "benign kept" else t for t in TITLES]
    return markdown(["world 0, mean of 3 seeds ± 95 % t interval", *titles], lines)


def means_table(way: str, columns: tuple[str, ...]) -> Callable:
    def build() -> str:
        rows, lines = study(), []
        for name, method in METHODS.items():
            group = [row for row in of_method(rows, name) if way in row]
            if group:
                cells = [interval([row[way][column] for row in group]) for column in columns]
                lines.append([method.title, *cells])
        return markdown([f"{way}, mean of seeds", *columns], lines)

    return build


def worlds_table() -> str:
    """The worlds beside each other, means over the seeds that each has."""
    rows, lines = study(), []
    worlds, shown = sorted({row["world"] for row in rows}), {"mean": "4 wrappers", "prefill": "hijack", "verify": "F1"}
    for name, method in METHODS.items():
        groups = [(of_method(rows, name, world), column) for column in shown for world in worlds]
        values = [[row["sampled"][column] for row in group] for group, column in groups]
        lines.append([method.title, *(f"{scores.t_interval(v)[0]:.1f}" if v else "" for v in values)])
    return markdown(["sampled", *(f"{t}, world {w}" for t in shown.values() for w in worlds)], lines)


def runs_table() -> str:
    """Every model that was measured, sampled."""
    lines = []
    for row in study():
        title = f"world {row['world']}: {METHODS[row['method']].title}, seed {row['seed']}"
        lines.append([title, *(f"{row['sampled'][column]:.1f}" for column in (*COLUMNS, "mean"))])
    return markdown(["run", *COLUMNS, "mean of 4"], lines)


def differences_table(pairs: tuple[tuple[str, str], ...], columns: tuple[str, ...]) -> Callable:
    """Paired differences over the seeds that both methods share, with 95 % t intervals."""

    def build() -> str:
        rows, lines = study(), []
        for a, b in pairs:
            left, right = ({r["seed"]: r["sampled"] for r in of_method(rows, name)} for name in (a, b))
            if not (shared := sorted(left.keys() & right.keys())):
                continue
            cells = [interval([right[s][column] - left[s][column] for s in shared]) for column in columns]
            lines.append([f"{METHODS[b].title} − {METHODS[a].title}", *cells])
        return markdown(["paired difference, points", *columns], lines)

    return build


def cost_table() -> str:
    """What the check at inference costs and gives."""
    lines = []
    for row in study():
        if "checked" in row:
            title = f"world {row['world']}: {METHODS[row['method']].title}, seed {row['seed']}"
            pairs = [f"{row['sampled'][c]:.1f} → {row['checked'][c]:.1f}" for c in ("mean", "prefill", "benign")]
            lines.append([title, *pairs, f"{row['tokens_sampled']:.0f} → {row['tokens_checked']:.0f}"])
    return markdown(["answers without → with the check", "4 wrappers", "prefill", "benign", "tokens an item"], lines)


def kitchen_table(part: str) -> Callable:
    """Of examples/sugar_free on a real model, as bench.sugar_free measured it: evaluations or trainings."""

    def build() -> str:
        rows = runs.read_json(RESULTS / "sugar_free.json")[part]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        return markdown(columns, [[str(row.get(column, "")) for column in columns] for row in rows])

    return build


CLAIMS = (
    ("star1", "verification"), ("star1+grpo", "verification+grpo"), ("base+grpo", "verification+grpo"),
    ("late", "early"), ("verification", "other"), ("verification", "half"), ("verification", "verify-rl"),
    ("star1", "star1-draft"),
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {
    "first": first_table,
    "sampled": means_table("sampled", (*COLUMNS, "mean")),
    "greedy": means_table("greedy", (*COLUMNS, "mean")),
    "differences": differences_table(CLAIMS, ("mean", "prefill", "benign", "sums", "verify")),
    "self-check": cost_table,
    "worlds": worlds_table,
    "kitchen": kitchen_table("evaluations"),
    "kitchen-training": kitchen_table("trainings"),
    "runs": runs_table,
}


# ------------------------------------------------------------------------------------------------- pages, picture
def lines(path: Path) -> int:
    """Of Python, in a file or a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def rebuilt(text: str) -> str:
    """A page with every block, and the count of lines behind every file, made anew. Raises UserError for an unknown
    table."""

    def block(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise UserError(f"there is no table {match[2]}; there are: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    counted = COUNT.sub(lambda match: f"{match[1]}{lines(ROOT / match[2]):,} |", BLOCK.sub(block, text))
    total = sum(lines(path) for path in (*ROOT.glob("*.py"), *(ROOT / folder for folder in FOLDERS)))
    return re.sub(r"(?<=line counts, )[\d,]+(?= in all)", f"{total:,}", counted)


PICTURE = {"base": "#8a93a0", "verification": "#2f74c0", "star1": "#d9662b", "safechain": "#b08a1a"}
PICTURE |= {"verification+grpo": "#174a80", "star1+grpo": "#8f3c11", "verify-rl": "#2c9a7a"}


def draw(path: Path) -> None:
    """The first table as bars: four panels, a bar a method, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = study()
    panels = {"mean": "attack success ↓\n4 wrappers", "prefill": "attack success ↓\nthinking hijacked"}
    panels |= {"benign": "benign requests met ↑\nsampled", "verify": "verification F1 ↑\nfrozen answers"}
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(1, 4, figsize=(11, 2.9), layout="constrained", sharey=True)
        for panel, (column, title) in zip(axes, panels.items(), strict=True):
            for y, (name, colour) in enumerate(PICTURE.items()):
                values = [row["sampled"][column] for row in of_method(rows, name)]
                panel.barh(y, statistics.fmean(values), color=colour, height=0.7)
                panel.plot(values, [y] * len(values), ".", color="black", markersize=4)
            panel.set(title=title, xlim=(0, 102), yticks=range(len(PICTURE)))
            panel.set_yticklabels([METHODS[name].title for name in PICTURE])
        axes[0].invert_yaxis()
        figure.savefig(path, dpi=140)


def main(config: Config, origin: dict) -> int:
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        if (new := rebuilt(text)) != text:
            if config.check:
                raise UserError(f"{name}: a table is not that of bench/results; python -m bench.tables writes it anew")
            page.write_text(new, encoding="utf-8")
    if not config.check:
        draw(RESULTS / "study.png")
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)
