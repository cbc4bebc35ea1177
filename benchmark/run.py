"""Runs algorithms x environments x seeds, as many at a time as there are cores, one thread each.

    python benchmark/run.py --algorithms ppo_clip trpo --env-ids HalfCheetah-v5 Hopper-v5 --seeds 1 2 3 4 5

What results/summary.csv already has is skipped, and a run that was stopped in the middle is resumed, so a killed
campaign continues with the same command; what another campaign is running is left to it. Each run leaves
`results/<algorithm>/<env>__<seed>.csv`, its learning curve in at most 200 rows (`thin`), and a row of
`results/summary.csv` with its figures and what is needed to repeat it. Needs Linux or macOS.
"""

import csv
import fcntl
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
ALGORITHMS = {  # the script and the arguments that make it this algorithm
    "ppo_clip": ["ppo_clip_continuous.py"],
    "ppo_kl": ["ppo_kl_continuous.py"],
    "trpo": ["trpo_continuous.py"],
    "npg": ["trpo_continuous.py", "--no-line-search"],
    "ppo_clip_fixed": ["ppo_clip_continuous.py", "--no-adapt-lr"],
    "ppo_kl_fixed": ["ppo_kl_continuous.py", "--no-adapt-lr"],
    "ppo_none": ["ppo_kl_continuous.py", "--no-adapt-lr", "--kl-coef", "0", "--no-adapt-kl-coef"],
    "trpo_no_floor": ["trpo_continuous.py", "--min-log-std", "-10"],
    "npg_no_floor": ["trpo_continuous.py", "--no-line-search", "--min-log-std", "-10"],
    # For Swimmer alone, where sb3-contrib's TRPO has 359 with this gamma.
    "ppo_clip_gamma": ["ppo_clip_continuous.py", "--no-adapt-lr", "--gamma", "0.9999"],
    "ppo_kl_gamma": ["ppo_kl_continuous.py", "--no-adapt-lr", "--gamma", "0.9999"],
    "trpo_gamma": ["trpo_continuous.py", "--gamma", "0.9999"],
    "sb3_ppo": ["benchmark/peers.py", "--algorithm", "ppo"],
    "sb3_trpo": ["benchmark/peers.py", "--algorithm", "trpo"],
    "sb3_trpo_nats": ["benchmark/peers.py", "--algorithm", "trpo", "--kl-in-nats"],
    "random": ["benchmark/peers.py", "--algorithm", "random"],
}
ENV_IDS = (
    "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v4", "Ant-v5", "Swimmer-v5", "Reacher-v5", "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
)  # fmt: skip


@dataclass
class Args:
    algorithms: list[str] = field(default_factory=lambda: ["ppo_clip", "ppo_kl", "trpo", "npg"])
    """Which of ALGORITHMS."""
    env_ids: list[str] = field(default_factory=lambda: list(ENV_IDS))
    """Gymnasium ids."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Seeds to report; settings are developed on 101 and up."""
    total_timesteps: int = 1_000_000
    """Environment steps of each run."""
    compile: bool = True
    """Run the scripts with --compile."""
    workers: int = os.cpu_count() or 1
    """Runs at a time."""
    results: Path = ROOT / "benchmark" / "results"
    """Where the CSVs go."""
    runs: Path = ROOT / "runs" / "benchmark"
    """Where the run directories go; they may be deleted once the CSVs are there."""


def file_name(env_id: str, seed: int | str) -> str:
    """What a run's files are called, without the suffix; an environment's id may hold what a file's name may not."""
    return f"{env_id.replace('/', '-').replace(':', '-')}__{seed}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def revision(script: str) -> str:
    """The commit that last changed script, with a + where the file differs from it; unknown outside a repository."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        commit = git(["git", "log", "-1", "--format=%h", "--", script]).stdout.strip()
        changed = git(["git", "diff", "--quiet", "HEAD", "--", script]).returncode
    except OSError:  # no git here
        return "unknown"
    return f"{commit}{'+' * bool(changed)}" if commit else "unknown"


def episodes_of(run_dir: Path) -> list[tuple[int, float]]:
    """(step, return) of every finished episode, from the run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        raise ValueError(f"{run_dir} has no finished episode; more steps may bring one")
    return [(e.step, e.value) for e in events.Scalars("charts/episodic_return")]


def figures(episodes: list[tuple[int, float]]) -> dict[str, float | str]:
    """What the tables need of every single episode, for summary.csv; empty where there is no such figure."""
    steps, returns = np.array(episodes, dtype=float).T
    tens, twenties = (np.convolve(returns, np.ones(n) / n, "valid") if len(returns) >= n else [] for n in (10, 20))
    reached = [step for step, mean in zip(steps[19:], twenties) if mean >= 3000.0]
    return {
        "train_last_100": round(float(returns[-100:].mean()), 2),
        "train_first_2": round(float(returns[:2].mean()), 2),
        "worst_10": round(float(min(tens)), 2) if len(tens) else "",  # the worst 10 episodes in a row
        "steps_to_3000": int(reached[0]) if reached else "",  # where 20 episodes in a row first had that mean
    }


def thin(episodes: list[tuple[int, float]], total_timesteps: int) -> list[tuple[int, float, int]]:
    """A learning curve in at most 200 rows, one for each 200th of a run's steps in which an episode ended: (step of
    the last of them, their mean return, how many they are). Weighted by their numbers, the rows of any stretch of
    whole 200ths give the mean of all its episodes."""
    total, parts = max(total_timesteps, episodes[-1][0]), {}
    for step, value in episodes:
        parts.setdefault(-(-step * 200 // total), []).append((step, value))
    return [(part[-1][0], round(sum(v for _, v in part) / len(part), 2), len(part)) for part in parts.values()]


def write_curve(path: Path, rows: list[tuple[int, float, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["step", "return", "episodes"])
        writer.writerows(rows)


def stored_command(summary: TextIO, algorithm: str, env_id: str, seed: int) -> str | None:
    """The command of the row that the summary has of this run, if it has one."""
    summary.seek(0)
    rows = {(row["algorithm"], row["env_id"], row["seed"]): row for row in csv.DictReader(summary)}
    return rows.get((algorithm, env_id, str(seed)), {}).get("command")


def how_to_go_on(script: str, arguments: list[str], run_dir: Path) -> str:
    """The flag with which script takes run_dir up: a new run, or the one that was stopped there, or was done but for
    its evaluation. Raises ValueError where that run had other arguments, by now perhaps other defaults."""
    if not (run_dir / "checkpoint.pt").exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # of a peer, which cannot be resumed
        return "--run-dir"
    module = importlib.import_module(script.removesuffix(".py"))
    asked, checkpoint = vars(module.parse_args(arguments)), module.load_checkpoint(run_dir)
    saved = checkpoint["args"]
    free = ("run_dir", "resume", "num_threads", "device")
    if names := [n for n in asked if asked[n] != saved.get(n) and n not in free]:
        raise ValueError(f"{run_dir} holds a run with other arguments ({', '.join(names)}); delete it to start anew")
    done = checkpoint["global_step"] + saved["num_envs"] * saved["num_steps"] > saved["total_timesteps"]
    return "--evaluate" if done else "--resume"


def run(args: Args, algorithm: str, env_id: str, seed: int) -> str:
    """One run from start, or from its checkpoint, to its CSV and its row; returns a line for the screen."""
    name = file_name(env_id, seed)
    (args.runs / algorithm).mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    try:
        with (args.runs / algorithm / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return f"{algorithm} {name}: {run_alone(args, algorithm, env_id, seed, name, lock)}"
    except BlockingIOError:
        return f"{algorithm} {name}: another campaign is at it"
    except ValueError as error:
        return f"{algorithm} {name}: FAILED: {error}"


def run_alone(args: Args, algorithm: str, env_id: str, seed: int, name: str, lock: TextIO) -> str:
    """What `run` does, once nobody else does it."""
    curve, run_dir = args.results / algorithm / f"{name}.csv", args.runs / algorithm / name
    script, *own = ALGORITHMS[algorithm]
    arguments = ["--env-id", env_id, "--seed", str(seed), "--total-timesteps", str(args.total_timesteps)]
    ours = not script.startswith("benchmark")
    arguments += ["--compile"] if args.compile and ours else []
    repeat = ["python", script, *own, *arguments, "--eval-episodes", "20"]
    with (args.results / "summary.csv").open("a+", newline="") as summary:
        stored = stored_command(summary, algorithm, env_id, seed)
        summary.seek(0)
        if (header := summary.readline()) and "steps_to_3000" not in header:
            raise ValueError(f"{summary.name} has the columns of an older run.py; python benchmark/thin.py mends it")
    if stored is not None:
        if stored.replace(" --compile", "") != " ".join(repeat).replace(" --compile", ""):
            raise ValueError(f"{summary.name} has it of another command, {stored}; give another --results")
        return "already there"
    where = [how_to_go_on(script, repeat[2:], run_dir), str(run_dir)]
    ran = revision(script)  # now: a commit during the run changes nothing in it
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, str(ROOT / script), *repeat[2:], *where],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        pass_fds=[lock.fileno()],  # should this campaign be killed, the run goes on, and so does its lock
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        message = (process.stderr.splitlines() or ["killed"])[-1]
        raise ValueError(f"status {process.returncode}: {message}")
    evaluation = re.search(r"evaluation: (\S+) ± (\S+) over", process.stdout)
    episodes = episodes_of(run_dir)
    of_episodes = figures(episodes)
    packages = ["torch", "gymnasium", "mujoco", "numpy", *([] if ours else ["stable-baselines3", "sb3-contrib"])]
    row = {
        "algorithm": algorithm,
        "env_id": env_id,
        "seed": seed,
        "total_timesteps": args.total_timesteps,
        "train_last_100": of_episodes.pop("train_last_100"),
        "evaluation_mean": evaluation[1],
        "evaluation_std": evaluation[2],
        "steps_per_second": round(args.total_timesteps / seconds) if where[0] == "--run-dir" else "",
        "command": " ".join(repeat),
        "versions": " ".join([f"{p} {version(p)}" for p in packages] + [f"script {ran}"]),
        "python": platform.python_version(),
        "processor": processor(),
        **of_episodes,
    }
    with (args.results / "summary.csv").open("a+", newline="") as summary:  # last, as its row says that the run is done
        fcntl.flock(summary, fcntl.LOCK_EX)
        if stored_command(summary, algorithm, env_id, seed):
            return "another campaign has done it meanwhile, with other --runs"
        write_curve(curve, thin(episodes, args.total_timesteps))
        writer = csv.DictWriter(summary, row.keys(), lineterminator="\n")
        if summary.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
    return f"{row['train_last_100']} in {seconds:.0f} s"


def main(args: Args) -> list[str]:
    """Runs what is missing; returns the lines of the runs that failed."""
    if unknown := [name for name in args.algorithms if name not in ALGORITHMS]:
        raise SystemExit(f"algorithms: {', '.join(unknown)} was given; there are {', '.join(ALGORITHMS)}")
    jobs = [(a, e, s) for s in args.seeds for a in args.algorithms for e in args.env_ids]
    lines = []
    with tqdm(total=len(jobs), unit=" runs") as bar, ThreadPoolExecutor(args.workers) as pool:
        try:
            for done in as_completed([pool.submit(run, args, *job) for job in jobs]):
                lines.append(done.result())
                bar.write(lines[-1])
                bar.update()
        except KeyboardInterrupt:  # the runs have it too, and save; what has not begun shall not begin
            pool.shutdown(cancel_futures=True)
            raise
    return [line for line in lines if "FAILED" in line]


if __name__ == "__main__":
    raise SystemExit(1 if main(tyro.cli(Args, description=__doc__)) else 0)
