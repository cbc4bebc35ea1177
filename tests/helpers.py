"""What several test files share: the scripts, short runs of them, and what TensorBoard shows of a run."""

from pathlib import Path

import gymnasium as gym
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari
import ppo_clip_continuous
import ppo_kl_continuous
import trpo_continuous

ROOT = Path(__file__).parent.parent
CONTINUOUS = [trpo_continuous, ppo_clip_continuous, ppo_kl_continuous]
SCRIPTS = [*CONTINUOUS, ppo_atari]
each = pytest.mark.parametrize("script", CONTINUOUS, ids=lambda script: script.SCRIPT)
each_of_four = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)


def quick(script, run_dir, iterations=2, **changes):
    """Arguments for a few iterations of 2 x 64 steps on Pendulum, or of 2 x 16 steps of Pong."""
    options = {"env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 64, "num_minibatches": 4, "eval_episodes": 1}
    if script is ppo_atari:
        options |= {"env_id": "ALE/Pong-v5", "num_steps": 16, "num_epochs": 1, "device": "cpu", "num_threads": 1}
    options |= changes
    options.setdefault("total_timesteps", iterations * options["num_envs"] * options["num_steps"])
    return script.Args(run_dir=run_dir, **options)


def agent_of(script, obs_size=3, action_size=2, **options):
    """A new agent of a continuous script, for tasks of these sizes."""
    spaces = (gym.spaces.Box(-1, 1, (size,)) for size in (obs_size, action_size))
    return script.Agent(*spaces, script.Args(**options))


def scalars(run_dir):
    """{tag: [(step, value), ...]} of a run's TensorBoard events."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
