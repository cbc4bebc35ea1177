"""Steps per second of our scripts and of the peers on the same work, alternating in one run.

    python benchmark/speed.py peers --peer-python PATH/TO/A/PYTHON/WITH/SB3    # HalfCheetah-v5, one thread each
    python benchmark/speed.py atari --peer-python PATH/TO/A/PYTHON/WITH/SB3    # Pong, all cores
    python benchmark/speed.py scaling                                          # environments, width, batch, cores
    python benchmark/speed.py time                                             # where the time goes
    python benchmark/speed.py torchrun                                         # one process and two

A speed is taken from the end of the first iteration to the end of the last, so that start-up and compilation do not
count; start-up is from the start of the process to the end of the first iteration; peak memory is the process's own.
Ratios are formed within each repetition, as machines drift. What was measured goes to results/speed_<section>.csv,
from which `plot.py` makes the tables of benchmark/README.md.
"""

import csv
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
COMMON = ["--num-envs", "8", "--num-steps", "256", "--gae-lambda", "0.95", "--eval-episodes", "1"]
TRPO = ["trpo_continuous.py", *COMMON, "--critic-epochs", "10", "--num-minibatches", "16", "--cg-iterations", "15"]
CLIP, KL = (
    [script, *COMMON, "--num-epochs", "10", "--num-minibatches", "32", "--no-recompute-advantages"]
    for script in ("ppo_clip_continuous.py", "ppo_kl_continuous.py")
)
ATARI = ["ppo_atari.py", "--env-id", "ALE/Pong-v5", "--eval-episodes", "1"]
HUMANOID = ["ppo_clip_continuous.py", "--env-id", "Humanoid-v5", "--eval-episodes", "1"]
ONE_CORE = ["taskset", "-c", "0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
# What each section times: one of our command lines, (algorithm, environments) for a peer, or ("limit", algorithm) for
# what no program can leave out.
SECTIONS = {
    "peers": {
        "trpo": TRPO,
        "trpo --compile": [*TRPO, "--compile"],
        "sb3-contrib TRPO, 1 environment": ("TRPO", 1),
        "sb3-contrib TRPO, 8 environments": ("TRPO", 8),
        "the limit of TRPO": ("limit", "trpo"),
        "ppo_clip": CLIP,
        "ppo_clip --compile": [*CLIP, "--compile"],
        "ppo_kl": KL,
        "ppo_kl --compile": [*KL, "--compile"],
        "SB3 PPO, 1 environment": ("PPO", 1),
        "SB3 PPO, 8 environments": ("PPO", 8),
        "SBX PPO, 1 environment": ("SBX", 1),
        "SBX PPO, 8 environments": ("SBX", 8),
        "the limit of PPO": ("limit", "ppo"),
    },
    "atari": {
        "ppo_atari": ATARI,
        "ppo_atari --compile": [*ATARI, "--compile"],
        "ppo_atari --no-bfloat16": [*ATARI, "--no-bfloat16"],
        "SB3 PPO CnnPolicy": ("atari", 8),
    },
    "scaling": {
        **{f"ppo_clip, {n} environments": [*CLIP, "--num-envs", f"{n}", "--num-steps", f"{2048 // n}"]
           for n in (1, 2, 4, 8, 16, 32, 64)},
        **{f"ppo_clip, width {n}": [*CLIP, "--hidden-size", f"{n}"] for n in (64, 128, 256, 512, 1024)},
        **{f"ppo_clip, batch {8 * n}": [*CLIP, "--num-steps", f"{n}"] for n in (64, 128, 256, 512, 1024)},
        "trpo, width 64": TRPO,
        "trpo, width 256": [*TRPO, "--hidden-size", "256"],
        "Humanoid": [*ONE_CORE, *HUMANOID],
        "Humanoid --compile": [*ONE_CORE, *HUMANOID, "--compile"],
    },
    "time": {case: case for case in ("trpo", "trpo --compile", "ppo_clip", "ppo_clip --compile", "ppo_kl --compile")},
    "torchrun": {
        f"{env}, {' '.join([name, *options])}, {processes}":
            [*launcher, f"{name}_continuous.py", "--env-id", f"{env}-v5", "--eval-episodes", "1", *options]
        for env in ("HalfCheetah", "Humanoid") for name in ("trpo", "ppo_clip") for options in ([], ["--compile"])
        for processes, launcher in (("1 process", []), ("2 processes", TORCHRUN))
    },
}  # fmt: skip
STEPS = {"peers": 61_440, "atari": 20_480, "scaling": 40_960, "time": 61_440, "torchrun": 40_960}


@dataclass
class Args:
    section: Literal["peers", "atari", "scaling", "time", "torchrun"]
    """What to measure."""
    cases: tuple[str, ...] = ()
    """Only the cases whose name contains one of these."""
    repeats: int = 3
    """Times that every case runs, in turn with the others."""
    peer_python: str = sys.executable
    """A Python that has stable-baselines3, sb3-contrib and sbx-rl, where this one has not."""
    results: Path = RESULTS
    """Where the CSV goes; plot.py reads that of the repository alone. Another folder is for a trial."""


# What follows runs in a process of its own for every case.


def run_peer(name: str, num_envs: int, total_timesteps: int) -> dict[str, float]:
    """Train a peer's algorithm in this process; its speed, memory and the time of day when its first update ended."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    class Clock(BaseCallback):
        times = []

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            self.times.append((self.num_timesteps, time.time()))

    if name == "atari":
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as our script
        env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=num_envs, seed=1), 4)
        own = {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "clip_range": 0.1, "ent_coef": 0.01}
        model = PPO("CnnPolicy", env, device="auto", learning_rate=2.5e-4, **own)
    else:
        torch.set_num_threads(1)
        env = VecNormalize(make_vec_env("HalfCheetah-v5", n_envs=num_envs, seed=1))
        if name == "TRPO":
            from sb3_contrib import TRPO as Algorithm

            own = {"batch_size": 128, "n_critic_updates": 10, "cg_max_steps": 15}
        else:
            Algorithm, own = PPO, {"batch_size": 64, "n_epochs": 10}
            if name == "SBX":
                os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # JAX cannot be told to use one thread
                from sbx import PPO as Algorithm
        model = Algorithm("MlpPolicy", env, n_steps=2048 // num_envs, device="cpu", **own)
    clock = Clock()
    model.learn(total_timesteps, callback=clock)
    clock.times.append((model.num_timesteps, time.time()))
    (first, start), (last, end) = clock.times[1], clock.times[-1]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"steps_per_second": (last - first) / (end - start), "peak_mib": memory, "first_update": start}


def run_timed(case: str, total_timesteps: int) -> dict[str, float]:
    """Train our script in this process with a clock on its parts; microseconds a step for each, and the lower bound."""
    import torch
    from gymnasium.vector import SyncVectorEnv
    from torch.distributions import Independent

    name = case.split()[0]
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(f"{name}_continuous")
    spent, running = defaultdict(float), []

    def timed(part, function):
        def wrapped(*args, **options):
            if running:  # a part of a part counts as the outer one
                return function(*args, **options)
            running.append(part)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[part] += time.perf_counter() - start
                running.pop()

        return wrapped

    SyncVectorEnv.step = timed("environment", SyncVectorEnv.step)
    script.Agent.distribution = timed("network", script.Agent.distribution)
    script.Agent.value = timed("network", script.Agent.value)
    Independent.sample = timed("network", Independent.sample)
    Independent.log_prob = timed("network", Independent.log_prob)
    torch.optim.Adam.step = timed("optimizer", torch.optim.Adam.step)
    script.compute_gae = timed("advantages", script.compute_gae)
    script.RunningMeanStd.update = timed("statistics", script.RunningMeanStd.update)
    script.RewardScaler.forward = timed("statistics", script.RewardScaler.forward)
    if name == "trpo":
        script.update = timed("network", script.update)
    compiled = script.compiled
    script.compiled = lambda function: timed("network", compiled(function))
    if "--compile" not in case:
        script.compute_gradient = timed("network", script.compute_gradient)
    log, marks = script.Run.log, []

    def first_and_last(run, *args):
        log(run, *args)
        if not marks:
            spent.clear()
        marks.append((run.global_step, time.perf_counter(), dict(spent)))  # what follows the last one is evaluation

    script.Run.log = timed("log", first_and_last)
    with tempfile.TemporaryDirectory() as folder:
        script.main([*dict(trpo=TRPO, ppo_clip=CLIP, ppo_kl=KL)[name][1:], "--total-timesteps", str(total_timesteps),
                     "--run-dir", folder, *case.split()[1:]])  # fmt: skip
    (first, start, _), (last, end, parts) = marks[0], marks[-1]
    result = {part: 1e6 * seconds / (last - first) for part, seconds in parts.items()}
    total = 1e6 * (end - start) / (last - first)
    result = {"total": total, **result, "rest": total - sum(result.values())}
    return {**result, **lower_bound(name, script)}


def lower_bound(name: str, script) -> dict[str, float]:
    """Microseconds a step of what no program can leave out: 8 environments, bare, in turn (MuJoCo with the task's own
    Python around it), and the matrix products and activations of the rollout and of the minibatch gradients alone, in
    memory that is already there."""
    import torch

    def clock(function, repeats):
        for _ in range(repeats // 10):
            function()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return 1e6 * (time.perf_counter() - start) / repeats

    envs = [script.make_env("HalfCheetah-v5", ExitStack()).unwrapped for _ in range(8)]
    for env in envs:
        env.reset(seed=1)
    action = env.action_space.sample()

    def products(batch, last, backward):
        """A function that does the work of one network of 17, 64, 64, last units."""
        sizes = [17, 64, 64, last]
        x = [torch.randn(batch, n) for n in sizes]
        weights = [torch.randn(m, n) for m, n in zip(sizes, sizes[1:])]
        grads = [torch.empty_like(w) for w in weights]

        def work():
            for i, w in enumerate(weights):
                torch.mm(x[i], w, out=x[i + 1])
                if i < 2:
                    torch.tanh(x[i + 1], out=x[i + 1])
            for i in reversed(range(3)) if backward else ():
                torch.mm(x[i].t(), x[i + 1], out=grads[i])
                if i:
                    torch.mm(x[i + 1], weights[i].t(), out=x[i])

        return work

    rollout = clock(products(8, 6, False), 2000) / 8
    if name == "trpo":  # the critic: 10 epochs of 16 minibatches of 128; the policy: 17 products with H, each 2 passes
        gradients = clock(products(128, 1, True), 1000) * 160 / 2048 + clock(products(2048, 6, True), 50) * 18 / 2048
    else:  # 10 epochs of 32 minibatches of 64
        gradients = (clock(products(64, 1, True), 1000) + clock(products(64, 6, True), 1000)) * 320 / 2048
    environment = clock(lambda: [env.step(action) for env in envs], 2000) / 8
    return {"bound: environment": environment, "bound: network": rollout + gradients}


def run_limit(name: str) -> dict[str, float]:
    """The speed that a program would have that did nothing but `lower_bound`, measured in this process."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    bounds = lower_bound(name, importlib.import_module("trpo_continuous"))
    return {"steps_per_second": 1e6 / sum(bounds.values())}


# What follows runs the cases in turn.


def run_ours(command: list[str], total_timesteps: int, environment: dict[str, str]) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script = next(i for i, word in enumerate(command) if word.endswith(".py"))
    with tempfile.TemporaryDirectory() as folder:
        command = [*command[:script], sys.executable, str(ROOT / command[script]), *command[script + 1 :]]
        command += ["--total-timesteps", str(total_timesteps), "--run-dir", folder]
        started = time.time()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} ended with status {status}")
        events = EventAccumulator(folder)
        events.Reload()
        first, *_, last = events.Scalars("charts/SPS")
    speed = (last.step - first.step) / (last.wall_time - first.wall_time)
    return {"steps_per_second": speed, "peak_mib": usage.ru_maxrss / 1024, "startup_s": first.wall_time - started}


def main(args: Args) -> None:
    environment = dict(os.environ)
    if args.section != "atari":
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    cases = SECTIONS[args.section]
    cases = {case: cases[case] for case in cases if not args.cases or any(part in case for part in args.cases)}
    path = args.results / f"speed_{args.section}.csv"
    args.results.mkdir(parents=True, exist_ok=True)
    rows = []
    for repeat in range(args.repeats):
        for case, work in cases.items():
            if isinstance(work, list):
                result = run_ours(work, STEPS[args.section], environment)
            else:
                python = sys.executable if args.section == "time" or work[0] == "limit" else args.peer_python
                words = [case] if args.section == "time" else [work[0], str(work[1])]
                command = [python, __file__, "--one-case", *words, str(STEPS[args.section])]
                started = time.time()
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
                result = json.loads(done.stdout.splitlines()[-1])
                if "first_update" in result:
                    result["startup_s"] = result.pop("first_update") - started
            rows += [(case, repeat, name, round(value, 3)) for name, value in result.items()]
            print(f"{case}: " + ", ".join(f"{name} {value:,.1f}" for name, value in result.items()), flush=True)
    old = []
    if path.exists():  # cases that were not asked for this time stay
        with path.open() as file:
            old = [row for row in csv.DictReader(file) if row["case"] not in cases]
    if args.section in ("peers", "atari"):  # but a ratio is of two cases of one run: all of TRPO, or all of PPO
        timed = {"trpo" in case.lower() for case in cases}
        old = [row for row in old if ("trpo" in row["case"].lower()) not in timed]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "repeat", "quantity", "value"])
        writer.writerows([*(row.values() for row in old), *rows])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-case"]:
        *words, steps = sys.argv[2:]
        if len(words) == 1:
            print(json.dumps(run_timed(words[0], int(steps))))
        elif words[0] == "limit":
            print(json.dumps(run_limit(words[1])))
        else:
            print(json.dumps(run_peer(words[0], int(words[1]), int(steps))))
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,)))
