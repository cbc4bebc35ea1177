"""Table 1 of the PPO paper: clipping, a KL penalty or nothing, on its seven tasks, and TRPO beside them.

    python benchmark/table1.py                         # runs what results/ does not hold yet, then writes the page
    python benchmark/table1.py --rows clip_0.2 kl_0.01 # only these rows
    python benchmark/table1.py --no-run                # only the page and the picture, from the CSVs that are there
    python benchmark/table1.py --no-run --collapse     # the runs that show where the collapse comes from
    python benchmark/table1.py --no-run --changes      # clipping, from the paper's setting to ours, change by change

Every row in two settings, both with a learning rate that does not follow the KL: the objective alone is to limit the
step. "Ours" are the other defaults of the scripts. "Paper" is its table 3 without anything that it does
not mention: 2,048 steps an iteration, lambda 0.95, a constant learning rate, advantages once an iteration, no
normalisation of observations, no scaling of rewards, no clipping of the gradient's norm. Where it is silent:
advantages are normalised, as a beta means nothing beside advantages of arbitrary scale; the log-std starts at 0, the
networks as ours.
The 2,048 steps are 8 environments' 256: one environment's take more than twice as long. "one_env" checks that:

    python benchmark/table1.py --settings one_env --tasks HalfCheetah --rows none --seeds 1

Writes table1.md (between its markers) and results/table1.png.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import plot
import run
import tyro

PAGE = Path(__file__).parent / "table1.md"
TASKS = ["HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum", "Reacher", "Swimmer", "Walker2d"]
CLIP, KL = ["ppo_clip_continuous.py", "--no-adapt-lr"], ["ppo_kl_continuous.py", "--no-adapt-lr"]
PAPER_SETTING = (
    "--gae-lambda 0.95 --no-anneal-lr --no-recompute-advantages --init-log-std 0 --no-normalize-observations "
    "--no-scale-rewards --center-advantages --normalize-advantages --max-grad-norm 1e9"
).split()
ONE_ENV = "--num-envs 1 --num-steps 2048".split()
BOTH = ("ours", "paper")
SETTINGS = {"ours": [], "paper": PAPER_SETTING, "one_env": [*ONE_ENV, *PAPER_SETTING]}
ROWS = {  # one of plot.TABLE_1: (the paper's score, our command)
    "none": (-0.39, [*KL, "--kl-coef", "0", "--no-adapt-kl-coef"]),
    **{f"clip_{e}": (score, [*CLIP, "--clip-coef", f"{e}"]) for e, score in ((0.1, 0.76), (0.2, 0.82), (0.3, 0.70))},
    **{f"kl_{d}": (score, [*KL, "--target-kl", f"{d}"]) for d, score in ((0.003, 0.68), (0.01, 0.74), (0.03, 0.71))},
    **{
        f"beta_{b}": (score, [*KL, "--kl-coef", f"{b}", "--no-adapt-kl-coef"])
        for b, score in ((0.3, 0.62), (1, 0.71), (3, 0.72), (10, 0.69))
    },
    "trpo": (None, ["trpo_continuous.py"]),
}
SAME = {"none": "ppo_none", "clip_0.2": "ppo_clip_fixed"}  # rows that run.py has under another name
IN_PAPER_SETTING = [row for row in ROWS if row != "trpo"]
# Where the collapse of the unconstrained surrogate comes from: the paper's setting on HalfCheetah, 300,000 steps, with
# advantages normalised or as they are, and actions within their box or not.
RAW = ["--no-center-advantages", "--no-normalize-advantages"]
COLLAPSE = {  # name: (row, what differs)
    "collapse_none": ("none", []),
    "collapse_none_raw": ("none", RAW),
    "collapse_clip_0.2_raw": ("clip_0.2", RAW),
}
CHANGES = {  # one of plot.CHANGES, from the paper's setting to our defaults: (arguments with it, without it)
    "observations": (["--normalize-observations"], ["--no-normalize-observations"]),
    "rewards": (["--scale-rewards"], ["--no-scale-rewards"]),
    "anneal": (["--anneal-lr"], ["--no-anneal-lr"]),
    "recompute": (["--recompute-advantages"], ["--no-recompute-advantages"]),
    "raw": (RAW, ["--center-advantages", "--normalize-advantages"]),
    "log_std": (["--init-log-std", "-0.5"], ["--init-log-std", "0"]),
    "grad_norm": (["--max-grad-norm", "0.5"], ["--max-grad-norm", "1e9"]),
}
UNCLIPPED = "benchmark.unclipped:HalfCheetahUnclipped-v5"


@dataclass
class Args:
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    """Which of ROWS to run."""
    settings: list[str] = field(default_factory=lambda: ["ours", "paper"])
    """Which of SETTINGS to run."""
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Which of TASKS to run."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds of each run."""
    workers: int = os.cpu_count() or 1
    """Runs at a time."""
    results: Path = plot.RESULTS
    """Where the CSVs go; the page is written only from those of the repository. Another folder repeats a row there."""
    runs: Path = run.Args.runs
    """Where the run directories go; what lies finished there is not trained anew."""
    run: bool = True
    """Run what the rows lack; off: none of them."""
    collapse: bool = False
    """Run the 18 runs of "Without clipping or penalty" too, also with --no-run."""
    changes: bool = False
    """Run those of "What the settings outside the objective change" too, on --tasks and --seeds, also with --no-run."""


def algorithm(row: str, setting: str) -> str:
    """The name that a row has in results/summary.csv."""
    return SAME.get(row, row) if setting == "ours" else f"{setting}_{row}"


def returns(name: str) -> list[np.ndarray]:
    """One array a task: mean return of the last 100 episodes of each of seeds 1 to 3 that has been run."""
    results = plot.summary()
    tasks = [results.get((name, f"{task}-v5"), []) for task in TASKS]
    return [plot.numbers([run for run in runs if int(run["seed"]) <= 3]) for runs in tasks]


def scores(setting: str, among: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    """{row: one array a task, of its runs' scores}: the last 100 episodes on the scale from a random policy, 0, to the
    best row among these settings on that task, 1 (section 6.1). Only rows that have been run on every task have a
    score, and only one with all its runs can be the best."""
    rows = {(which, row): returns(algorithm(row, which)) for which in among for row in ROWS}
    rows = {key: tasks for key, tasks in rows.items() if all(map(len, tasks))}
    zero = [plot.numbers(plot.summary()["random", f"{task}-v5"], "evaluation_mean").mean() for task in TASKS]
    whole = [tasks for tasks in rows.values() if all(len(runs) == 3 for runs in tasks)]
    best = [max(runs.mean() for runs in of_task) for of_task in zip(*whole)]
    return {
        row: [(runs - low) / (high - low) for runs, low, high in zip(tasks, zero, best)]
        for (which, row), tasks in rows.items()
        if which == setting
    }


def table(setting: str) -> str:
    """The paper's table 1 with ours beside it, bootstrap intervals over seeds, the score on the scale of both settings,
    mean returns task by task, and the command of each row. A row has a score when it has been run on every task, and
    an interval with its 21 runs."""
    lines = ["| | paper | score | 95% interval | score, both settings | runs | " + " | ".join(TASKS) + " | command |"]
    lines.append("| --- |" + " --- |" * (len(TASKS) + 6))
    here, both = scores(setting, (setting,)), scores(setting, BOTH)
    for row, (paper, _) in ROWS.items():
        tasks, score, interval, wide = returns(algorithm(row, setting)), "", "", ""
        if not any(map(len, tasks)):
            continue
        if row in here:
            score, wide = (f"{plot.mean_of_tasks(*scored[row]):.2f}" for scored in (here, both))
            if all(len(runs) == 3 for runs in tasks):
                interval = "{:.2f} to {:.2f}".format(*plot.interval(here[row], plot.mean_of_tasks))
        cells = [plot.TABLE_1[row], "" if paper is None else paper, score, interval, wide, sum(map(len, tasks))]
        for runs in tasks:
            seeds = "" if len(runs) == 3 else f", {len(runs)} seed{'s' * (len(runs) > 1)}"
            cells.append(f"{plot.short(runs.mean())}{seeds}" if len(runs) else "")
        cells.append(f"`python benchmark/table1.py --rows {row} --settings {setting} --results again --runs again`")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def example() -> str:
    """What the paper's setting is on the command line: that of its first row."""
    return "    python " + " ".join([*ROWS["none"][1], *PAPER_SETTING])


def one_env_table() -> str:
    """Last 100 episodes with 8 environments of 256 steps and with one of 2,048, seed by seed."""
    results = plot.summary()
    lines = ["| | task | seed | 8 environments | one environment |", "| --- | --- | --- | --- | --- |"]
    for row in ROWS:
        for task in TASKS:
            eight, one = (
                {of_seed["seed"]: of_seed for of_seed in results.get((algorithm(row, setting), f"{task}-v5"), [])}
                for setting in ("paper", "one_env")
            )
            for seed in sorted(eight.keys() & one.keys()):
                means = map(plot.short, plot.numbers([eight[seed], one[seed]]))
                lines.append("| " + " | ".join([plot.TABLE_1[row], task, seed, *means]) + " |")
    return "\n".join(lines)


def collapse_table() -> str:
    """Returns of the 2 episodes before the first update, of the worst 10 in a row, and of the last 100: mean over
    seeds, and in brackets the least and the greatest seed's."""
    results, whiles = plot.summary(), ("before any update", "worst 10 episodes in a row", "last 100")
    columns = [f"{actions}: {which}" for actions in ("actions within ±1", "as sampled") for which in whiles]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, (row, extra) in COLLAPSE.items():
        cells = [f"{plot.TABLE_1[row]}, advantages {'as they are' if extra else 'normalised'}"]
        for env_id in ("HalfCheetah-v5", UNCLIPPED):
            runs = results.get((name, env_id), [])
            for column in ("train_first_2", "worst_10", "train_last_100"):
                values = plot.numbers(runs, column)
                low, mean, high = (plot.short(f(values)) if runs else "" for f in (np.min, np.mean, np.max))
                cells.append(f"{mean} ({low} to {high})" if runs else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def changes_table() -> str:
    """Last 100 episodes, seed by seed, of clipping in the paper's setting with each of CHANGES alone, and of our
    defaults without it."""
    results = plot.summary()
    names = {"": "as it stands", **{f"_{key}": name for key, name in plot.CHANGES.items()}}
    whiches = {"with": "the paper's setting with it", "without": "our defaults without it"}
    tasks = [task for task in TASKS if any((f"{w}{k}", f"{task}-v5") in results for w in whiches for k in names)]
    columns = [(which, task) for task in tasks for which in whiches]
    lines = ["| | " + " | ".join(f"{task}: {whiches[which]}" for which, task in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for key, title in names.items():
        cells = [title]
        for which, task in columns:
            name = which + key if key else {"with": "paper_clip_0.2", "without": "ppo_clip_fixed"}[which]
            runs = [run for run in results.get((name, f"{task}-v5"), []) if int(run["seed"]) <= 3]
            cells.append(", ".join(map(plot.short, plot.numbers(runs))))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {
    (PAGE, "ours"): lambda: table("ours"),
    (PAGE, "example"): example,
    (PAGE, "paper"): lambda: table("paper"),
    (PAGE, "one_env"): one_env_table,
    (PAGE, "changes"): changes_table,
    (PAGE, "collapse"): collapse_table,
}


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.5))
    places = {row: -i for i, row in enumerate(ROWS)}
    paper = {row: score for row, (score, _) in ROWS.items() if score is not None}
    axis.scatter(paper.values(), [places[row] for row in paper], marker="x", color="#888888", label="paper")
    for setting, among, label, color, face, shift in (
        ("ours", BOTH, "our defaults", "#0072B2", "#0072B2", 0.2),
        ("paper", ("paper",), "the paper's setting, scored among its own rows", "#D55E00", "white", 0.0),
        ("paper", BOTH, "the paper's setting", "#D55E00", "#D55E00", -0.2),
    ):
        for row, tasks in scores(setting, among).items():
            place = places[row] + shift
            if all(len(runs) == 3 for runs in tasks):
                ends = plot.interval(tasks, plot.mean_of_tasks)
                axis.plot(ends, [place] * 2, color=color, linewidth=1.5)
            axis.plot(plot.mean_of_tasks(*tasks), place, "o", color=color, markerfacecolor=face, label=label)
            label = None  # once in the legend
    axis.set_yticks(list(places.values()), plot.TABLE_1.values())
    axis.set_xlabel(
        "score: 0 is a random policy, 1 the best row of each task in both settings\n"
        "bars: 95% intervals, where no seed is missing"
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(plot.RESULTS / "table1.png", dpi=110)


def main(args: Args) -> list[str]:
    """Runs what is missing and writes the page; returns the lines of the runs that failed."""
    failed = []
    tasks = {"env_ids": [f"{task}-v5" for task in args.tasks]}
    options = {"workers": args.workers, "results": args.results, "runs": args.runs}
    for setting in args.settings if args.run else ():
        rows = [row for row in args.rows if setting == "ours" or row in IN_PAPER_SETTING]
        for row in rows:
            run.ALGORITHMS.setdefault(algorithm(row, setting), [*ROWS[row][1], *SETTINGS[setting]])
        names = [algorithm(row, setting) for row in rows]
        failed += run.main(run.Args(algorithms=names, seeds=args.seeds, **tasks, **options))
    if args.run:  # the zero of the scale: about 100 episodes and more
        failed += run.main(run.Args(algorithms=["random"], seeds=[1], total_timesteps=100_000, **tasks, **options))
    if args.collapse:
        for name, (row, extra) in COLLAPSE.items():
            run.ALGORITHMS[name] = [*ROWS[row][1], *SETTINGS["one_env"], *extra]
        both = {"env_ids": ["HalfCheetah-v5", UNCLIPPED], "total_timesteps": 300_000}
        failed += run.main(run.Args(algorithms=list(COLLAPSE), seeds=args.seeds, **both, **options))
    if args.changes:
        for key, (on, off) in CHANGES.items():
            run.ALGORITHMS[f"with_{key}"] = [*ROWS["clip_0.2"][1], *PAPER_SETTING, *on]
            run.ALGORITHMS[f"without_{key}"] = [*ROWS["clip_0.2"][1], *off]
        names = [f"{which}_{key}" for which in ("with", "without") for key in CHANGES]
        failed += run.main(run.Args(algorithms=names, seeds=args.seeds, **tasks, **options))
    if args.results.resolve() == plot.RESULTS.resolve():
        draw()
        plot.write(TABLES)
    return failed


if __name__ == "__main__":
    raise SystemExit(1 if main(tyro.cli(Args, description=__doc__)) else 0)
