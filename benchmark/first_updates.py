"""What the first updates of a run are made of: how many advantages are negative, and how large the mean action is.

    python benchmark/first_updates.py ppo_kl_continuous --total-timesteps 10240 [the script's own arguments]

One line an iteration, before its update, of one of the three continuous scripts. The run is the one that the script
makes on its own.
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))


def main(name: str, arguments: list[str]) -> None:
    script = importlib.import_module(name)
    update = script.update
    print("negative advantages | mean absolute mean action")

    def look_and_update(agent, *rest):
        i = next(i for i, x in enumerate(rest) if isinstance(x, script.Rollout))
        rollout, advantages = rest[i : i + 2]
        with torch.no_grad():
            mean = agent.distribution(rollout.obs.flatten(0, 1)).mean
        print(f"{(advantages < 0).float().mean():.1%} | {mean.abs().mean():.2f}", flush=True)
        return update(agent, *rest)

    script.update = look_and_update
    script.train(script.parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
