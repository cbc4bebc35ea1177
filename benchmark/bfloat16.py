"""What bfloat16 costs `ppo_atari.py`: one saved run's policy, values and gradients in bfloat16 and in float32.

    python benchmark/bfloat16.py RUN_DIR [RUN_DIR ...]

Plays 1,024 steps from the game's start, a batch of the run's own size with the float32 network, and takes the gradient
of eq. 9 over 16 minibatches of it with either. The yardstick is what another minibatch would have changed.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import tyro

sys.path.append(str(Path(__file__).parent.parent))
import ppo_atari as script


def compare(run_dir: Path) -> None:
    """Print the differences between the two, and between two minibatches."""
    checkpoint = script.load_checkpoint(run_dir)
    args = script.Args(**{**checkpoint["args"], "num_threads": torch.get_num_threads(), "compile": False})
    torch.manual_seed(0)
    envs = script.make_envs(args)
    agents = {}
    for bfloat16 in (False, True):
        agents[bfloat16] = script.Agent(envs.single_observation_space, envs.single_action_space, bfloat16)
        script.load_parts(checkpoint, agent=agents[bfloat16])
    obs, _ = envs.reset(seed=0)
    for _ in range(1024 // args.num_steps):
        rollout, obs, _ = script.collect(envs, agents[False], obs, args.num_steps, 0)
    images, actions = rollout.obs.flatten(0, 1), rollout.actions.flatten()
    with torch.no_grad():
        policies, values = zip(*(agent.both(images) for agent in agents.values()))
    advantages, returns = script.estimate_advantages(agents[False], rollout, rollout.values.flatten(), args)
    log_probs = [policy.log_prob(actions) for policy in policies]
    kl = torch.distributions.kl_divergence(*policies)
    print(f"{run_dir}, step {checkpoint['global_step']:,}")
    print(f"  log-probability of the actions taken: mean difference {(log_probs[0] - log_probs[1]).abs().mean():.1e}")
    print(f"  mean KL of the two policies: {kl.mean():.1e}, entropy {policies[0].entropy().mean():.2f}")
    print(f"  values: mean difference {(values[0] - values[1]).abs().mean():.1e}, std {values[0].std():.1e}")
    gradients = {False: [], True: []}
    for rows in torch.cat([torch.randperm(len(images)) for _ in range(4)]).split(len(images) // args.num_minibatches):
        for bfloat16, agent in agents.items():
            old = (x[rows] for x in (log_probs[bfloat16], advantages, returns, values[bfloat16]))
            minibatch = (images[rows], actions[rows], *old)
            unclipped = replace(args, max_grad_norm=1e9)
            parts = script.loss_gradient(agent, list(agent.parameters()), minibatch, unclipped)
            gradients[bfloat16].append(torch.cat([part.flatten() for part in parts]))
    single, half = torch.stack(gradients[False]), torch.stack(gradients[True])
    pairs = {
        "of a minibatch in bfloat16": (single, half),
        "of another minibatch": (single, single.roll(1, dims=0)),
        "of the whole batch in bfloat16": (single.mean(0, keepdim=True), half.mean(0, keepdim=True)),
    }
    for name, (right, changed) in pairs.items():
        cosine = torch.cosine_similarity(right, changed, dim=1).mean()
        distance = ((right - changed).norm(dim=1) / right.norm(dim=1)).mean()
        print(f"  gradient {name}: cosine {cosine:.4f}, relative distance {distance:.4f}")


def main(run_dirs: tyro.conf.Positional[list[Path]]) -> None:
    torch.set_num_threads(1)
    for run_dir in run_dirs:
        compare(run_dir)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
