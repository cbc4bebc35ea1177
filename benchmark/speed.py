"""Steps per second of our scripts and of the peers on the same work, alternating in one run, one thread each.

    python benchmark/speed.py --peer-python PATH/TO/A/PYTHON/WITH/SB3

HalfCheetah-v5, 2,048 steps an iteration, 10 epochs, equal minibatches, equal networks; ours with 8 environments, the
peers with the 1 that is their default and with 8. The speed is taken from the end of the first iteration to the end
of the last, so that start-up and compilation do not count; peak memory is the process's own. Ratios are formed
within each repetition, as machines drift.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMON = ["--num-envs", "8", "--num-steps", "256", "--eval-episodes", "1", "--gae-lambda", "0.95"]
TRPO = ["trpo_continuous.py", *COMMON, "--critic-epochs", "10", "--num-minibatches", "16", "--cg-iterations", "15"]
PPO = [*COMMON, "--num-epochs", "10", "--num-minibatches", "32", "--no-recompute-advantages"]
CASES = {
    "trpo": TRPO,
    "trpo --compile": [*TRPO, "--compile"],
    "sb3-contrib TRPO, 1 environment": ("TRPO", 1),
    "sb3-contrib TRPO, 8 environments": ("TRPO", 8),
    "ppo_clip": ["ppo_clip_continuous.py", *PPO],
    "ppo_clip --compile": ["ppo_clip_continuous.py", *PPO, "--compile"],
    "ppo_kl": ["ppo_kl_continuous.py", *PPO],
    "ppo_kl --compile": ["ppo_kl_continuous.py", *PPO, "--compile"],
    "SB3 PPO, 1 environment": ("PPO", 1),
    "SB3 PPO, 8 environments": ("PPO", 8),
}
PEERS = [case for case, work in CASES.items() if isinstance(work, tuple)]


@dataclass
class Args:
    cases: tuple[str, ...] = tuple(CASES)
    """Which of CASES to time."""
    repeats: int = 3
    """Times that every case runs, in turn with the others."""
    total_timesteps: int = 61_440
    """Environment steps of each run."""
    peer_python: str = sys.executable
    """A Python that has stable-baselines3 and sb3-contrib, where this one has not."""


def run_peer(name: str, num_envs: int, total_timesteps: int) -> None:
    """In the peer's own process: train, then print {steps per second, peak memory} as JSON."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class Clock(BaseCallback):
        def __init__(self):
            super().__init__()
            self.times = []

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            self.times.append((self.num_timesteps, time.time()))

    torch.set_num_threads(1)
    env = VecNormalize(make_vec_env("HalfCheetah-v5", n_envs=num_envs, seed=1))
    if name == "TRPO":
        from sb3_contrib import TRPO as Algorithm

        own = {"batch_size": 128, "n_critic_updates": 10, "cg_max_steps": 15}
    else:
        from stable_baselines3 import PPO as Algorithm

        own = {"batch_size": 64, "n_epochs": 10}
    model, clock = Algorithm("MlpPolicy", env, n_steps=2048 // num_envs, device="cpu", **own), Clock()
    model.learn(total_timesteps, callback=clock)
    clock.times.append((model.num_timesteps, time.time()))
    (first, start), (last, end) = clock.times[1], clock.times[-1]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"speed": (last - first) / (end - start), "memory": memory}))


def run_ours(arguments: list[str], total_timesteps: int, environment: dict[str, str]) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, *own = arguments
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / script), *own, "--total-timesteps", str(total_timesteps)]
        process = subprocess.Popen(
            [*command, "--run-dir", folder], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} ended with status {status}")
        events = EventAccumulator(folder)
        events.Reload()
        scalars = events.Scalars("charts/SPS")
    seconds = scalars[-1].wall_time - scalars[0].wall_time
    return {"speed": (scalars[-1].step - scalars[0].step) / seconds, "memory": usage.ru_maxrss / 1024}


def main(args: Args) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    results: dict[str, list[dict[str, float]]] = {case: [] for case in args.cases}
    for _ in range(args.repeats):
        for case in args.cases:
            if isinstance(CASES[case], list):
                result = run_ours(CASES[case], args.total_timesteps, environment)
            else:
                command = [args.peer_python, __file__, "--run-peer", *map(str, CASES[case]), str(args.total_timesteps)]
                output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                result = json.loads(output.splitlines()[-1])
            results[case].append(result)
            print(f"{case}: {result['speed']:.0f} steps/s, {result['memory']:.0f} MiB", flush=True)
    peers = [peer for peer in PEERS if peer in results]
    print("\n| case | steps/s | peak MiB | " + " | ".join(f"times {peer}" for peer in peers) + " |")
    print("| --- | --- | --- |" + " --- |" * len(peers))
    for case, runs in results.items():
        ratios = []
        for peer in peers:
            same = ("trpo" in case) == ("TRPO" in peer) and case not in PEERS
            values = [ours["speed"] / its["speed"] for ours, its in zip(runs, results[peer])] if same else []
            ratios.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "")
        speed, memory = statistics.median(run["speed"] for run in runs), max(run["memory"] for run in runs)
        print(f"| {case} | {speed:,.0f} | {memory:.0f} | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run-peer"]:
        run_peer(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__))
