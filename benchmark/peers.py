"""The peers on our tasks: PPO of stable-baselines3, TRPO of sb3-contrib, a random policy, logged as our scripts are.

    python benchmark/peers.py --algorithm trpo --env-id Hopper-v5 --seed 1

Each peer has its library's default arguments and VecNormalize (observations and rewards, as its documentation advises
for MuJoCo): one setting for all tasks, like ours. The figures that the libraries publish are tuned task by task.
`run.py --algorithms sb3_ppo sb3_trpo` runs a campaign of it.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    algorithm: Literal["ppo", "trpo", "random"] = "ppo"
    """stable-baselines3's PPO, sb3-contrib's TRPO, or actions drawn uniformly from their box."""
    env_id: str = "HalfCheetah-v5"
    """Any Gymnasium id with continuous actions."""
    seed: int = 1
    """Seed of everything."""
    total_timesteps: int = 1_000_000
    """Environment steps of the whole run."""
    kl_in_nats: bool = False
    """TRPO: δ and damping over the number of action dimensions, which sb3-contrib divides the KL by: then its trust
    region is that of the paper, and ours, with the same numbers (peers_faults.py)."""
    eval_episodes: int = 20
    """Episodes of the deterministic evaluation at the end, with the training's statistics frozen."""
    run_dir: Path | None = None
    """Where the TensorBoard events go; by default runs/<env>__<algorithm>__<seed>__<time>."""


def play_at_random(args: Args, writer: SummaryWriter) -> np.ndarray:
    """The returns of the episodes that a random policy finishes within total_timesteps; also written to the log."""
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))
    env.action_space.seed(args.seed)
    returns, done = [], True
    for step in range(args.total_timesteps):
        if done:
            env.reset(seed=args.seed if step == 0 else None)
        *_, terminated, truncated, info = env.step(env.action_space.sample())
        done = terminated or truncated
        if done:
            returns.append(float(info["episode"]["r"]))
            writer.add_scalar("charts/episodic_return", returns[-1], step + 1)
    return np.array(returns)


def learn(args: Args, writer: SummaryWriter) -> np.ndarray:
    """Train, log the raw return of every episode, evaluate with frozen statistics; the evaluation's returns."""
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    class Log(BaseCallback):
        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:  # of the Monitor, which sits below VecNormalize: raw
                    writer.add_scalar("charts/episodic_return", info["episode"]["r"], self.num_timesteps)
            return True

        def _on_rollout_end(self) -> None:
            log_std = self.model.policy.log_std.mean().item()  # how much noise its training episodes have
            writer.add_scalar("charts/log_std", log_std, self.num_timesteps)

    torch.set_num_threads(1)
    env = VecNormalize(make_vec_env(args.env_id, seed=args.seed))
    options = {"seed": args.seed, "device": "cpu"}
    if args.kl_in_nats:
        actions = env.action_space.shape[0]
        options |= {"target_kl": 0.01 / actions, "cg_damping": 0.1 / actions}
    model = {"ppo": PPO, "trpo": TRPO}[args.algorithm]("MlpPolicy", env, **options)
    model.learn(args.total_timesteps, callback=Log())
    frozen = VecNormalize(make_vec_env(args.env_id, seed=args.seed + 10_000), training=False, norm_reward=False)
    frozen.obs_rms = env.obs_rms
    returns, _ = evaluate_policy(model, frozen, args.eval_episodes, deterministic=True, return_episode_rewards=True)
    return np.array(returns)


def main(args: Args) -> None:
    name = f"{args.env_id}__{args.algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = args.run_dir or Path("runs") / name
    writer = SummaryWriter(str(run_dir))
    returns = play_at_random(args, writer) if args.algorithm == "random" else learn(args, writer)
    writer.close()
    print(f"run directory: {run_dir}")
    print(f"evaluation: {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
