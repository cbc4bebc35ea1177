"""What a CUDA device is good for, in at most 8 minutes: correctness first, then speed. Prints a table in Markdown.

    python benchmark/gpu.py                                             # needs a CUDA device
    python benchmark/gpu.py --device cpu --num-envs 2 --iterations 2    # tries every path without one

Nothing is downloaded. On a machine without a network, install from a folder of wheels:

    pip install --no-index --find-links WHEELS -r requirements.txt

Speeds are from the end of the first iteration to the end of the last, so that start-up and compilation do not count;
utilisation is what nvidia-smi says in that time. LeanRL's PPO for Atari makes 6,809 steps/s on an H100, by its README.
"""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CONTINUOUS = ["ppo_clip_continuous", "trpo_continuous", "ppo_kl_continuous"]
LEANRL = 6809
CASE_SECONDS = 120.0  # at most


@dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cuda"  # what is compared with the CPU
    minutes: float = 8.0  # what has not begun by then is left out
    num_envs: tuple[int, ...] = (8, 128)  # games of the Atari script, side by side
    widths: tuple[int, ...] = (64, 1024)  # of the hidden layers of the continuous scripts
    iterations: int = 10  # that are timed


def same_first_update(name: str, device: str) -> float:
    """The largest difference between parameters after one update on the CPU and on the device, from the same rollout.
    There is one minibatch, as the two devices would shuffle differently."""
    torch.backends.cudnn.allow_tf32 = False  # which rounds the factors of a convolution to 10 bits
    script = importlib.import_module(name)
    atari = name == "ppo_atari"
    epochs = "critic_epochs" if name == "trpo_continuous" else "num_epochs"
    args = script.Args(num_steps=64, num_minibatches=1, **{epochs: 1}, **({"bfloat16": False} if atari else {}))
    torch.manual_seed(1)
    with ExitStack() as opened:
        envs = script.make_envs(args, opened)
        own = [args.bfloat16] if atari else [args]
        agent = script.Agent(envs.single_observation_space, envs.single_action_space, *own)
        rollout, *_ = script.collect(envs, agent, envs.reset(seed=1)[0], args.num_steps, 0)
    parameters = []
    for where in "cpu", device:
        copy = script.Agent(envs.single_observation_space, envs.single_action_space, *own)
        copy.load_state_dict(agent.state_dict())
        copy.to(where)
        there = script.Rollout(*(x.to(where) for x in rollout))
        trained = copy.critic.parameters() if name == "trpo_continuous" else copy.parameters()
        optimizer = torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=True)
        advantages, returns = script.estimate_advantages(copy, there, args)
        if name == "trpo_continuous":
            script.update(copy, there, advantages, args)
            script.fit_critic(copy, optimizer, there, returns, args)
        else:
            script.update(copy, optimizer, there, advantages, returns, args)
        parameters.append([p.detach().cpu() for p in copy.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*parameters))


def run(words: list[str], seconds: float, **environment: str) -> tuple[float, str]:
    """Run one of our scripts in a process of its own, at most so long: its steps per second, and the device's
    utilisation in percent. Raises RuntimeError with the last line that it printed where it fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = Path(words[words.index("--resume" if "--resume" in words else "--run-dir") + 1])
    command = [sys.executable, *words, "--eval-episodes", "1"]
    utilisation = []
    with tempfile.TemporaryFile("w+") as output:
        options = {"stdout": output, "stderr": output, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **options)
        deadline = time.time() + seconds
        while process.poll() is None and time.time() < deadline:
            if torch.cuda.is_available():
                query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
                utilisation.append((time.time(), float(subprocess.check_output(query, text=True).split()[0])))
            time.sleep(0.5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's own process, too
            process.wait()
            raise RuntimeError(f"was ended after {seconds:.0f} s")
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"ended with {process.returncode}: {(output.read().splitlines() or [''])[-1]}")
    events = EventAccumulator(str(run_dir))
    events.Reload()
    first, *_, last = events.Scalars("charts/SPS")
    used = [percent for at, percent in utilisation if first.wall_time <= at <= last.wall_time]
    speed = (last.step - first.step) / (last.wall_time - first.wall_time)
    return speed, f"{sum(used) / len(used):.0f}%" if used else ""


def works(words: list[str], seconds: float) -> None:
    """Run it, without a speed: a resumed run's spans both of its parts."""
    run(words, seconds)


def main(args: Args) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("device: cuda was given, but PyTorch finds no CUDA device; --device cpu tries every path without one")
    begun, threads, speeds = time.time(), str(len(os.sched_getaffinity(0))), {}
    where = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU alone, for a trial"
    print(f"PyTorch {torch.__version__} on {where}, {threads} CPU cores\n\n| case | result | steps/s | GPU used |")
    print("| --- | --- | --- | --- |", flush=True)

    def attempt(case, function, *arguments, **environment):
        """A row of the table. A case that fails says so there, and the others go on."""
        left = begun + 60.0 * args.minutes - time.time()
        try:
            if left <= 0.0:
                raise RuntimeError("left out: no time")
            limit = {} if function is same_first_update else {"seconds": min(left, CASE_SECONDS)}
            found = function(*arguments, **limit, **environment)
        except Exception as error:  # of a script, of the device, of the compiler
            return print(f"| {case} | {type(error).__name__}: {str(error)[:200]} | | |", flush=True)
        if function is run:
            speeds[case], used = found
            print(f"| {case} | | {speeds[case]:,.0f} | {used} |", flush=True)
        elif function is works:
            print(f"| {case} | good | | |", flush=True)
        else:
            print(f"| {case} | {found:.1e}: {'good' if found <= 1e-4 else 'TOO MUCH'} | | |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name in [*CONTINUOUS, "ppo_atari"]:
            attempt(f"{name}: first update, difference to the CPU's", same_first_update, name, args.device)

        for first, then in ("cpu", args.device), (args.device, "cpu"):
            run_dir = f"{folder}/from_{first}_{len(os.listdir(folder))}"
            words = ["ppo_clip_continuous.py", "--device", first, "--total-timesteps", "6144", "--run-dir", run_dir]
            attempt(f"ppo_clip_continuous: begins on {first}", works, words)
            words = ["ppo_clip_continuous.py", "--resume", run_dir, "--device", then, "--total-timesteps", "12288"]
            attempt(f"ppo_clip_continuous: resumed on {then}", works, words)

        def atari(num_envs, more):
            run_dir = f"{folder}/atari_{len(os.listdir(folder))}"
            steps = str(num_envs * 128 * (args.iterations + 1))
            words = ["ppo_atari.py", "--env-id", "ALE/Pong-v5", "--device", args.device, "--num-envs", str(num_envs)]
            return [*words, "--total-timesteps", steps, "--run-dir", run_dir, *more]

        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        attempt("ppo_atari: one process of torchrun", works, [*torchrun, *atari(args.num_envs[0], [])])
        for num_envs in args.num_envs:
            attempt(f"ppo_atari, {num_envs} games", run, atari(num_envs, []))
            attempt(f"ppo_atari, {num_envs} games, --compile", run, atari(num_envs, ["--compile"]))
            graphs = {"TORCHINDUCTOR_CUDAGRAPHS": "1"}
            attempt(f"ppo_atari, {num_envs} games, CUDA graphs", run, atari(num_envs, ["--compile"]), **graphs)

        for name in CONTINUOUS:
            for width in args.widths:
                for device in dict.fromkeys(("cpu", args.device)):
                    words = [f"{name}.py", "--num-steps", "256", "--hidden-size", str(width), "--device", device]
                    words += ["--total-timesteps", str(2048 * (args.iterations + 1)), "--run-dir"]
                    words += [f"{folder}/{name}_{len(os.listdir(folder))}"]
                    if width > 64 and device == "cpu":  # which threads make faster; --num-threads stays 1 otherwise
                        words += ["--num-threads", threads]
                    attempt(f"{name}, width {width}, {device}", run, words)

    print("\nWhat this would change:\n")
    best = max((speed for case, speed in speeds.items() if "games" in case), default=0.0)
    print(f"- The fastest Atari case makes {best:,.0f} steps/s, {best / LEANRL:.2f} times LeanRL's {LEANRL:,}.")
    for name in CONTINUOUS:
        for width in args.widths:
            cpu, gpu = (speeds.get(f"{name}, width {width}, {device}") for device in ("cpu", args.device))
            if cpu and gpu:
                better = "cuda" if gpu > cpu else "cpu"
                print(f"- {name} of width {width}: --device {better} (GPU over CPU: {gpu / cpu:.2f}).")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
