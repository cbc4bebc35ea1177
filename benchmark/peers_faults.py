"""What other libraries get wrong, shown by running their own code beside ours.

    pip install -r benchmark/requirements.txt
    python benchmark/peers_faults.py
    python benchmark/peers_faults.py --cleanrl ppo_continuous_action.py    # the file of that name from CleanRL

Each function returns what it measures; `main` prints it. Written against the versions in requirements.txt; where a
library has mended a fault, the two figures of a line agree.
"""

import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch.distributions import Independent, Normal

sys.path.append(str(Path(__file__).parent.parent))
import ppo_clip_continuous as clip  # noqa: E402
import trpo_continuous as trpo  # noqa: E402


@dataclass
class Args:
    cleanrl: Path | None = None
    """CleanRL's ppo_continuous_action.py."""


def sb3_contrib_kl(action_size: int = 6) -> dict[str, float]:
    """TRPO's mean KL and the product of its Hessian with a vector, sb3-contrib's (no damping) over the true ones.

    Its `train` takes kl_divergence(new, old).mean(): a Gaussian's is one number for each action dimension, and the mean
    runs over these too. It is also the KL from the new policy to the old."""
    from sb3_contrib import TRPO
    from stable_baselines3.common.distributions import DiagGaussianDistribution, kl_divergence

    torch.manual_seed(0)
    mean = torch.zeros(action_size, dtype=torch.float64, requires_grad=True)
    log_std = torch.full((action_size,), -0.5, dtype=torch.float64, requires_grad=True)
    states = torch.randn(256, action_size, dtype=torch.float64)
    old, new = DiagGaussianDistribution(action_size), DiagGaussianDistribution(action_size)
    with torch.no_grad():
        old.proba_distribution(states, log_std)
    new.proba_distribution(states + mean, log_std)
    gradient = torch.cat(torch.autograd.grad(kl_divergence(new, old).mean(), [mean, log_std], create_graph=True))
    vector = torch.randn(2 * action_size, dtype=torch.float64)
    theirs = TRPO.hessian_vector_product(SimpleNamespace(cg_damping=0.0), [mean, log_std], gradient, vector)
    policy = Independent(Normal(states + mean, log_std.exp()), 1)
    true = trpo.fisher_vector_product(policy, [mean, log_std], damping=0.0)(vector)
    with torch.no_grad():
        new.proba_distribution(states + 0.1 * torch.randn(action_size).double(), log_std + 0.02)
        mean_of_all = float(kl_divergence(new, old).mean())
        kl = float(trpo.mean_kl(Independent(new.distribution, 1), Independent(old.distribution, 1)))
    return {"kl": mean_of_all / kl, "Fisher product": float(theirs.norm() / true.norm())}


class ThreeSteps(gym.Env):
    """An episode of three steps that ends in a termination; rewards 1, 1, 10."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), (1.0, 1.0, 10.0)[self.steps - 1], self.steps == 3, False, {}


def gymnasium_normalize_reward(steps: int = 3000, gamma: float = 0.99) -> dict[str, float]:
    """The std of the discounted returns that rewards are divided by, after `steps` steps of `ThreeSteps`: the true
    one, ours, and that of Gymnasium's NormalizeReward, which clears the sum before the last reward of a terminated
    episode is added to it, so that the whole return never counts."""
    sums = np.cumsum([1.0 * gamma**2, 1.0 * gamma, 10.0]) / [gamma**2, gamma, 1.0]
    one = gym.wrappers.NormalizeReward(ThreeSteps(), gamma)
    vector = gym.wrappers.vector.NormalizeReward(
        SyncVectorEnv([ThreeSteps], autoreset_mode=AutoresetMode.SAME_STEP), gamma
    )
    action = np.zeros(1, np.float32)
    one.reset(), vector.reset()
    for _ in range(steps):
        *_, terminated, _, _ = one.step(action)
        if terminated:
            one.reset()
        vector.step(action[None])
    scaler = clip.RewardScaler(1, gamma)
    rewards = torch.tensor([1.0, 1.0, 10.0]).repeat(steps // 3)[:, None]
    scaler(rewards, torch.tensor([False, False, True]).repeat(steps // 3)[:, None])
    return {
        "true": float(sums.std()), "ours": float(scaler.stats.var.sqrt()),
        "NormalizeReward": float(one.return_rms.var) ** 0.5, "of a vector": float(vector.return_rms.var) ** 0.5,
    }  # fmt: skip


def sb3_prior_count(offset: float = 1e6, samples: int = 20_000) -> dict[str, float]:
    """Error of the variance of `samples` numbers of N(offset, 1): stable-baselines3's running statistics begin as if
    they had seen 1e-4 samples of mean 0."""
    from stable_baselines3.common.running_mean_std import RunningMeanStd

    x = np.random.default_rng(0).normal(offset, 1.0, samples)
    theirs, ours = RunningMeanStd(shape=()), clip.RunningMeanStd()
    for part in x.reshape(-1, 100):
        theirs.update(part)
        ours.update(torch.tensor(part))
    return {"SB3": abs(float(theirs.var) - x.var()), "ours": abs(float(ours.var) - x.var())}


def cleanrl_time_limit(source: str) -> dict[str, float]:
    """The return that the critic learns for the last step before a time limit, by CleanRL's own lines and by ours,
    where every reward is 1, γ 0.99 and the critic says 100, which is right."""
    (done_line,) = re.findall(r"^ *(next_done = np\.logical_or\(.*)$", source, re.M)
    gae = source[source.index("        # bootstrap value if not done") : source.index("        # flatten the batch")]
    steps, value = 4, 100.0
    ones, zeros = torch.ones(steps, 1), torch.zeros(steps, 1)
    names = {"np": np, "torch": torch, "device": "cpu", "terminations": [False], "truncations": [True]}
    exec(done_line, names)  # what it makes of a truncation at the last step of the rollout
    names |= {
        "next_done": torch.tensor(names["next_done"]).float(), "next_obs": torch.zeros(1, 1),
        "args": SimpleNamespace(num_steps=steps, gamma=0.99, gae_lambda=0.95), "rewards": ones, "dones": zeros,
        "values": value * ones, "agent": SimpleNamespace(get_value=lambda obs: torch.full((1, 1), value)),
    }  # fmt: skip
    exec(textwrap.dedent(gae), names)
    truncated = torch.tensor([[False]] * (steps - 1) + [[True]])
    never = torch.zeros_like(truncated)
    _, ours = clip.compute_gae(ones, value * ones, value * ones, never, truncated, 0.99, 0.95)
    return {"CleanRL": float(names["returns"][-1]), "ours": float(ours[-1])}


def main(args: Args) -> None:
    def show(what: str, measured: dict[str, float]) -> None:
        print(f"{what}: " + ", ".join(f"{name} {value:.3g}" for name, value in measured.items()))

    show("sb3-contrib's TRPO over the truth, 6 action dimensions", sb3_contrib_kl())
    show("std of the discounted returns", gymnasium_normalize_reward())
    show("error of the variance of N(1e6, 1)", sb3_prior_count())
    if args.cleanrl:
        measured = cleanrl_time_limit(args.cleanrl.read_text())
        show("return before a time limit, where it is 100", measured)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
