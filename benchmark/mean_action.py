"""How far a policy's mean action goes: a training run of one of the three continuous scripts, with a look at it.

    python benchmark/mean_action.py ppo_clip_continuous [the script's own arguments]

Prints for every 25,000 steps the largest absolute mean of any action, the share of states where a mean is outside of
the box of actions, the largest σ, and the episodes that ended. The run is the one that the script makes on its own.
"""

import importlib
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))


def main(name: str, arguments: list[str]) -> None:
    script = importlib.import_module(name)
    args = script.parse_args(arguments)
    with ExitStack() as opened:
        box = script.make_env(args.env_id, opened).action_space
    low, high = torch.as_tensor(box.low.ravel()), torch.as_tensor(box.high.ravel())
    update, steps, block = script.update, 0, []
    print("steps | largest mean | outside of the box | largest σ | episodes")

    def look_and_update(agent, *rest, **options):
        nonlocal steps
        rollout = next(x for x in rest if isinstance(x, script.Rollout))
        with torch.no_grad():
            mean = agent.distribution(rollout.obs.flatten(0, 1)).mean.cpu()
        outside = ((mean < low) | (mean > high)).any(-1).float().mean()
        block.append((mean.abs().max(), outside, agent.actor_log_std.exp().max(), rollout.dones.sum()))
        before, steps = steps, steps + rollout.rewards.numel()
        if before // 25_000 != steps // 25_000:
            mean, share, std, ends = (torch.stack(column).double() for column in zip(*block))
            print(f"{steps} | {mean.max():.1f} | {share.mean():.3f} | {std.max():.3f} | {ends.sum():.0f}", flush=True)
            block.clear()
        return update(agent, *rest, **options)

    script.update = look_and_update
    script.train(args)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
