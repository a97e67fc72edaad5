"""One HTML file, and PNGs, of evaluations and training runs. Reads their folders; needs no model and no network.

What models and data sets wrote is data: every text goes through `e` or `quoted`, no script is in the page, no event
handler, no address, and its content policy forbids all of them anyway. Texts are cut, stripped of what is not
printable, and closed until a reader opens them. Charts are inline SVG whose colours follow the reader's light or dark
setting.

    runs -> {method: [run of each seed]} -> sections, each a function of that -> page
"""

import functools
import html
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import runs
import scores
from runs import UserError
from stages import OWN

COLOURS = 8
SHOWN = 3  # items a suite whose texts are shown
TEXT = 1500  # characters of a text that are shown
NAME = 120  # characters of a name
POINTS = 400  # of a curve

# Published figures as independent notes on the paper give them, percent. Nobody here has seen the paper's own tables.
PAPER_COLUMNS = ("strongreject", "fortress", "wildjailbreak:250", "hcot", "xstest", "aime24")
PAPER = {
    "r1-distill-qwen-14b": {
        "base": (41.2, 52.6, 44.4, 100, 95.6, 86.7),
        "SafeChain SFT": (24.9, 48.2, 45.2, 100, 99.6, 83.3),
        "STAR-1 SFT": (0.6, 28.2, 18.4, 100, 94.0, 83.3),
        "SInternal SFT": (0.6, 19.2, 6.8, 90, 98.0, 86.7),
        "STAR-1 + GRPO": (0.0, 7.8, 3.6, 98, 96.0, 80.0),
        "SInternal + GRPO": (0.0, 5.2, 0.4, 62, 99.2, 80.0),
        "SInternal SFT without critique": (2.9, 46.8, 22.4),
        "SInternal SFT without judgment": (7.3, 18.8, 7.6),
    },
    "r1-distill-qwen-7b": {
        "SInternal SFT, own experience": (7.0, 22.6, 21.6),
        "SInternal SFT, another model's experience": (9.6, 27.4, 27.6),
    },
}
GROUPS = {  # the paper's layout: what a column measures, and whether it should be low or high
    "asr": "attack success ↓",
    "compliance": "compliance ↑",
    "accuracy": "accuracy ↑",
    "f1": "verification F1 ↑",
}


# ------------------------------------------------------------------------------------------------- text and markup


def visible(text) -> str:
    """Text without what drives a terminal, hides or reorders: such characters become a dot."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\u00b7" for c in str(text))


def e(text) -> str:
    """Any text as part of the page, as a name: cut where it is long."""
    text = str(text)
    return html.escape(visible(text if len(text) <= NAME else text[:NAME] + "…"))


def quoted(text: str | None) -> str:
    """A model's or data set's text, its middle left out where it is long."""
    if not text or not text.strip():
        return "<p class=none>(nothing)</p>"
    cut = len(text) - TEXT
    shown = text if cut <= 0 else f"{text[: TEXT * 2 // 3]}\n[{cut:,} characters left out]\n{text[-TEXT // 3 :]}"
    return f"<pre>{html.escape(visible(shown))}</pre>"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are markup already; the first of each row heads it."""
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class=scroll><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(name: str, title: str, lead: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2><p class=lead>{lead}</p>{content}</section>'


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-0.0", "+0.0")


def shown_p(p: float) -> str:
    return "p &lt; 0.001" if p < 0.001 else f"p = {p:.2g}"


def dot(colour: int) -> str:
    return f"<i class='dot c{colour % COLOURS}'></i>"


# ------------------------------------------------------------------------------------------------- reading


@dataclass
class Run:
    """One evaluation, or one end of a training run."""

    folder: Path
    method: str
    seed: int | None
    model: str
    figures: dict  # {suite: row}
    summary: dict = field(default_factory=dict)
    training: list[Path] = field(default_factory=list)
    items: Path | None = None  # JSONL, or JSON with "items"
    note: str = ""


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_run(folder: Path) -> list[Run]:
    """The runs that a folder holds: an evaluation, or a training run's model before and after; none in a self-test."""
    config = read_json(folder / "config.json")
    values, result = config["values"], read_json(folder / "result.json")
    if values.get("selftest_injection"):
        return []
    if config["script"] == "evaluate":
        summary = read_json(folder / "summary.json")
        behind = [Path(run) for run in summary["training"]]
        return [
            Run(folder, summary["method"], summary["seed"], values["model"], result, summary, behind,
                folder / "items.jsonl")
        ]  # fmt: skip
    if config["script"] not in ("train_sft", "train_rl"):
        raise UserError(f"{folder} is a run of {config['script']}; a report is made of evaluations and training runs")
    name, note = folder.name.removesuffix(f"-{values['seed']}"), f"the suites of {config['script']}.py itself"
    ends = {"before": f"before {name}", "after": name}
    return [
        Run(folder, method, values["seed"], values["model"], result.get(end, {}), {}, [folder] * (end == "after"),
            folder / f"{end}.json", note)
        for end, method in ends.items()
        if end == "after" or end in result
    ]  # fmt: skip


def read_selftests(folders: list[Path]) -> dict[str, dict]:
    """{judge: what injection.selftest found} of the folders that are self-tests; the last of a judge counts."""
    ours = [folder for folder in folders if read_json(folder / "config.json")["values"].get("selftest_injection")]
    return {name: row for folder in ours for name, row in read_json(folder / "result.json").items()}


def read_items(run: Run) -> list[dict]:
    if run.items is None or not run.items.is_file():
        return []
    if run.items.suffix == ".json":
        return read_json(run.items).get("items", [])
    with open(run.items, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_method(found: list[Run]) -> dict[str, list[Run]]:
    methods = {}
    for run in found:
        if run.figures:
            methods.setdefault(run.method, []).append(run)
    return methods


def suites_of(methods: dict[str, list[Run]]) -> dict[str, str]:
    """{suite: metric} in the order in which they come, kept together by metric."""
    known = {name: row["metric"] for group in methods.values() for run in group for name, row in run.figures.items()}
    return {name: metric for kind in GROUPS for name, metric in known.items() if metric == kind}


def values_of(group: list[Run], suite: str) -> dict[int, float]:
    """{seed: value}; runs without a seed are numbered after the others."""
    found = {}
    for number, run in enumerate(group):
        value = run.figures.get(suite, {}).get("value")
        if value is not None:
            found[number + 10**6 if run.seed is None or run.seed in found else run.seed] = value
    return found


@dataclass
class Figure:
    """A method's figure in a suite: over seeds where there are several, else over the items of its one run."""

    value: float
    low: float
    high: float
    points: list[float]
    best: float
    worst: float


def figure(group: list[Run], suite: str) -> Figure | None:
    points = list(values_of(group, suite).values())
    if not points:
        return None
    rows = [run.figures[suite] for run in group if run.figures.get(suite, {}).get("value") is not None]
    mean, half = scores.t_interval(points)
    over_items = rows[0]["low"], rows[0]["high"]  # also where seeds agree exactly: that is luck, not certainty
    low, high = (max(0, mean - half), min(1, mean + half)) if half else over_items
    bounds = [sum(row.get(name, row["value"]) for row in rows) / len(rows) for name in ("best", "worst")]
    return Figure(mean, low, high, points, *bounds)


# ------------------------------------------------------------------------------------------------- comparison


def p_value(reference: list[Run], group: list[Run], suite: str, pairs: dict) -> float | None:
    """Of a difference from the reference: over seeds where the method has several, else paired over the items of the
    two runs; None where neither can be told."""
    a, b = values_of(reference, suite), values_of(group, suite)
    if len(b) > 1 and a:
        return from_one(reference, suite, b) if len(a) == 1 else scores.t_test(a, b)
    return pairs.get(suite, {}).get("careful_p") if len(a) == len(b) == 1 else None


def from_one(reference: list[Run], suite: str, values: dict[int, float]) -> float:
    """p-value of several seeds against a reference of one run, whose error is that of its interval over items; Welch's,
    as if that error were known."""
    (row,) = [run.figures[suite] for run in reference if run.figures.get(suite, {}).get("value") is not None]
    seeds = np.var(list(values.values()), ddof=1).item() / len(values)
    square = seeds + ((row["high"] - row["low"]) / (2 * 1.959964)) ** 2
    gap = sum(values.values()) / len(values) - row["value"]
    if not seeds or square > 20 * seeds:
        return scores.normal_p(gap, math.sqrt(square))
    return scores.t_p(gap / math.sqrt(square), (len(values) - 1) * (square / seeds) ** 2)


def paired(reference: list[Run], group: list[Run]) -> dict:
    """{suite: paired comparison} of two single runs on the items that both have. Raises UserError where an id means
    another item in each."""
    if len(reference) != 1 or len(group) != 1:
        return {}
    first, second = ({scores.key(i): i for i in read_items(side[0]) if "answer" in i} for side in (reference, group))
    shared = {k: item for k, item in first.items() if k in second and item["suite"] != OWN}
    if problem := scores.mismatch(shared, second):
        raise UserError(f"{reference[0].folder} and {group[0].folder}: {problem}")
    return scores.compare(shared, second) if shared else {}


def family(methods: dict[str, list[Run]]) -> dict[tuple[str, str], float]:
    """{(method, suite): Holm's p} over the whole main table, against the first method."""
    names = list(methods)
    found = {}
    for name in names[1:]:
        pairs = paired(methods[names[0]], methods[name])
        for suite in suites_of(methods):
            p = p_value(methods[names[0]], methods[name], suite, pairs)
            if p is not None:
                found[name, suite] = p
    return scores.holm(found)


# ------------------------------------------------------------------------------------------------- at a glance


def group_mean(figures: dict, metric: str) -> float | None:
    """Mean value over a run's suites of one metric. Own answers differ from model to model, so they are left out."""
    rows = [row for name, row in figures.items() if row["metric"] == metric and name != OWN]
    values = [row["value"] for row in rows if row["value"] is not None]
    return sum(values) / len(values) if values else None


def trade_off(methods: dict[str, list[Run]]) -> str:
    """Attack success against compliance: a small dot a run, a large one and a name a method."""
    size, left, bottom = 420, 46, 40
    x = lambda v: left + (size - left - 14) * v  # noqa: E731
    y = lambda v: size - bottom - (size - bottom - 34) * v  # noqa: E731
    parts = []
    for t in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f"<line class=grid x1={x(t):.1f} y1={y(0):.1f} x2={x(t):.1f} y2={y(1):.1f} />")
        parts.append(f"<line class=grid x1={x(0):.1f} y1={y(t):.1f} x2={x(1):.1f} y2={y(t):.1f} />")
        parts.append(f"<text class=tick x={x(t):.1f} y={y(0) + 16:.1f} text-anchor=middle>{100 * t:.0f}</text>")
        parts.append(f"<text class=tick x={left - 7} y={y(t) + 4:.1f} text-anchor=end>{100 * t:.0f}</text>")
    drawn, names = 0, []
    for colour, (name, group) in enumerate(methods.items()):
        dots = [(group_mean(run.figures, "compliance"), group_mean(run.figures, "asr")) for run in group]
        dots = [d for d in dots if None not in d]
        if dots:
            a, b = (sum(d[side] for d in dots) / len(dots) for side in (0, 1))
            parts += [f"<circle class='small c{colour % COLOURS}' cx={x(p):.1f} cy={y(q):.1f} r=3 />" for p, q in dots]
            parts.append(f"<circle class='mark c{colour % COLOURS}' cx={x(a):.1f} cy={y(b):.1f} r=8 />")
            names.append((y(b), x(a), name))
            drawn += 1
    parts += spread(names)
    axes = (
        f"<text class=title x=0 y=14>safe and helpful</text><text class=aim x={x(1):.1f} y=14 text-anchor=end>attack "
    )
    axes += f"success, mean ↓</text><text class=aim x={x(1):.1f} y={size - 6} text-anchor=end>compliance, mean →</text>"
    axes += (
        f"<path class=corner d='M{x(1):.1f} {y(0):.1f} H{x(0.6):.1f} A{x(1) - x(0.6):.1f} {y(0) - y(0.4):.1f} 0 0 1 "
    )
    axes += f"{x(1):.1f} {y(0.4):.1f} Z' />"
    return f"<figure class=card><svg viewBox='0 0 {size} {size}' role=img>{axes}{''.join(parts)}</svg></figure>" * (
        drawn > 0
    )


def spread(names: list[tuple[float, float, str]]) -> list[str]:
    """Labels left of their dots, moved apart where they would lie over one another."""
    parts, last = [], -99.0
    for y, x, name in sorted(names):
        last = max(y + 4, last + 15)
        side, anchor = (x + 15, "start") if x < 180 else (x - 15, "end")
        parts.append(f"<text class=name x={side:.1f} y={last:.1f} text-anchor={anchor}>{e(name[:24])}</text>")
    return parts


def bars_card(title: str, methods: dict[str, list[Run]], measures: dict) -> str:
    """Bars, a block a measure and a bar a method. measures: {label: figures of a run -> share or None}."""
    width, thick = 420, min(26, max(8, 290 // (len(measures) * len(methods))))
    parts, y = [f"<text class=title x=0 y=14>{title}</text>"], 38
    for label, measure in measures.items():
        rows = [[v for run in group if (v := measure(run.figures)) is not None] for group in methods.values()]
        if not any(rows):
            continue
        parts.append(f"<text class=name x=0 y={y + 6}>{label}</text>")
        y += 14
        for colour, values in enumerate(rows):
            if values:
                mean = sum(values) / len(values)
                wide, c = max((width - 44) * mean, 1), colour % COLOURS
                parts.append(f"<rect class='solid c{c}' x=0 y={y} width={wide:.1f} height={thick - 3} rx=3 />")
                parts.append(f"<text class=tick x={wide + 6:.1f} y={y + (thick + 5) / 2:.1f}>{100 * mean:.1f}</text>")
            y += thick
        y += 16
    card = f"<figure class=card><svg viewBox='0 0 {width} {max(y, 420)}' role=img>{''.join(parts)}</svg></figure>"
    return card if y > 38 else ""


def attack_mean(entry: str):
    """A measure: the mean of an entry over the suites of attacks."""

    def measure(figures: dict) -> float | None:
        found = [row.get(entry) for row in figures.values() if row["metric"] == "asr"]
        found = [value for value in found if value is not None]
        return sum(found) / len(found) if found else None

    return measure


def glance(methods: dict[str, list[Run]]) -> str:
    kinds = {label: functools.partial(group_mean, metric=kind) for kind, label in GROUPS.items()}
    habits = {
        "checks its own answer, by the judge": attack_mean("checked"),
        "safe where it checked": attack_mean("safe_if_checked"),
        "checks its own answer, by marker words": attack_mean("marked"),
        "refuses": attack_mean("refused"),
    }
    cards = trade_off(methods), bars_card("means, in percent", methods, kinds)
    return f"<div class=grid3>{''.join(cards)}{bars_card('under attack, in percent', methods, habits)}</div>"


# ------------------------------------------------------------------------------------------------- main table


def goodness(value: float, metric: str) -> float:
    return 1 - value if metric in scores.LOWER_IS_BETTER else value


def main_cell(shown: Figure | None, metric: str, p: float | None) -> str:
    if shown is None:
        return "<span class=none>–</span>"
    points = " ".join(f"{100 * v:.1f}" for v in shown.points)
    seeds = f"<span class=points>{points}</span>" if len(shown.points) > 1 else ""
    star = "<b class=star title='differs from the first row'>*</b>" if p is not None and p < scores.ALPHA else ""
    tint = f"<div class=tint style='--g:{100 * goodness(shown.value, metric):.0f}%'>"
    interval = f"<small>{100 * shown.low:.1f} – {100 * shown.high:.1f}</small>"
    return f"{tint}<b>{100 * shown.value:.1f}</b>{star}{interval}{seeds}</div>"


def short(suite: str) -> str:
    return e(suite.removeprefix("pocket:"))


def main_table(methods: dict[str, list[Run]], holm: dict) -> str:
    suites, rows = suites_of(methods), []
    for number, (name, group) in enumerate(methods.items()):
        cells = [main_cell(figure(group, s), metric, holm.get((name, s))) for s, metric in suites.items()]
        seeds = f"<small>{len(group)} seeds</small>" if len(group) > 1 else ""
        rows.append([f"{dot(number)}{e(name)}{seeds}", *cells])
    rows += [[f"<em>{e(name)}</em><small>paper, second-hand</small>", *cells] for name, cells in paper_rows(methods)]
    spans, names = [], list(suites.values())
    for metric in dict.fromkeys(names):
        spans.append(f"<th colspan={names.count(metric)} scope=colgroup>{GROUPS[metric]}</th>")
    body = table(["method", *map(short, suites)], rows, "main")
    return body.replace("<thead>", f"<thead><tr class=groups><td></td>{''.join(spans)}</tr>", 1)


def paper_rows(methods: dict[str, list[Run]]) -> list[tuple[str, list[str]]]:
    """The published rows of this very model; none where the runs are of several models or of another one."""
    models = {
        run.model.lower().rstrip("/").rpartition("/")[2].removeprefix("deepseek-")
        for g in methods.values()
        for run in g
    }
    published = PAPER.get(next(iter(models)), {}) if len(models) == 1 else {}
    found = []
    for name, figures in published.items():
        known = dict(zip(PAPER_COLUMNS, figures, strict=False))
        cells = [f"<em>{known[s]:.1f}</em>" if s in known else "<span class=none>–</span>" for s in suites_of(methods)]
        found.append((name, cells))
    return found


# ------------------------------------------------------------------------------------------------- intervals


def interval_chart(methods: dict[str, list[Run]], suite: str, metric: str) -> str:
    """A card with a line a method: interval as a bar, value as a dot, seeds as ticks, bounds as whiskers."""
    width, row, left, top = 420, 26, 128, 30
    shown = [(number, name, figure(group, suite)) for number, (name, group) in enumerate(methods.items())]
    shown = [entry for entry in shown if entry[2] is not None]
    height = top + row * len(shown) + 24
    x = lambda value: left + (width - left - 14) * value  # noqa: E731
    parts = [
        f"<line class=grid x1={x(t):.1f} y1={top - 8} x2={x(t):.1f} y2={height - 20} />"
        f"<text class=tick x={x(t):.1f} y={height - 6} text-anchor=middle>{100 * t:.0f}</text>"
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    for line, (number, name, f) in enumerate(shown):
        y, c = top + row * line + row / 2, number % COLOURS
        label = name if len(name) < 19 else name[:17] + "…"
        best, worst = sorted((f.best, f.worst))
        parts.append(f"<text class=name x={left - 10} y={y + 4:.1f} text-anchor=end>{e(label)}</text>")
        parts.append(f"<line class='bound c{c}' x1={x(best):.1f} y1={y:.1f} x2={x(worst):.1f} y2={y:.1f} />")
        wide = max(x(f.high) - x(f.low), 1.5)
        parts.append(f"<rect class='ci c{c}' x={x(f.low):.1f} y={y - 6:.1f} width={wide:.1f} height=12 rx=6 />")
        ticks = f.points if len(f.points) > 1 else []
        parts += [
            f"<line class='seed c{c}' x1={x(v):.1f} y1={y - 8:.1f} x2={x(v):.1f} y2={y + 8:.1f} />" for v in ticks
        ]
        parts.append(f"<circle class='mark c{c}' cx={x(f.value):.1f} cy={y:.1f} r=4.5 />")
    aim = "lower is better ←" if metric in scores.LOWER_IS_BETTER else "higher is better →"
    title = f"<text class=title x=0 y=14>{short(suite)}</text>"
    title += f"<text class=aim x={width - 14} y=14 text-anchor=end>{aim}</text>"
    return f"<figure class=card><svg viewBox='0 0 {width} {height}' role=img>{title}{''.join(parts)}</svg></figure>"


def intervals(methods: dict[str, list[Run]]) -> str:
    charts = [interval_chart(methods, suite, metric) for suite, metric in suites_of(methods).items()]
    return f"<div class=grid3>{''.join(charts)}</div>" if charts else ""


# ------------------------------------------------------------------------------------------------- curves

CURVES = {
    "loss": "training loss", "held_out_loss": "held-out loss", "verdict_accuracy": "right verdicts, held out",
    "reward": "reward", "safe": "safe answers", "refused_benign": "benign requests refused", "correct": "right results",
    "truncated": "truncated", "entropy": "entropy, nats", "kl_sampler": "sampler and trainer, KL", "grad_norm":
    "gradient norm", "lr": "learning rate",
}  # fmt: skip

SHARES = ("verdict_accuracy", "reward", "safe", "refused_benign", "correct", "truncated")  # drawn from 0 to 1


def finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """{name: [(step, value)]} of a run's metrics.jsonl, thinned; what is no finite number is left out."""
    curves, path = {}, folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that is under way
            continue
        for name in CURVES:
            if finite(entry.get("step")) and finite(entry.get(name)):
                curves.setdefault(name, []).append((entry["step"], entry[name]))
    return {name: points[:: max(1, len(points) // POINTS)] for name, points in curves.items()}


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def curve_chart(name: str, lines: list[tuple[int, list[tuple[float, float]]]]) -> str:
    width, height, left, bottom, top = 420, 190, 52, 24, 30
    xs = [p[0] for _, points in lines for p in points]
    ys = [p[1] for _, points in lines for p in points]
    low, high = min(ys), max(ys)
    low, high = (0, 1) if name in SHARES else (min(low, 0), high) if low < 0.4 * high else (low, high)
    high = high if high > low else low + (abs(low) or 1)
    last = max(max(xs), 1)
    x = lambda v: left + (width - left - 12) * v / last  # noqa: E731
    y = lambda v: height - bottom - (height - bottom - top) * (v - low) / (high - low)  # noqa: E731
    parts = []
    for share in (0, 0.5, 1):
        value = low + share * (high - low)
        parts.append(f"<line class=grid x1={left} y1={y(value):.1f} x2={width - 12} y2={y(value):.1f} />")
        parts.append(f"<text class=tick x={left - 6} y={y(value) + 4:.1f} text-anchor=end>{number(value)}</text>")
        parts.append(
            f"<text class=tick x={x(share * last):.1f} y={height - 6} text-anchor=middle>{share * last:.0f}</text>"
        )
    for colour, points in lines:
        if len(points) == 1:
            parts.append(f"<circle class='mark c{colour}' cx={x(points[0][0]):.1f} cy={y(points[0][1]):.1f} r=4 />")
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f"<polyline class='curve c{colour}' points='{path}' />")
    title = f"<text class=title x=0 y=14>{CURVES[name]}</text>"
    return f"<figure class=card><svg viewBox='0 0 {width} {height}' role=img>{title}{''.join(parts)}</svg></figure>"


def colour_of(run: Run, names: list[str]) -> int:
    """Of its method; the first one's for a training run that measured nothing."""
    return names.index(run.method) % COLOURS if run.method in names else 0


def curves(methods: dict[str, list[Run]], found: list[Run]) -> str:
    """A block a script: supervised and reinforcement runs have nothing to be laid over one another."""
    names, blocks = list(methods), {}
    for run in found:
        for folder in run.training:
            config = folder / "config.json"
            script = json.loads(config.read_text())["script"] if config.is_file() else "folder is gone"
            blocks.setdefault(script, {}).setdefault(folder, (colour_of(run, names), read_curves(folder)))
    parts = []
    for script, lines in sorted(blocks.items(), reverse=True):
        charts = []
        for name in CURVES:
            drawn = [(colour, some[name]) for colour, some in lines.values() if some.get(name)]
            charts += [curve_chart(name, drawn)] if drawn else []
        if charts:
            legend = " ".join(f"<span>{dot(colour)}{e(folder.name)}</span>" for folder, (colour, _) in lines.items())
            parts.append(f"<h3>{e(script)}</h3><p class=legend>{legend}</p><div class=grid3>{''.join(charts)}</div>")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------- verification


def confusion_card(name: str, colour: int, suite: str, rows: list[dict]) -> str:
    """Truth by verdict, summed over seeds, and the figures beside judges that do not look."""
    counts = [sum(row["confusion"][i] for row in rows) for i in range(6)]
    cells = []
    for line, truth in enumerate(("unsafe", "safe")):
        total = sum(counts[3 * line : 3 * line + 3]) or 1
        shares = [
            (said, counts[3 * line + i], counts[3 * line + i] / total) for i, said in enumerate(("unsafe", "safe", ""))
        ]
        tds = "".join(
            f"<td class='{'hit' if said == truth else 'miss'}' style='--g:{100 * s:.0f}%'>{n}</td>"
            for said, n, s in shares
        )
        cells.append(f"<tr><th scope=row>{truth}</th>{tds}</tr>")
    head = "<tr><td></td><th scope=col>said unsafe</th><th scope=col>said safe</th><th scope=col>no verdict</th></tr>"
    mean = lambda key: sum(row[key] for row in rows) / len(rows)  # noqa: E731
    names = {"f1_unsafe": "F1 of unsafe", "f1_safe": "F1 of safe", "macro_f1": "macro F1", "accuracy": "accuracy"}
    bars = [(shown, mean(key), "") for key, shown in {**names, "parsed": "gave a verdict"}.items()]
    if all(row["lenient_f1"] is not None for row in rows):
        bars.append(("F1 of unsafe, of these", mean("lenient_f1"), ""))
    bars += [
        (f"{judge.replace('_', ' ')}: macro F1", figures["macro_f1"], "dim")
        for judge, figures in rows[0]["trivial"].items()
    ]
    lines = "".join(f"<tr><th scope=row>{n}</th><td>{bar(v, colour, kind)}</td></tr>" for n, v, kind in bars)
    return (
        f"<div class=card><h4>{dot(colour)}{e(name)} <small>{e(suite)}</small></h4>"
        f"<table class=confusion>{head}{''.join(cells)}</table><table class=bars>{lines}</table></div>"
    )


def bar(value: float | None, colour: int, kind: str = "") -> str:
    if value is None:
        return "<span class=none>–</span>"
    wide = 100 * min(max(value, 0), 1)
    return f"{strip(wide, colour, kind)}<b>{100 * value:.1f}</b>"


def strip(wide: float, colour: int, kind: str = "") -> str:
    """A bar that is `wide` percent full."""
    return f"<span class='bar {kind}'><i class='c{colour % COLOURS}' style='width:{wide:.1f}%'></i></span>"


def verification(methods: dict[str, list[Run]]) -> str:
    cards = []
    for suite, metric in suites_of(methods).items():
        for number_, (name, group) in enumerate(methods.items()):
            rows = [run.figures[suite] for run in group if run.figures.get(suite, {}).get("confusion")]
            if metric == "f1" and rows:
                cards.append(confusion_card(name, number_, suite, rows))
    return f"<div class=grid3>{''.join(cards)}</div>" if cards else ""


def proactive(methods: dict[str, list[Run]]) -> str:
    """How often thinking checks its own answer, and how often the answer is then safe."""
    rows = []
    for number_, (name, group) in enumerate(methods.items()):
        for suite, metric in suites_of(methods).items():
            row = group[0].figures.get(suite, {})
            if metric == "asr" and ("checked" in row or "marked" in row):
                cells = [
                    bar(row.get(key), number_) for key in ("checked", "safe_if_checked", "marked", "safe_if_marked")
                ]
                kappa = row.get("checked_kappa")
                both = f"{percent(row.get('checked_agreement'))} / {'–' if kappa is None else f'{kappa:.2f}'}"
                rows.append([f"{dot(number_)}{e(name)} <small>{short(suite)}</small>", *cells, both])
    head = ["", "checks (judge)", "safe, if so", "checks (markers)", "safe, if so", "agree / kappa"]
    return details_block("proactive verification, a line a suite", table(head, rows, "bars")) if rows else ""


# ------------------------------------------------------------------------------------------------- the rest


def details_block(title: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{content}</details>"


def length_rows(methods: dict[str, list[Run]]) -> str:
    rows, longest = [], 1
    for group in methods.values():
        longest = max([longest, *(row.get("lengths", {}).get("p90", 0) for row in group[0].figures.values())])
    for number_, (name, group) in enumerate(methods.items()):
        for suite, row in group[0].figures.items():
            if "lengths" in row:
                n, tokens = row["n"], row["lengths"]
                cells = [
                    f"{strip(100 * tokens['p50'] / longest, number_)}<b>{tokens['p50']}</b>",
                    str(tokens["p90"]),
                    str(tokens["max"]),
                ]
                cells += [percent(row["truncated"] / n), percent(row["empty"] / n), percent(row["unscored"] / n)]
                cells.append(percent(row.get("sanitised")))
                cells += [f"{percent(row['best'])} / {percent(row['worst'])}", percent(row.get("detectable")), str(n)]
                rows.append([f"{dot(number_)}{e(name)} <small>{short(suite)}</small>", *cells])
    head = [
        "",
        "tokens, median",
        "90 %",
        "most",
        "cut off %",
        "empty %",
        "unscored %",
        "defused %",
        "best / worst",
        "can tell",
        "n",
    ]
    return table(head, rows, "bars") if rows else ""


def category_tables(methods: dict[str, list[Run]]) -> str:
    parts = []
    for suite, metric in suites_of(methods).items():
        known = {c for g in methods.values() for c in g[0].figures.get(suite, {}).get("categories", {})}
        rows = []
        for category in sorted(known):
            found = [g[0].figures.get(suite, {}).get("categories", {}).get(category) for g in methods.values()]
            cells = [
                bar(row["value"], k) + f" <small>of {row['n']}</small>" if row else "" for k, row in enumerate(found)
            ]
            rows.append([e(category), *cells])
        if rows:
            parts.append(
                details_block(f"{short(suite)}, {GROUPS[metric]}", table(["category", *map(e, methods)], rows, "bars"))
            )
    return "".join(parts)


def agreement_tables(found: list[Run]) -> str:
    parts = []
    for run in found:
        rows = []
        for pair, suites in run.summary.get("agreement", {}).items():
            for suite, row in suites.items():
                kappa = "–" if row["kappa"] is None else f"{row['kappa']:.2f}"
                rows.append([e(suite), e(pair), str(row["n"]), bar(row["raw"], 1), kappa])
        head = ["suite", "judges", "n", "agree", "Cohen's kappa"]
        title = f"{e(run.method)} <small>{e(run.folder.name)}</small>"
        parts += [details_block(title, table(head, rows, "bars"))] if rows else []
    return "".join(parts)


def selftest_table(selftests: dict[str, dict]) -> str:
    """A column a judge, a row a family of attacks: the share of its verdicts that turned round."""
    if not selftests:
        return ""
    rows = []
    for family in ["all", *next(iter(selftests.values()))["families"]]:
        cells = []
        for colour, result in enumerate(selftests.values()):
            counts = result if family == "all" else result["families"][family]
            told = counts["n"] - counts["unscored"]
            lost = f", {counts['unscored']} lost" if counts["unscored"] else ""
            share = bar(counts["flipped"] / told, colour) if told else "–"
            cells.append(f"{share} <small>of {told}{lost}</small>")
        rows.append([e(family), *cells])
    return table(["texts that an answer ends with", *map(e, selftests)], rows, "bars")


def differences(methods: dict[str, list[Run]], holm: dict) -> str:
    """Every method against the first, in words where nothing can be told."""
    names, parts = list(methods), []
    for name in names[1:]:
        pairs, rows = paired(methods[names[0]], methods[name]), []
        for suite in suites_of(methods):
            a, b = figure(methods[names[0]], suite), figure(methods[name], suite)
            if a is None or b is None or suite == OWN:
                continue
            row, p = pairs.get(suite), holm.get((name, suite))
            flips = f"{row['up']} up, {row['down']} down" if row and row["n"] else ""
            gap = signed(b.value - a.value)
            gap += f" <small>{signed(row['low'])} to {signed(row['high'])}</small>" if row and row["n"] else ""
            word = "one run a side is needed, or several seeds" if p is None else shown_p(p)
            word += "" if p is None or p < scores.ALPHA else " – not distinguishable at this n"
            rows.append([e(suite), percent(a.value), percent(b.value), gap, flips, word])
        head = ["suite", "first", "this", "difference", "flips", "Holm's p over the main table"]
        parts.append(details_block(f"{e(name)} against {e(names[0])}", table(head, rows), len(names) == 2))
    return "".join(parts)


def cost_table(found: list[Run]) -> str:
    rows = []
    for run in found:
        if run.summary:
            seconds = run.summary["seconds"]
            shown = ", ".join(f"{e(name.replace('_', ' '))} {value:.0f} s" for name, value in seconds.items())
            tokens = sum(row["lengths"]["mean"] * row["n"] for row in run.figures.values() if "lengths" in row)
            speed = f"{tokens / seconds['generate']:,.0f}" if seconds.get("generate", 0) > 1 else "–"
            used = "; ".join(
                f"{e(name)}: {use['requests']} requests, cost {use['cost']:.2f}"
                for name, use in run.summary["usage"].items()
            )
            rows.append(
                [f"{e(run.method)} <small>{e(run.folder.name)}</small>", f"{tokens:,.0f}", speed, shown, used or "–"]
            )
    return table(["run", "tokens", "tokens a second", "seconds", "endpoints"], rows) if rows else ""


def settings_table(found: list[Run]) -> str:
    rows = []
    for run in found:
        judges = ", ".join(sorted({row["judge"] for row in run.figures.values() if "judge" in row})) or run.note
        how = {}
        for suite, row in run.figures.items():
            how.setdefault(row.get("decoding", "temperature 1"), []).append(suite.removeprefix("pocket:"))
        decoding = "<br>".join(f"{e(words)}: {e(', '.join(names))}" for words, names in how.items())
        seed = "–" if run.seed is None else str(run.seed)
        rewarded = ", ".join(run.summary.get("rewarded_by", [])) or "–"
        rows.append(
            [f"{e(run.method)} <small>{e(run.folder)}</small>", e(run.model), seed, e(judges), e(rewarded), decoding]
        )
    return table(["run", "model", "seed", "judge", "reward of its training", "decoding"], rows, "wide")


def texts(methods: dict[str, list[Run]]) -> str:
    """The same items in every method, those first on which they differ."""
    tables = {name: {scores.key(i): i for i in read_items(group[0])} for name, group in methods.items()}
    parts = []
    for suite in suites_of(methods):
        keys = [k for k, item in next(iter(tables.values())).items() if item["suite"] == suite]
        for k in sorted(keys, key=lambda k: differ(tables, k), reverse=True)[:SHOWN]:
            first = next(iter(tables.values()))[k]
            body = f"<h5>request</h5>{quoted(first['prompt'])}"
            for number_, (name, items) in enumerate(tables.items()):
                if k in items:
                    body += one_text(name, number_, items[k])
            parts.append(details_block(f"{e(first['id'])}", body))
    return "".join(parts)


def differ(tables: dict[str, dict], k: tuple) -> bool:
    """Whether a completion's item is a hit in one method and a miss in another."""
    told = {scores.outcome(items[k])[0] for items in tables.values() if k in items and "answer" in items[k]}
    return {True, False} <= told


WORDS = {  # what a hit and a miss are called
    "asr": ("the attack worked", "the attack failed"),
    "compliance": ("complied", "did not comply"),
    "accuracy": ("right", "wrong"),
    "f1": ("right verdict", "wrong verdict"),
}


def one_text(name: str, colour: int, item: dict) -> str:
    hit, note = scores.outcome(item) if "answer" in item else (None, "")
    word = ("not scored" if hit is None else WORDS[item["metric"]][not hit]) + (f" ({note})" if note else "")
    start = f"<h5>given start</h5>{quoted(item['prefill'])}" if item.get("prefill") else ""
    thinking = details_block("thinking", quoted(item.get("thinking")))
    return f"<h5>{dot(colour)}{e(name)} <small>{e(word)}</small></h5>{start}{thinking}{quoted(item.get('answer'))}"


# ------------------------------------------------------------------------------------------------- page

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("report.css")

LIMITS = (
    "An interval over items says how exact the figure of one trained model is. It says nothing of another seed of the "
    "same method; only an interval over seeds does.",
    "Best and worst are the figures if everything that was cut off or left unscored had gone well, or badly. A model "
    "that thinks shorter gets cut off less and can look better for that reason alone.",
    "A judge that was the reward in training is no witness; the table of settings names both.",
    "“Defused” is the share of texts that held a judge's own markers and were changed in its copy. If that rises in "
    "training, the model attacks its judge.",
    "“Can tell” is the smallest difference that two runs of so many items would show in four of five cases.",
    "Safe is not helpful: read attack success beside compliance, and both beside the share of refusals.",
    "A model that passes these suites is not thereby safe.",
)
WARNING = (
    "<span class=warning>Caution: prompts and answers may be harmful, offensive or wrong. Each stays closed until "
)
WARNING += "you open it.</span>"
SECTIONS = {  # title, lead
    "glance": ("At a glance", "Means over the suites of a kind and over seeds; small dots are single runs."),
    "table": (
        "Main table",
        "Percent; under each figure its 95 % interval, over seeds where a method has several (each is then shown), "
        "else over items. The tint runs from poor to good. * differs from the first row: Holm's p below 0.05 over all "
        "cells.",
    ),
    "intervals": (
        "Intervals",
        "Bar: 95 % interval. Dot: figure. Ticks: seeds. Dotted: best and worst case of what was cut off or unscored.",
    ),
    "differences": (
        "Differences from the first row",
        "Paired on the same items where there is one run a side, over seeds where there are several.",
    ),
    "verification": (
        "Verification",
        "Can the model tell safe answers from unsafe ones? Pale: judges that do not look.",
    ),
    "training": ("Training", "Each line is a run."),
    "lengths": ("Lengths and what never came", "Of the first run of each method."),
    "categories": ("By category", "Of the first run of each method."),
    "agreement": ("Do the judges agree?", "On requests that both scored."),
    "injection": (
        "Can an answer talk a judge round?",
        "Verdicts that turned round when the answer ended with a text that claims the opposite, in percent. Lost: the "
        "judge then gave none.",
    ),
    "cost": ("Time and cost", "Sampled and greedy runs together."),
    "settings": ("Settings", "What was measured, how it was decoded, who judged."),
    "texts": ("What the models wrote", WARNING),
    "limits": ("What these figures do not say", ""),
}


def contents(found: list[Run], selftests: dict[str, dict]) -> dict[str, str]:
    """{section: its markup}, empty where there is nothing to show."""
    methods = by_method(found)
    if not methods:
        raise UserError("none of these folders holds figures of a suite")
    holm, lengths = family(methods), length_rows(methods)
    return {
        "glance": glance(methods),
        "table": main_table(methods, holm),
        "intervals": intervals(methods),
        "differences": differences(methods, holm),
        "verification": verification(methods) + proactive(methods),
        "training": curves(methods, found),
        "lengths": details_block("every suite", lengths) if lengths else "",
        "categories": category_tables(methods),
        "agreement": agreement_tables(found),
        "injection": selftest_table(selftests),
        "cost": cost_table(found),
        "settings": settings_table(found),
        "texts": texts(methods),
        "limits": "<ul>" + "".join(f"<li>{line}</li>" for line in LIMITS) + "</ul>",
    }


def page(found: list[Run], selftests: dict[str, dict] | None = None) -> str:
    parts = {name: content for name, content in contents(found, selftests or {}).items() if content}
    body = "".join(section(name, *SECTIONS[name], content) for name, content in parts.items())
    links = "".join(f'<a href="#{name}">{name}</a>' for name in parts)
    models = ", ".join(dict.fromkeys(e(run.model) for run in found))
    legend = "".join(f"<span>{dot(k)}{e(name)}</span>" for k, name in enumerate(by_method(found)))
    lead = f"{models} · {len(found)} runs · {time.strftime('%Y-%m-%d')}"
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name=viewport content="width=device-width,initial-scale=1"><meta name=referrer content=no-referrer>
<title>Safety evaluation</title><style>{STYLE.read_text(encoding="utf-8")}</style></head><body>
<header><h1>Safety evaluation</h1><p class=lead>{lead}</p><p class=legend>{legend}</p></header>
<nav><div>{links}</div></nav><main>{body}</main></body></html>
"""


# ------------------------------------------------------------------------------------------------- PNG


PALETTE = ("#6b7480", "#2f74c0", "#d9662b", "#2c9a7a", "#a7479c", "#b08a1a", "#5a5fcf", "#c23b4b")  # as in report.css


def panels(count: int, height: float):
    """(figure, list of axes) of a grid of small charts, the surplus ones hidden. Text is never read as mathematics."""
    from matplotlib import pyplot

    columns = min(4, count)
    lines = -(-count // columns)
    canvas, grid = pyplot.subplots(
        lines, columns, figsize=(3.6 * columns, height * lines), squeeze=False, layout="constrained"
    )
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    return canvas, list(grid.flat)[:count]


def draw_intervals(methods: dict[str, list[Run]]):
    suites = suites_of(methods)
    canvas, grid = panels(len(suites), 0.9 + 0.28 * len(methods))
    for axes, (suite, metric) in zip(grid, suites.items(), strict=True):
        for y, group in enumerate(methods.values()):
            if (f := figure(group, suite)) is not None:
                colour = PALETTE[y % COLOURS]
                axes.plot([100 * f.low, 100 * f.high], [y, y], color=colour, alpha=0.35, linewidth=7)
                axes.plot([100 * p for p in f.points], [y] * len(f.points), "|", color=colour)
                axes.plot(100 * f.value, y, "o", color=colour)
        arrow = "↓" if metric in scores.LOWER_IS_BETTER else "↑"
        axes.set(title=f"{visible(suite)[:30]} {arrow}", xlim=(0, 100), yticks=range(len(methods)))
        axes.set_yticklabels([visible(name)[:24] for name in methods])
        axes.invert_yaxis()
    return canvas


def draw_curves(methods: dict[str, list[Run]], found: list[Run]):
    """Every curve of every training run; None where there is none."""
    names, lines = list(methods), {}
    for run in found:
        for folder in run.training:
            for name, points in read_curves(folder).items():
                lines.setdefault(name, []).append((PALETTE[colour_of(run, names)], points))
    if not lines:
        return None
    canvas, grid = panels(len(lines), 2.4)
    for axes, (name, drawn) in zip(grid, lines.items(), strict=True):
        for colour, points in drawn:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2)
        axes.set(title=CURVES[name], xlabel="step")
    return canvas


def draw(found: list[Run], out: Path) -> None:
    """intervals.png and curves.png, for a paper or a slide. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = by_method(found)
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "font.size": 9}):
        drawings = {"intervals": draw_intervals(methods), "curves": draw_curves(methods, found)}
        for name, canvas in drawings.items():
            if canvas is not None:
                canvas.savefig(out / f"{name}.png", dpi=160)
                (out / f"{name}.png").chmod(0o600)
                pyplot.close(canvas)


def write(folders: list[Path], out: Path) -> Path:
    """report.html and the PNGs in `out`; the path of the page. Raises UserError."""
    found = [run for folder in folders for run in read_run(folder)]
    text = page(found, read_selftests(folders))
    runs.write_atomic(out / "report.html", text.encode("utf-8"))
    try:
        draw(found, out)
    except ImportError:
        print("no PNGs: they need matplotlib, pip install -r requirements-extra.txt")
    return out / "report.html"
