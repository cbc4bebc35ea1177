"""What bfloat16, and what the noise of its actions, costs a saved run of `ppo_atari.py`.

    python benchmark/atari.py RUN_DIR [RUN_DIR ...]

Policy, values and the gradient of eq. 9 in bfloat16 and in float32, over 16 minibatches of one batch from the middle of
8 games; the yardstick is what another minibatch would have changed. Then the scores of 2 games of each of 8 emulators,
with the logits as they are, doubled, and with the most likely action alone.
"""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.distributions import Categorical

sys.path.append(str(Path(__file__).parent.parent))
import ppo_atari as script


def precision(args: script.Args, agents: dict[bool, script.Agent], opened: ExitStack) -> None:
    """Print the differences between the agents in float32, False, and bfloat16, True, and between two minibatches."""
    torch.manual_seed(0)
    envs = script.make_envs(args, opened)
    obs, _ = envs.reset(seed=0)
    for _ in range(1024 // args.num_steps):
        rollout, obs, _ = script.collect(envs, agents[False], obs, args.num_steps, 0)
    images, actions = rollout.obs.flatten(0, 1), rollout.actions.flatten()
    with torch.no_grad():
        policies, values = zip(*(agent.both(images) for agent in agents.values()))
    advantages, returns = script.estimate_advantages(agents[False], rollout, args)
    log_probs = [policy.log_prob(actions) for policy in policies]
    kl = torch.distributions.kl_divergence(*policies)
    print(f"  log-probability of the actions taken: mean difference {(log_probs[0] - log_probs[1]).abs().mean():.1e}")
    print(f"  mean KL of the two policies: {kl.mean():.1e}, entropy {policies[0].entropy().mean():.2f}")
    print(f"  values: mean difference {(values[0] - values[1]).abs().mean():.1e}, std {values[0].std():.1e}")
    gradients, unclipped = {False: [], True: []}, replace(args, max_grad_norm=1e9)
    for rows in torch.cat([torch.randperm(len(images)) for _ in range(4)]).split(len(images) // args.num_minibatches):
        for bfloat16, agent in agents.items():
            agent.zero_grad()
            minibatch = (x[rows] for x in (actions, log_probs[bfloat16], advantages, returns))
            script.compute_gradient(agent, agent.pixels(images[rows]), *minibatch, unclipped)
            gradients[bfloat16].append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
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


@torch.no_grad()
def play(args: script.Args, agent: script.Agent, sharpness: float, opened: ExitStack, games: int = 2) -> None:
    """Print score and length of the first games of each emulator, actions drawn from logits times sharpness."""
    torch.manual_seed(0)
    envs = script.make_envs(args, opened)
    obs, _ = envs.reset(seed=0)
    scores, lengths = [[] for _ in range(args.num_envs)], []
    while min(map(len, scores)) < games:  # of each as many, as the first that are over are the short ones
        logits = agent.distribution(torch.as_tensor(obs)).logits
        action = Categorical(logits=sharpness * logits).sample() if np.isfinite(sharpness) else logits.argmax(1)
        obs, *_, infos = envs.step(action.numpy())
        for i in np.flatnonzero(infos["game_over"]):
            if len(scores[i]) < games:
                scores[i].append(infos["score"][i])
                lengths.append(infos["length"][i])
    print(
        f"  logits times {sharpness}: score {np.mean(scores):.1f} ± {np.std(scores):.1f}, {np.mean(lengths):.0f} steps"
    )


def main(run_dirs: tyro.conf.Positional[list[Path]]) -> None:
    torch.set_num_threads(1)
    for run_dir in run_dirs:
        checkpoint = script.load_checkpoint(run_dir)
        args = script.Args(**{**checkpoint["args"], "num_threads": 1})
        agents = {}
        with ExitStack() as opened:
            env = script.make_env(args.env_id, opened)
            for bfloat16 in (False, True):
                agents[bfloat16] = script.Agent(env.observation_space, env.action_space, bfloat16)
                script.load_checkpoint(run_dir, agent=agents[bfloat16])
            print(f"{run_dir}, step {checkpoint['global_step']:,}", flush=True)
            precision(args, agents, opened)
            for sharpness in (1.0, 2.0, float("inf")):
                play(args, agents[args.bfloat16], sharpness, opened)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
