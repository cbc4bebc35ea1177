"""HalfCheetah whose actions nobody clips, as tasks and scripts were at the time of the PPO paper.

    python ppo_kl_continuous.py --env-id benchmark.unclipped:HalfCheetahUnclipped-v5

The simulator limits the motors' force all the same, but the reward counts the action as it was given: 0.1 times its
square is taken off. With actions kept within ±1, as our scripts keep them, that is at most 0.6 a step.
"""

import gymnasium as gym
import numpy as np


def make(**kwargs) -> gym.Env:
    env = gym.make("HalfCheetah-v5", **kwargs).unwrapped
    env.action_space = gym.spaces.Box(-np.inf, np.inf, env.action_space.shape, np.float32)
    return env


gym.register("HalfCheetahUnclipped-v5", entry_point=make, max_episode_steps=1000)
