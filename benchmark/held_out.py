"""How much of what a step of TRPO gains on its batch it gains on states and actions that it has not seen.

    python benchmark/held_out.py RUN_DIR

Takes the policy that trpo_continuous.py has saved in RUN_DIR, plays 8 x 1,600 steps with it, and computes steps from
batches of a part of them, for several dampings of H (infinite: the plain gradient). Each is made as long as gives a
mean KL of 0.01 on its own batch. Prints the gain of the surrogate there and on 8 x 1,024 steps held out, means over
batches, in standard deviations of the advantages.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn.utils import parameters_to_vector, vector_to_parameters

sys.path.insert(0, str(Path(__file__).parent.parent))

import trpo_continuous as trpo  # noqa: E402


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """Where trpo_continuous.py has saved a policy."""
    dampings: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, np.inf)
    """The multiples of the identity that are added to H."""
    lengths: tuple[int, ...] = (128, 256)
    """Steps of each of the 8 environments that make a batch."""
    kl: float = 0.01
    """The mean KL of every step on its batch, in nats."""


def main(args: Args) -> None:
    options = trpo.parse_args(["--evaluate", str(args.run_dir)])
    torch.manual_seed(options.seed + 20_000)
    with ExitStack() as opened:
        envs = trpo.make_envs(options, opened)
        agent = trpo.Agent(envs.single_observation_space, envs.single_action_space, options)
        scaler = trpo.RewardScaler(options.num_envs, options.gamma)
        trpo.load_checkpoint(args.run_dir, agent=agent, reward_scaler=scaler)
        rollout, *_ = trpo.collect(envs, agent, envs.reset(seed=options.seed + 20_000)[0], 1600, 0)
    rollout = rollout._replace(rewards=scaler(rollout.rewards, rollout.dones))
    advantages = trpo.estimate_advantages(agent, rollout, options)[0].view(1600, -1)
    parameters = agent.actor_parameters()
    theta_old = parameters_to_vector(parameters).detach()

    def batch(steps: slice) -> tuple:
        obs, actions = rollout.obs[steps].flatten(0, 1), rollout.actions[steps].flatten(0, 1)
        old = agent.distribution(obs)
        some = advantages[steps].flatten()
        return obs, actions, (some - some.mean()) / some.std(), old, old.log_prob(actions).detach()

    @torch.no_grad()
    def at(theta: torch.Tensor, samples: tuple) -> tuple[float, float]:
        obs, actions, some, old, old_log_probs = samples
        vector_to_parameters(theta, parameters)
        new = agent.distribution(obs)
        result = float(trpo.surrogate_advantage((new.log_prob(actions) - old_log_probs).exp(), some))
        kl = float(trpo.mean_kl(old, new))
        vector_to_parameters(theta_old, parameters)
        return result, kl

    held_out = batch(slice(576, 1600))
    print(
        "| steps in the batch | damping | gain on it | gain held out | KL held out |\n| --- | --- | --- | --- | --- |"
    )
    for length in args.lengths:
        for damping in args.dampings:
            results = []
            for start in range(0, 576 - length + 1, length):
                samples = batch(slice(start, start + length))
                obs, actions, some, _, old_log_probs = samples
                ratio = (agent.distribution(obs).log_prob(actions) - old_log_probs).exp()
                x = g = trpo.flat_gradient(trpo.surrogate_advantage(ratio, some), parameters)
                if damping < np.inf:
                    hessian = trpo.fisher_vector_product(agent.distribution(obs), parameters, damping)
                    x = trpo.conjugate_gradient(hessian, g, options.cg_iterations, 1e-10)
                direction, low, high = x / x.norm(), 0.0, 1.0
                while at(theta_old + high * direction, samples)[1] < args.kl:
                    high *= 2.0
                for _ in range(25):  # bisection
                    middle = 0.5 * (low + high)
                    inside = at(theta_old + middle * direction, samples)[1] < args.kl
                    low, high = (middle, high) if inside else (low, middle)
                theta = theta_old + low * direction
                results.append((at(theta, samples)[0], *at(theta, held_out)))
            gain, held, kl = np.mean(results, 0)
            print(f"| {length * options.num_envs:,} | {damping:g} | {gain:.4f} | {held:.4f} | {kl:.4f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
