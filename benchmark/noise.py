"""What the noise of its actions costs a policy: plays saved runs with action = mean + k σ z, for k from 0 to 1.5.

    python benchmark/noise.py RUN_DIR [RUN_DIR ...]

Runs of the three continuous scripts; 20 episodes each, from the same starts.
"""

import importlib
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import tyro

sys.path.append(str(Path(__file__).parent.parent))


@torch.no_grad()
def play(run_dir: Path, opened: ExitStack, episodes: int = 20) -> None:
    """Print mean return, mean length and reward a step at each k, and σ."""
    script = importlib.import_module(torch.load(run_dir / "checkpoint.pt", weights_only=True)["script"])
    checkpoint = script.load_checkpoint(run_dir)
    args = script.Args(**checkpoint["args"])
    env = script.make_env(args.env_id, opened)
    agent = script.Agent(env.observation_space, env.action_space, args)
    script.load_checkpoint(run_dir, agent=agent)
    print(run_dir, "σ:", *(f"{std:.2f}" for std in agent.actor_log_std.exp()))
    torch.manual_seed(0)
    for k in (0.0, 0.5, 1.0, 1.5):
        returns, steps = 0.0, 0
        for episode in range(episodes):
            obs, _ = env.reset(seed=20_000 + episode)
            done = False
            while not done:
                policy = agent.distribution(torch.as_tensor(obs, dtype=torch.float32)[None])
                action = (policy.mean + k * policy.stddev * torch.randn(policy.mean.shape))[0].numpy()
                obs, reward, terminated, truncated, _ = env.step(
                    action.reshape(env.action_space.shape).clip(env.action_space.low, env.action_space.high)
                )
                returns, steps, done = returns + reward, steps + 1, terminated or truncated
        print(f"k = {k}: {returns / episodes:.0f}; {steps / episodes:.0f}; {returns / steps:.2f} a step", flush=True)


def main(run_dirs: tyro.conf.Positional[list[Path]]) -> None:
    torch.set_num_threads(1)
    for run_dir in run_dirs:
        with ExitStack() as opened:
            play(run_dir, opened)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
