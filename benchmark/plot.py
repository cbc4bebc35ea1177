"""Learning curves and tables from the CSVs in results/.

    python benchmark/plot.py

Draws results/curves.png (mean over seeds, 95% bootstrap band) and writes the Markdown tables between their markers in
README.md and benchmark/README.md, so that text and data cannot disagree; tests/test_benchmark.py fails when they do.
"""

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
NAMES = {
    "ppo_clip": "PPO, clipped",
    "ppo_kl": "PPO, adaptive KL",
    "trpo": "TRPO",
    "npg": "NPG",
    "ppo_none": "no clip, no penalty",
}
COLORS = {"ppo_clip": "#0072B2", "ppo_kl": "#E69F00", "trpo": "#009E73", "npg": "#CC79A7", "ppo_none": "#888888"}
# The best published figure with one setting for all tasks, 1M steps; whose it is stands beside the table.
PUBLISHED = {
    ("ppo_clip", "HalfCheetah-v5"): 5784, ("ppo_clip", "Hopper-v5"): 2609, ("ppo_clip", "Walker2d-v5"): 3717,
    ("ppo_kl", "HalfCheetah-v5"): 2207, ("ppo_kl", "Hopper-v5"): 2236, ("ppo_kl", "Walker2d-v5"): 3639,
    ("trpo", "HalfCheetah-v5"): 4471, ("trpo", "Hopper-v5"): 2046, ("trpo", "Walker2d-v5"): 3827,
    ("npg", "HalfCheetah-v5"): 3485, ("npg", "Hopper-v5"): 1915, ("npg", "Walker2d-v5"): 2503,
}  # fmt: skip


def summary() -> dict[tuple[str, str], list[dict[str, str]]]:
    """{(algorithm, environment): rows of results/summary.csv, by seed}."""
    rows = defaultdict(list)
    with (RESULTS / "summary.csv").open() as f:
        for row in sorted(csv.DictReader(f), key=lambda row: int(row["seed"])):
            rows[row["algorithm"], row["env_id"]].append(row)
    return rows


def cell(rows: list[dict[str, str]], column: str) -> str:
    values = np.array([float(row[column]) for row in rows])
    digits = 0 if np.abs(values).max() >= 100 else 1
    return f"{values.mean():.{digits}f} ± {values.std(ddof=min(1, len(values) - 1)):.{digits}f}"


def results_table() -> str:
    """One row an algorithm, one column an environment: the last 100 training episodes, mean ± std over seeds."""
    rows = summary()
    env_ids = sorted({env_id for _, env_id in rows})
    lines = ["| | " + " | ".join(env_ids) + " |", "| --- |" + " --- |" * len(env_ids)]
    for algorithm, name in NAMES.items():
        cells = []
        for env_id in env_ids:
            runs = rows.get((algorithm, env_id), [])
            best = PUBLISHED.get((algorithm, env_id))
            text = f"{cell(runs, 'train_last_100')}, {len(runs)} seeds" if runs else ""
            cells.append(text + (f" (published: {best})" if best and runs else ""))
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seeds_table() -> str:
    """Every run: training mean, deterministic evaluation, and the command that repeats it."""
    lines = [
        "| algorithm | environment | seed | last 100 training episodes | deterministic evaluation | command |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = summary()
    for algorithm, env_id in sorted(rows, key=lambda key: (list(NAMES).index(key[0]), key[1])):
        for row in rows[algorithm, env_id]:
            lines.append(
                f"| {NAMES[algorithm]} | {env_id} | {row['seed']} | {float(row['train_last_100']):.1f} "
                f"| {row['evaluation_mean']} ± {row['evaluation_std']} | `{row['command']}` |"
            )
    return "\n".join(lines)


def measured(section: str) -> dict[str, dict[str, list[float]]]:
    """{case: {quantity: its value in each repetition}} of results/speed_<section>.csv, made by speed.py."""
    values = defaultdict(lambda: defaultdict(list))
    path = RESULTS / f"speed_{section}.csv"
    if path.exists():
        with path.open() as f:
            for row in csv.DictReader(f):
                values[row["case"]][row["quantity"]].append(float(row["value"]))
    return values


def speed_table(section: str) -> str:
    """Medians over the repetitions, and the ratio to each peer of the same kind with its smallest and largest value."""
    cases = measured(section)
    peers = [case for case in cases if case.startswith(("SB3", "sb3"))]
    lines = [
        "| case | steps/s | start-up, s | peak MiB |" + "".join(f" times {peer} |" for peer in peers),
        "| --- | --- | --- | --- |" + " --- |" * len(peers),
    ]
    for case, values in cases.items():
        line = f"| {case} | {np.median(values['steps_per_second']):,.0f} | {np.median(values['startup_s']):.1f} "
        line += f"| {max(values['peak_mib']):.0f} |"
        for peer in peers:
            ratios = np.array(values["steps_per_second"]) / np.array(cases[peer]["steps_per_second"])
            same = case not in peers and ("trpo" in case) == ("TRPO" in peer)
            line += f" {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) |" if same else " |"
        lines.append(line)
    return "\n".join(lines)


def time_table() -> str:
    """Microseconds a step of each part of a run, medians of the repetitions; in brackets the least it can take."""
    cases = measured("time")
    parts = ["environment", "network", "optimizer", "advantages", "statistics", "log", "rest", "total"]
    lines = ["| µs a step | " + " | ".join(parts) + " | neither environment, network nor optimizer |"]
    lines.append("| --- |" + " --- |" * (len(parts) + 1))
    for case, values in cases.items():
        median = {part: np.median(values[part]) for part in values}
        bound = {part: f" (at least {median[b]:.1f})" if (b := f"bound: {part}") in median else "" for part in parts}
        cells = [f"{median[part]:.1f}{bound[part]}" for part in parts]
        other = 1.0 - sum(median[part] for part in parts[:3]) / median["total"]
        lines.append(f"| {case} | " + " | ".join(cells) + f" | {other:.0%} |")
    return "\n".join(lines)


TABLES = {  # (file, marker): what stands between <!-- marker --> and <!-- end of marker -->
    (ROOT / "README.md", "results"): results_table,
    (ROOT / "benchmark" / "README.md", "runs"): seeds_table,
    (ROOT / "benchmark" / "README.md", "speed"): lambda: speed_table("peers"),
    (ROOT / "benchmark" / "README.md", "speed of Atari"): lambda: speed_table("atari"),
    (ROOT / "benchmark" / "README.md", "time"): time_table,
    (ROOT / "benchmark" / "README.md", "scaling"): lambda: speed_table("scaling"),
}


def marked(marker: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {marker} -->\n\n).*?\n(?=\n<!-- end of {marker} -->)", re.S)


def curve(algorithm: str, env_id: str, seed: str, steps: np.ndarray) -> np.ndarray:
    """Mean return of the episodes that ended within the last 5% of the run's length, at each of steps."""
    name = f"{env_id.replace('/', '-')}__{seed}.csv"
    data = np.loadtxt(RESULTS / algorithm / name, delimiter=",", skiprows=1, ndmin=2)
    window = steps[-1] / 20
    means = []
    for step in steps:
        inside = data[(data[:, 0] > step - window) & (data[:, 0] <= step), 1]
        means.append(inside.mean() if len(inside) else np.nan)
    return np.array(means)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scipy.stats import bootstrap

    rows = summary()
    env_ids = sorted({env_id for _, env_id in rows})
    columns = min(3, len(env_ids))
    figure, axes = plt.subplots(
        -(-len(env_ids) // columns), columns, figsize=(4.2 * columns, 3.2 * -(-len(env_ids) // columns)), squeeze=False
    )
    steps = np.linspace(25_000, 1_000_000, 40)
    for axis, env_id in zip(axes.flat, env_ids):
        for algorithm, name in NAMES.items():
            runs = rows.get((algorithm, env_id), [])
            if not runs:
                continue
            curves = np.array([curve(algorithm, env_id, run["seed"], steps) for run in runs])
            axis.plot(steps / 1e6, curves.mean(0), color=COLORS[algorithm], label=name)
            if len(runs) > 2:
                band = bootstrap((curves,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=0)
                low, high = band.confidence_interval
                axis.fill_between(steps / 1e6, low, high, color=COLORS[algorithm], alpha=0.2, linewidth=0)
        axis.set_title(env_id)
        axis.set_xlabel("million steps")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("training return")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(RESULTS / "curves.png", dpi=110)


if __name__ == "__main__":
    for (path, marker), table in TABLES.items():
        path.write_text(marked(marker).sub(lambda _: table() + "\n", path.read_text()))  # noqa: B023
    draw()
