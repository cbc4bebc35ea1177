"""Learning curves and tables from the CSVs in results/.

    python benchmark/plot.py

Draws results/curves.png (mean over seeds, 95% bootstrap band) and results/atari.png, and writes the Markdown tables
between their markers in README.md and benchmark/README.md, so that text and data cannot disagree;
tests/test_benchmark.py fails when they do.
"""

import csv
import functools
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro
from run import file_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
NAMES = {"ppo_clip": "PPO, clipped", "ppo_kl": "PPO, adaptive KL", "trpo": "TRPO", "npg": "NPG"}
FIXED = {"ppo_clip_fixed": "PPO, clipped, rate on its line", "ppo_kl_fixed": "PPO, adaptive KL, rate on its line"}
TABLE_1 = {  # the rows of table1.py
    "none": "no clipping or penalty",
    **{f"clip_{e}": f"clipping, ε = {e}" for e in (0.1, 0.2, 0.3)},
    **{f"kl_{d}": f"adaptive KL, d_targ = {d}" for d in (0.003, 0.01, 0.03)},
    **{f"beta_{b}": f"fixed KL, β = {b}" for b in (0.3, 1, 3, 10)},
    "trpo": "TRPO, δ = 0.01",
}
CHANGES = {  # what table1.py tries one at a time
    "observations": "observations normalised",
    "rewards": "rewards scaled",
    "anneal": "learning rate falling to 0",
    "recompute": "advantages anew before every epoch",
    "raw": "advantages as they are",
    "log_std": "log-std starting at -0.5",
    "grad_norm": "gradient clipped to a norm of 0.5",
}
OTHERS = {
    **FIXED,
    "ppo_none": "no clipping or penalty",
    **{row: name for row, name in TABLE_1.items() if row not in NAMES},
    **{f"paper_{row}": f"{name}, the paper's setting" for row, name in TABLE_1.items()},
    **{f"one_env_{row}": f"{name}, the paper's setting, one environment" for row, name in TABLE_1.items()},
    "collapse_none": "no clipping or penalty, see table1.md",
    "collapse_none_raw": "no clipping or penalty, advantages as they are, see table1.md",
    "collapse_clip_0.2_raw": "clipping, advantages as they are, see table1.md",
    **{f"with_{key}": f"clipping, the paper's setting, but {name}" for key, name in CHANGES.items()},
    **{f"without_{key}": f"clipping, our defaults, but not {name}" for key, name in CHANGES.items()},
    "ppo_clip_gamma": "PPO, clipped, γ = 0.9999",
    "ppo_kl_gamma": "PPO, adaptive KL, γ = 0.9999",
    "damped_npg": "NPG, damping 0.1",
    "damped_trpo_no_floor": "TRPO, damping 0.1, no floor",
    "damped_npg_no_floor": "NPG, damping 0.1, no floor",
    "trpo_gamma": "TRPO, γ = 0.9999",
    "sb3_ppo": "stable-baselines3 PPO",
    "sb3_trpo": "sb3-contrib TRPO",
    "sb3_trpo_nats": "sb3-contrib TRPO, δ = 0.01 nats",
    "ppo_atari": "PPO, Atari",
    "ppo_atari_3M": "PPO, Atari, learning rate down to 0 at 3M steps",
    "ppo_atari_float32": "PPO, Atari, in float32",
    "random": "random policy",
}
COLORS = {"ppo_clip": "#0072B2", "ppo_kl": "#E69F00", "trpo": "#009E73", "npg": "#CC79A7"}
# The best published figure with one setting for all tasks, 1M steps, of PPO, its KL penalty, TRPO and NPG. Those for
# Ant are of v3 and v4, which do not observe contact forces.
PUBLISHED = {
    env_id: dict(zip(NAMES, figures))
    for env_id, figures in {
        "HalfCheetah-v5": (5784, 2207, 4471, 3485),
        "Hopper-v5": (2609, 2236, 2046, 1915),
        "Walker2d-v5": (3717, 3639, 3827, 2503),
        "Ant-v4": (3258, 159, 2867, 2358),
        "Humanoid-v5": (787, 553, 810, 765),
        "Swimmer-v5": (111, None, 95, 32),
        "Reacher-v5": (-4.1, None, -4.8, -4.5),
        "InvertedPendulum-v5": (1000, None, 1000, 1000),
        "InvertedDoublePendulum-v5": (9231, None, 8435, 9243),
    }.items()
}
# Most are Tianshou's, the best deterministic evaluation of a run. These are returns at the end of training: of the KL
# penalty and on Walker2d KLip-PPO's (arXiv 2606.23932), the others OpenAI Baselines'.
PUBLISHED_TRAINING = {("ppo_kl", env_id) for env_id in PUBLISHED} | {
    ("ppo_clip", "Walker2d-v5"), ("ppo_clip", "Swimmer-v5"), ("trpo", "Swimmer-v5"), ("trpo", "Reacher-v5"),
}  # fmt: skip
PEERS = ("ppo_clip", "sb3_ppo", "trpo", "sb3_trpo", "sb3_trpo_nats")
ORDER = [*PUBLISHED, "Ant-v5"]
FEWEST = 3  # seeds below which there is no interval, and no verdict
ENOUGH = 5  # seeds below which an interval that holds the published figure decides nothing


@functools.cache
def summary() -> dict[tuple[str, str], list[dict[str, str]]]:
    """{(algorithm, environment): rows of results/summary.csv, by seed}."""
    rows = defaultdict(list)
    with (RESULTS / "summary.csv").open() as f:
        for row in sorted(csv.DictReader(f), key=lambda row: int(row["seed"])):
            rows[row["algorithm"], row["env_id"]].append(row)
    return dict(rows)


def curve_of(run: dict[str, str]) -> Path:
    """The CSV with the learning curve of a run (`run.thin`), given its row of the summary."""
    return RESULTS / run["algorithm"] / f"{file_name(run['env_id'], run['seed'])}.csv"


def numbers(rows: list[dict[str, str]], column: str = "train_last_100") -> np.ndarray:
    return np.array([float(row[column]) for row in rows])


def short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def mean_of_tasks(*tasks: np.ndarray) -> np.ndarray:
    """Mean over several tasks, each [..., its number of runs] of scores: every task counts the same."""
    return np.mean([runs.mean(-1) for runs in tasks], axis=0)


def interquartile_mean(*tasks: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the runs of several tasks, each [..., its number of runs] (Agarwal et al. 2021)."""
    runs = np.sort(np.concatenate(tasks, axis=-1))
    cut = runs.shape[-1] // 4
    return runs[..., cut : runs.shape[-1] - cut].mean(-1)


def interval(tasks: list[np.ndarray], statistic) -> tuple[float, float]:
    """95% percentile bootstrap interval; the runs of each task are drawn among themselves."""
    rng = np.random.default_rng(0)  # in numpy, as the tests that compare tables with data do without scipy
    draws = [rng.choice(runs, (2000, len(runs))) for runs in tasks]
    return tuple(np.percentile(statistic(*draws), [2.5, 97.5]))


def cell(runs: list[dict[str, str]], best: float | None, compared: str) -> tuple[str, str]:
    """(text, verdict) of the runs of one algorithm on one task beside the best published figure, which is compared with
    one of the two columns; no verdict without such a figure, or with too few runs."""
    parts, verdict = [], ""
    for column in ("train_last_100", "evaluation_mean") if runs else ():
        values = numbers(runs, column)
        bold = "**" if best is not None and column == compared else ""
        parts.append(f"{bold}{short(values.mean())}{bold}")
        if len(runs) >= FEWEST:
            low, high = interval([values], mean_of_tasks)
            parts[-1] += f" ({short(low)} to {short(high)})"
            if bold:
                verdict = "ahead of" if low > best else "behind" if high < best else "level with"
                if verdict == "level with" and (low < best - 0.5 * abs(best) or len(runs) < ENOUGH):
                    verdict = "undecided beside"  # an interval as wide, or of as few seeds, contains almost anything
                parts[-1] += f", {verdict} {short(best)}"
    if runs and len(runs) != 5:
        parts.append(f"{len(runs)} seed{'s' * (len(runs) > 1)}")
    return "<br>".join(parts), verdict


@functools.cache
def beside_published(algorithm: str, env_id: str) -> tuple[str, str]:
    """(text, verdict) of `cell`, for one algorithm on one task."""
    best = PUBLISHED.get(env_id, {}).get(algorithm)
    compared = "train_last_100" if (algorithm, env_id) in PUBLISHED_TRAINING else "evaluation_mean"
    return cell(summary().get((algorithm, env_id), []), best, compared)


def outcome() -> str:
    """The verdicts of all tasks, in a sentence."""
    parts = []
    for algorithm, name in NAMES.items():
        verdicts = {env_id: verdict for env_id in ORDER if (verdict := beside_published(algorithm, env_id)[1])}
        good = sum(verdict in ("ahead of", "level with") for verdict in verdicts.values())
        others = []
        for what, word in (("behind", "behind on"), ("undecided beside", "undecided on")):
            if tasks := [env_id for env_id, verdict in verdicts.items() if verdict == what]:
                others.append(f"{word} {', '.join(tasks)}")
        parts.append(f"{name} on {good} of {len(verdicts)} tasks" + f" ({'; '.join(others)})" * bool(others))
    return (
        "Ahead of or level with the best figure that we know of, published for the same algorithm with one setting for "
        f"all tasks (on older versions of them): {'; '.join(parts)}."
    )


def results_table() -> str:
    """One row a task; in a cell the last 100 training episodes and the deterministic evaluation, each the mean over
    seeds with its interval. What is measured as the best published figure was stands in bold, with the verdict."""
    rows = summary()
    lines = ["| | " + " | ".join(NAMES.values()) + " |", "| --- |" + " --- |" * len(NAMES)]
    for env_id in ORDER:
        cells = [beside_published(algorithm, env_id)[0] for algorithm in NAMES]
        if any(cells):
            lines.append(f"| {env_id} | " + " | ".join(cells) + " |")
    for env_id, own, what in (("Swimmer-v5", "gamma", "`--gamma 0.9999 --no-adapt-lr`"),):
        cells = [cell(rows.get((f"{algorithm}_{own}", env_id), []), None, "")[0] for algorithm in NAMES]
        if any(cells):
            lines.append(f"| not counted: {env_id}, {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def means(runs: list[dict[str, str]]) -> str:
    """The last 100 training episodes / the deterministic evaluation, means over seeds."""
    columns = ("train_last_100", "evaluation_mean") if runs else ()
    seeds = "" if len(runs) in (0, ENOUGH) else f" ({len(runs)} seed{'s' * (len(runs) > 1)})"
    return " / ".join(short(numbers(runs, column).mean()) for column in columns) + seeds


def means_table() -> str:
    """`means`, one row a task."""
    rows = summary()
    lines = ["| | " + " | ".join(NAMES.values()) + " |", "| --- |" + " --- |" * len(NAMES)]
    for env_id in ORDER:
        cells = [means(rows.get((algorithm, env_id), [])) for algorithm in NAMES]
        if any(cells):
            lines.append(f"| {env_id} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steered_table() -> str:
    """`means` of the same seeds with the learning rate as it falls linearly, and as it follows the KL."""
    rows = summary()
    names = {**NAMES, **FIXED}
    columns = [x for fixed in FIXED for x in (fixed, fixed.removesuffix("_fixed"))]
    lines = ["| | " + " | ".join(names[name] for name in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for env_id in ORDER:
        cells = []
        for name in columns:
            seeds = {run["seed"] for run in rows.get((name.removesuffix("_fixed"), env_id), [])}
            cells.append(means([run for run in rows.get((name, env_id), []) if run["seed"] in seeds]))
        if any(cells):
            lines.append(f"| {env_id} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def atari_line() -> str:
    """The scores of ppo_atari.py with its default schedule, in a line."""
    games = {env_id: runs for (algorithm, env_id), runs in sorted(summary().items()) if algorithm == "ppo_atari"}
    parts = []
    for env_id, runs in games.items():
        scores = [f"{float(r['train_last_100']):.1f} ({float(r['total_timesteps']) / 1e6:.1f}M steps)" for r in runs]
        parts.append(f"`{env_id}` {', '.join(scores)}")
    return "Atari, mean score of the last 100 full games, a figure a seed: " + "; ".join(parts) + "."


def atari_table() -> str:
    """One row a run of ppo_atari.py with its default schedule."""
    lines = ["| game | seed | steps | last 100 games | 10 games of the policy that came out |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for (algorithm, env_id), runs in sorted(summary().items()):
        if algorithm == "ppo_atari":
            for run in runs:
                lines.append(
                    f"| {env_id} | {run['seed']} | {float(run['total_timesteps']) / 1e6:.1f}M "
                    f"| **{float(run['train_last_100']):.1f}** | {run['evaluation_mean']} ± {run['evaluation_std']} |"
                )
    return "\n".join(lines)


def aggregate_table() -> str:
    """Interquartile mean over tasks and seeds of the deterministic evaluation, which is what most of the best published
    figures are as well; 0 is a random policy, 1 the best published of all algorithms."""
    rows = summary()
    env_ids = [env_id for env_id in PUBLISHED if rows.get(("random", env_id))]
    lines = ["| | interquartile mean | 95% interval | tasks | runs |", "| --- | --- | --- | --- | --- |"]
    for algorithm, name in NAMES.items():
        tasks = []
        for env_id in env_ids:
            zero = numbers(rows["random", env_id], "evaluation_mean").mean()  # of all its episodes
            one = max(figure for figure in PUBLISHED[env_id].values() if figure is not None)
            if len(runs := rows.get((algorithm, env_id), [])) >= FEWEST:
                tasks.append((numbers(runs, "evaluation_mean") - zero) / (one - zero))
        if tasks:
            low, high = interval(tasks, interquartile_mean)
            cells = [f"{interquartile_mean(*tasks):.2f}", f"{low:.2f} to {high:.2f}", len(tasks), sum(map(len, tasks))]
            lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def mean_and_spread(runs: list[dict[str, str]]) -> str:
    """Last 100 training episodes and deterministic evaluation, mean ± std over seeds."""
    parts = []
    for column in ("train_last_100", "evaluation_mean") if runs else ():
        values = numbers(runs, column)
        parts.append(short(values.mean()) + (f" ± {short(values.std(ddof=1))}" if len(runs) > 1 else ""))
    return "<br>".join(parts) + (f"<br>{len(runs)} seed{'s' * (len(runs) > 1)}" if runs else "")


def peers_table() -> str:
    """Ours beside the peers, and the time to 3,000 on HalfCheetah."""
    rows, names = summary(), {**NAMES, **OTHERS}
    columns = [name for name in PEERS if any(a == name for a, _ in rows)]
    lines = ["| | " + " | ".join(names[name] for name in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for env_id in ORDER:
        if any((peer, env_id) in rows for peer in ("sb3_ppo", "sb3_trpo")):
            cells = [mean_and_spread(rows.get((name, env_id), [])) for name in columns]
            lines.append(f"| {env_id} | " + " | ".join(cells) + " |")
    cells = []
    for name in columns:
        runs = rows.get((name, "HalfCheetah-v5"), [])
        steps = [float(run["steps_to_3000"] or "inf") for run in runs]
        reached = f"{np.isfinite(steps).sum()} of {len(runs)} seeds"
        if not runs or np.isinf(np.median(steps)):
            cells.append(f"never, {reached}" if runs else "")
            continue
        # A resumed run has no speed; a median of seconds would pair a seed's steps with what else ran beside it.
        timed = [(n, run) for n, run in zip(steps, runs) if np.isfinite(n) and run["steps_per_second"]]
        times = [n / float(run["steps_per_second"]) for n, run in timed]
        seconds = f"{min(times):.0f} to {max(times):.0f} s; " if times else ""
        cells.append(f"{np.median(steps):,.0f} steps; {seconds}{reached}")
    lines.append("| HalfCheetah-v5 until 3,000 (median of steps; range of times) | " + " | ".join(cells) + " |")
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


def speed_table() -> str:
    """Medians over the repetitions, and how many times as fast as the peer of the same kind with 1 and 8 environments,
    with the smallest and the largest ratio; where they are measured, as SBX and as the limit of the machine, too."""
    columns = ["times the peer, 1 environment", "times the peer, 8 environments"]
    if "the limit of PPO" in measured("peers"):
        columns += ["times SBX, 1 environment", "times SBX, 8 environments", "share of the limit"]
    lines = ["| | steps/s |" + "".join(f" {column} |" for column in columns)]
    lines.append("| --- | --- |" + " --- |" * len(columns))
    peers = {"trpo": ("sb3-contrib TRPO", "", "the limit of TRPO"), "ppo_atari": ("SB3 PPO CnnPolicy", "", "")}
    for section, case in (
        ("peers", "trpo"), ("peers", "trpo --compile"), ("peers", "ppo_clip"), ("peers", "ppo_clip --compile"),
        ("peers", "ppo_kl"), ("peers", "ppo_kl --compile"), ("atari", "ppo_atari"),
    ):  # fmt: skip
        cases, cells = measured(section), []
        speeds = np.array(cases[case]["steps_per_second"])
        peer, sbx, limit = peers.get(case.split()[0], ("SB3 PPO", "SBX PPO", "the limit of PPO"))
        names = [f"{peer}, 1 environment", peer if section == "atari" else f"{peer}, 8 environments"]
        for name in [*names, f"{sbx}, 1 environment", f"{sbx}, 8 environments", limit][: len(columns)]:
            if name not in cases:
                cells.append("")
                continue
            ratios = speeds / np.array(cases[name]["steps_per_second"])
            cells.append(f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")
        lines.append(f"| {case} | {np.median(speeds):,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def torchrun_table() -> str:
    """Median speed with one process and with two, and the ratio, with its smallest and largest of the repetitions."""
    lines = ["| | 1 process, steps/s | 2 processes | times as fast |", "| --- | --- | --- | --- |"]
    cases = measured("torchrun")
    for case in [name.removesuffix(", 1 process") for name in cases if name.endswith(", 1 process")]:
        one, two = (np.array(cases[f"{case}, {n}"]["steps_per_second"]) for n in ("1 process", "2 processes"))
        ratio = f"{np.median(two / one):.2f} ({min(two / one):.2f} to {max(two / one):.2f})"
        lines.append(f"| {case} | {np.median(one):,.0f} | {np.median(two):,.0f} | {ratio} |")
    return "\n".join(lines)


UNDECIDED = f" Undecided: level, but with fewer than {ENOUGH} seeds or an interval reaching below half of the figure."


def readme_table() -> str:
    """Means, verdicts and Atari scores, as README.md shows them."""
    verdicts = outcome()
    return f"{means_table()}\n\n{verdicts}{UNDECIDED * ('undecided' in verdicts)}\n\n{atari_line()}"


README, PAGE = ROOT / "README.md", ROOT / "benchmark" / "README.md"
TABLES = {  # (file, marker): what stands between <!-- marker --> and <!-- end of marker -->
    (README, "results"): readme_table,
    (PAGE, "steered"): steered_table,
    (PAGE, "outcome"): outcome,
    (PAGE, "results"): results_table,
    (PAGE, "Atari"): atari_table,
    (PAGE, "aggregate"): aggregate_table,
    (PAGE, "peers"): peers_table,
    (PAGE, "speed"): speed_table,
    (PAGE, "torchrun"): torchrun_table,
}


def marked(marker: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {marker} -->\n\n).*?\n(?=\n<!-- end of {marker} -->)", re.S)


def curve(run: dict[str, str], steps: np.ndarray) -> np.ndarray:
    """Mean return of the episodes that ended within the last 5% of the run's length, at each of steps."""
    data = np.loadtxt(curve_of(run), delimiter=",", skiprows=1, ndmin=2)
    window = steps[-1] / 20
    means = []
    for step in steps:
        _, returns, episodes = data[(data[:, 0] > step - window) & (data[:, 0] <= step)].T
        means.append(np.average(returns, weights=episodes) if len(episodes) else np.nan)
    return np.array(means)


def last_100(returns: np.ndarray, episodes: np.ndarray) -> list[float]:
    """At each row of a curve the mean return of the last 100 episodes; of the oldest row that reaches into them as many
    as are missing to 100, as if all of its episodes had its mean."""
    means = []
    for i in range(len(returns)):
        newer = np.cumsum(episodes[i::-1]) - episodes[i::-1]  # episodes after each row's, newest row first
        weights = np.clip(100 - newer, 0, episodes[i::-1])
        means.append(float(np.average(returns[i::-1], weights=weights)))
    return means


def draw_atari() -> None:
    """results/atari.png: mean score of the last 100 games over the steps, a line a run, a picture a game."""
    import matplotlib.pyplot as plt

    runs = [run for rows in summary().values() for run in rows if run["env_id"].startswith("ALE/")]
    games = sorted({run["env_id"] for run in runs})
    figure, axes = plt.subplots(1, len(games), figsize=(5.5 * len(games), 3.6), squeeze=False)
    for run in runs:
        axis = axes[0, games.index(run["env_id"])]
        steps, scores, played = np.loadtxt(curve_of(run), delimiter=",", skiprows=1).T
        setting = OTHERS[run["algorithm"]].removeprefix("PPO, Atari").removeprefix(", ") or "default"
        axis.plot(steps / 1e6, last_100(scores, played), label=f"{setting}, seed {run['seed']}")
    for axis, game in zip(axes[0], games):
        axis.set_title(game)
        axis.set_xlabel("million steps")
        axis.set_ylabel("score, mean of 100 games")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "atari.png", dpi=110)


def write(tables: dict) -> None:
    """Put every table between its markers."""
    for (path, marker), table in tables.items():
        text, found = marked(marker).subn(lambda _: table() + "\n", path.read_text())  # noqa: B023
        if found != 1:
            raise ValueError(f"{path.name} has {found} places between <!-- {marker} --> and its end, not one")
        path.write_text(text)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scipy.stats import bootstrap

    rows = summary()
    env_ids = [env_id for env_id in ORDER if any((algorithm, env_id) in rows for algorithm in NAMES)]
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
            curves = np.array([curve(run, steps) for run in runs])
            style = "--" if algorithm.endswith("npg") else "-"  # in places it is close to TRPO's
            axis.plot(steps / 1e6, curves.mean(0), style, color=COLORS[algorithm], label=name)
            if len(runs) > 2:
                band = bootstrap((curves,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=0)
                low, high = band.confidence_interval
                axis.fill_between(steps / 1e6, low, high, color=COLORS[algorithm], alpha=0.2, linewidth=0)
        axis.set_title(env_id)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(env_ids) :]:
        axis.remove()
    for axis in axes.flat[len(env_ids) - columns : len(env_ids)]:  # the lowest of each column
        axis.set_xlabel("million steps")
    for axis in axes[:, 0]:
        axis.set_ylabel("training return")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(RESULTS / "curves.png", dpi=110)


def main() -> None:
    draw()
    draw_atari()
    write(TABLES)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
