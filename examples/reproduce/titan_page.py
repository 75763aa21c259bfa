"""The page of Titan's comparison: tables and pictures from the trials' results (`titan.py` runs them)."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = "random"
SIMPLE = ("random", "stratified", "all", "random-30")
"""What every other method has to beat; the last two train on as many samples as the scored methods look at."""

PAPER_METHODS = ("random", "IS", "low loss", "high loss", "entropy", "OCS", "Camel", "Titan")
PAPER = {
    "AlexNet, CIFAR-10": (
        (1, 3.25, 3.98, 3.98, 3.59, 4.06, 2.07, 0.70),
        (71.2, 73.5, 18.2, 34.3, 71.6, 62.3, 71.3, 74.5),
    ),
    "MobileNet, CIFAR-10": (
        (1, 3.22, 3.45, 3.45, 3.41, 3.67, 1.15, 0.57),
        (69.2, 69.5, 17.7, 13.9, 69.6, 38.1, 68.7, 75.4),
    ),
    "SqueezeNet, CIFAR-10": (
        (1, 3.96, 3.97, 3.97, 3.04, 4.06, 2.07, 0.69),
        (76.2, 73.0, 18.3, 45.0, 78.0, 40.7, 75.6, 79.0),
    ),
    "ResNet50, CIFAR-10": (
        (1, 2.32, 3.14, 3.14, 2.20, 2.18, 1.11, 0.66),
        (76.5, 78.0, 22.3, 34.9, 81.7, 27.3, 76.8, 81.1),
    ),
    "ResNet34, speech": (
        (1, 2.04, 3.14, 3.14, 2.96, 3.19, 0.81, 0.77),
        (76.0, 78.7, 14.7, 58.8, 73.2, 59.4, 76.5, 79.8),
    ),
    "MLP, HARBOX": ((1, 3.56, 6.30, 6.47, 5.28, 14.4, 12.5, 0.71), (75.5, 77.5, 45.5, 21.8, 60.9, 68.0, 75.6, 76.7)),
}
"""Titan's Table 1: time to random's final accuracy, relative to random; final accuracy in %."""

Trials = Sequence[Mapping[str, Any]]
"""One result per seed."""

Results = Mapping[tuple[str, str, str], Trials]
"""(modality, order, method) -> one result per seed, the seeds in the same order everywhere."""


CONTENDERS = {
    "seconds": ("auto", "auto to 30", "quota + titan"),
    "pipelined seconds": ("auto to 30, overlapped", "quota + titan"),
}
"""What the verdict compares with the best simple rival, and in what unit."""


# ------------------------------------------------------------------------------------------------------------- figures


def final(result: Mapping[str, Any]) -> float:
    """Accuracy at the end: the mean of the last three measurements."""
    return float(np.mean([point["accuracy"] for point in result["curve"][-3:]]))


def second_half(result: Mapping[str, Any]) -> float:
    """Mean accuracy over the second half of the measurements: it says more of a rate than the end of one run does."""
    curve = result["curve"]
    return float(np.mean([point["accuracy"] for point in curve[len(curve) // 2 :]]))


def one_processor(point: Mapping[str, float]) -> float:
    """Seconds so far when stages take turns."""
    return point["filter"] + point["select"] + point["update"]


def pipelined(point: Mapping[str, float]) -> float:
    """Seconds so far when filter and selection have a processor of their own, ideally."""
    return max(point["filter"] + point["select"], point["update"])


WAYS = {"rounds": lambda point: point["round"], "seconds": one_processor, "pipelined seconds": pipelined}


def reached(result: Mapping[str, Any], target: float) -> tuple[Mapping[str, float], bool]:
    """Where the mean of three measurements first is at the target, between two points; else the last, and False."""
    curve = result["curve"]
    means = np.convolve([point["accuracy"] for point in curve], np.full(3, 1 / 3), "valid")
    there = np.flatnonzero(means >= target - 1e-12)
    if not len(there):
        return curve[-1], False
    first = int(there[0])
    here, before = curve[first + 2], curve[first + 1]
    rise = means[first] - means[first - 1] if first else 0.0
    share = float(np.clip((target - means[first - 1]) / rise, 0.0, 1.0)) if rise > 0 else 1.0
    return {name: before[name] + share * (here[name] - before[name]) for name in here}, True


def relative(ours: Trials, theirs: Trials, targets: Sequence[float], way: str) -> str:
    """What a method needs for each seed's target, relative to what another one needs for it.

    The ratio of the sums over seeds with a 95 % interval (bootstrap over seeds, pairs kept); `>` where some seeds never
    got there and count with all they used.
    """
    mine, its = ([reached(*pair) for pair in zip(results, targets, strict=True)] for results in (ours, theirs))
    missed = sum(not there for _, there in mine)
    if missed == len(mine):
        return "never"
    top, base = (np.array([WAYS[way](point) for point, _ in side]) for side in (mine, its))
    mark = f"> ({len(mine) - missed} of {len(mine)}) " if missed else ""
    if len(mine) < 3 or ours is theirs:
        return f"{mark}{top.sum() / base.sum():.2f}"
    draws = np.random.default_rng(0).integers(0, len(mine), (4000, len(mine)))
    low, high = np.quantile(top[draws].sum(1) / base[draws].sum(1), [0.025, 0.975])
    return f"{mark}{top.sum() / base.sum():.2f} ({low:.2f}-{high:.2f})"


def cost_to(results: Trials, reference: Trials, way: str) -> str:
    """What a method needs for the reference's final accuracy, relative to the reference, seed by seed."""
    return relative(results, reference, [final(result) for result in reference], way)


def quickest(found: Mapping[str, Trials], targets: Sequence[float], way: str) -> str:
    """The simple rival that needs least for the targets; one that misses some is behind all that do not."""

    def needs(name: str) -> tuple[int, float]:
        ends = [reached(*pair) for pair in zip(found[name], targets, strict=True)]
        return sum(not there for _, there in ends), sum(WAYS[way](point) for point, _ in ends)

    return min((name for name in SIMPLE if name in found), key=needs)


def mean_of(results: Trials, name: str) -> str:
    values = [result["moments"][name] for result in results if name in result["moments"]]
    return f"{np.mean(values):.3g}" if values else ""


# --------------------------------------------------------------------------------------------------------------- tables


def paper_table() -> str:
    """The published figures in the same words as ours."""
    rows = [[name, *(f"{time:g}x, {share}" for time, share in zip(*figures, strict=True))]
            for name, figures in PAPER.items()]  # fmt: skip
    return "Time to random's final accuracy, final accuracy in %:\n\n" + table(
        ["network and data", *PAPER_METHODS], rows
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def accuracy_table(found: Mapping[str, Trials], rates: Mapping[str, float]) -> str:
    """One row per method: accuracy, and what it needs for the final accuracy of random choice."""
    rows = []
    for name, results in found.items():
        values = 100 * np.array([final(result) for result in results])
        spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
        costs = [cost_to(results, found[REFERENCE], way) for way in WAYS]
        rows.append([name, f"{rates[name]:g}", f"{values.mean():.1f}{spread}", *costs])
    return table(["method", "rate", "accuracy, %", "rounds", "seconds", "pipelined seconds"], rows)


def rivals_table(found: Mapping[str, Trials], way: str) -> str:
    """Seconds to the final accuracy of each simple rival, relative to that rival."""
    simple = [name for name in SIMPLE if name in found]
    rows = [[name, *(cost_to(results, found[rival], way) for rival in simple)] for name, results in found.items()]
    return table(["method", *(f"to {rival}'s" for rival in simple)], rows)


def verdict(results: Results) -> str:
    """Scored selection against the best simple rival, picked with hindsight, for every stream."""
    rows = []
    for modality, order in dict.fromkeys(key[:2] for key in results):
        found = {key[2]: value for key, value in results.items() if key[:2] == (modality, order)}
        simple = [name for name in SIMPLE if name in found]
        best = max(simple, key=lambda name: np.mean([final(result) for result in found[name]]))
        for target in dict.fromkeys((REFERENCE, best)):
            targets = [final(result) for result in found[target]]
            row = [f"{modality}, {order}", target]
            for way, methods in CONTENDERS.items():
                rival = quickest(found, targets, way)
                row += [rival, *(relative(found[name], found[rival], targets, way) if name in found else ""
                                 for name in methods)]  # fmt: skip
            rows.append(row)
    header = ["stream", "to the accuracy of"]
    for way, methods in CONTENDERS.items():
        header += [f"{way}: quickest simple", *methods]
    return table(header, rows)


def cost_table(found: Mapping[str, Trials], window: int) -> str:
    """Milliseconds per round of each stage, latency per sample, memory, and where the gradient's error comes from."""
    rows = []
    for name, results in found.items():
        ends = [result["curve"][-1] for result in results]
        filter_ms, select_ms, update_ms = (
            1e3 * float(np.mean([end[part] / end["round"] for end in ends])) for part in ("filter", "select", "update")
        )
        moments = [mean_of(results, part) for part in ("filter_variance", "filter_bias", "variance", "select_bias")]
        memory = np.mean([result["grown_bytes"] for result in results]) / 2**20
        rows.append([name, f"{filter_ms / window:.4f}", f"{select_ms:.2f}", f"{update_ms:.2f}",
                     f"{select_ms / update_ms:.2f}", f"{memory:.0f}", *moments])  # fmt: skip
    header = ["method", "filter, ms per sample", "select, ms", "update, ms", "select / update", "memory, MiB",
              "filter variance", "filter bias²", "select variance", "select bias²"]  # fmt: skip
    return table(header, rows)


def theory(results: Results) -> str:
    """In how many rounds a proven inequality failed."""
    counts: dict[str, int] = {}
    for trials in results.values():
        for result in trials:
            for name, count in result["checks"].items():
                counts[name] = counts.get(name, 0) + count
    rounds = counts.pop("rounds", 0)
    return f"{rounds:,} rounds looked at; " + ", ".join(f"{name} in {count:,}" for name, count in counts.items())


def choices(found: Mapping[str, Trials]) -> list[str]:
    """What `auto` did."""
    lines = []
    for name, results in found.items():
        if not name.startswith("auto"):
            continue
        totals: dict[str, int] = {}
        for result in results:
            for what, count in result["strategies"].items():
                totals[what] = totals.get(what, 0) + count
        rounds = sum(totals.values())
        said = sorted(totals.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{what} in {100 * n / rounds:.0f} %" for what, n in said if n >= 0.01 * rounds)
        lines.append(f"* `{name}` took {shown} of the rounds (strategy and batch).")
    return lines


# ---------------------------------------------------------------------------------------------------------------- page


def write(
    page: Path,
    results: Results,
    rates: Mapping[tuple[str, str], float],
    rounds: Mapping[str, int],
    sources: Mapping[str, str],
    options: argparse.Namespace,
    command: str,
) -> None:
    """Write the page and its pictures."""
    parts = [
        "# Titan's comparison\n",
        f"Written by `{command}` with {options.jobs} trials at a time; Python {platform.python_version()}.\n",
        "* *rounds*, *seconds* (one processor) and *pipelined seconds* (filter and selection on a processor of their "
        "own, ideally) are those until the mean of three measurements reaches the final accuracy of the method named, "
        "on the same stream from the same start, relative to that method; in brackets 95 % intervals over "
        f"{options.seeds} seeds ({options.elsewhere_seeds} where the stream is not iid). Below 1 is faster. All "
        "methods run for the same number of rounds, so one with cheap rounds may end before it is as far as one with "
        "dear ones: `>` says on how many seeds it got there; the others count with all they used.\n"
        f"* Learning rates are the best of {', '.join(f'{rate:g}' for rate in options.rates)} for each method, by "
        f"its accuracy over the second half of the rounds on {options.tuning_seeds} seeds that are not reported. Plain "
        "SGD, x0.95 every 100 rounds, no clipping.\n"
        "* Seconds are processor seconds of one thread, testing left out. *memory* is how far the process grew.\n"
        "* Variances and squared biases are of the last layer's gradient, in units of the variance of ten random "
        "samples, from the first seed. The filter's are those of its candidates against their window.\n",
        f"C-IS with real-valued places against IS and random choice on the same candidates: {theory(results)}.\n",
        "## Does choosing pay?\n",
        f"Relative to the quickest of {', '.join(SIMPLE)} (as far as they ran), picked with hindsight for each "
        "row. The tables below compare with one rival each.\n",
        verdict(results),
    ]  # fmt: skip
    for modality, order in dict.fromkeys(key[:2] for key in results):
        found = {key[2]: value for key, value in results.items() if key[:2] == (modality, order)}
        own = {name: rates[modality, name] for name in found}
        parts += [f"## {modality}, {order}\n", f"{sources[modality]}; {rounds[modality]} rounds.\n"]
        parts += [accuracy_table(found, own), "\n".join(choices(found)) + "\n"]
        parts += [
            "Seconds to the final accuracy of the simple rivals, on one processor:\n",
            rivals_table(found, "seconds"),
        ]
        if order == "iid":
            parts += ["and pipelined:\n", rivals_table(found, "pipelined seconds"), cost_table(found, 100)]
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    if plot(results, picture):
        parts.append(f"![accuracy over rounds and seconds]({picture.name})\n")
    parts += ["## The paper's Table 1\n", paper_table()]
    page.write_text("\n".join(parts))


SHOWN = {"random": "#000000", "random-30": "#999999", "stratified": "#0072B2", "auto to 30": "#D55E00",
         "quota + titan": "#009E73", "c-is of all": "#CC79A7", "importance": "#E69F00"}  # fmt: skip
"""Methods of the picture and their colours (Okabe and Ito's, which the colour-blind tell apart)."""


def plot(results: Results, path: Path) -> bool:
    """Accuracy over rounds and seconds, one row per modality; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    modalities = list(dict.fromkeys(modality for modality, order, _ in results if order == "iid"))
    if not modalities:
        return False
    figure = Figure(figsize=(12, 0.6 + 2.9 * len(modalities)), layout="constrained")
    grid = figure.subplots(len(modalities), 3, squeeze=False)
    for row, modality in zip(grid, modalities, strict=True):
        shown = [name for name in SHOWN if (modality, "iid", name) in results]
        for axes, (way, unit) in zip(row, WAYS.items(), strict=True):
            for name in shown:
                curves = [result["curve"] for result in results[modality, "iid", name]]
                x = np.mean([[unit(point) for point in curve] for curve in curves], axis=0)
                y = 100 * np.mean([[point["accuracy"] for point in curve] for curve in curves], axis=0)
                axes.plot(x, y, color=SHOWN[name], label=name, linewidth=1.4)
            if way != "rounds":  # up to where random choice ends: what comes later no longer compares
                ends = [unit(result["curve"][-1]) for result in results[modality, "iid", REFERENCE]]
                axes.set_xlim(0, 1.25 * np.mean(ends))
            axes.set_xlabel(
                {"seconds": "seconds, one processor", "pipelined seconds": "seconds, pipelined"}.get(way, way)
            )
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{modality}: accuracy, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True
