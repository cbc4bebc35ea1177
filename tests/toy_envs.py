"""Tiny environments with known answers; importing this module registers them."""

import gymnasium as gym
import numpy as np


class Endless(gym.Env):
    """Reward 1 for ever, from one state: worth 1 / (1 - γ). A time limit ends each episode after 20 steps."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Spoiled(Endless):
    """Returns a NaN reward, or an infinite observation, at the 300th step of the process."""

    steps = 0

    def __init__(self, what):
        self.what = what

    def step(self, action):
        obs, reward, *rest = super().step(action)
        Spoiled.steps += 1
        if Spoiled.steps == 300:
            obs, reward = (obs, np.nan) if self.what == "reward" else (obs + np.inf, reward)
        return obs, reward, *rest


class Odd(gym.Env):
    """Dict observations with an image in them, actions in a 2 x 2 box that is not symmetric."""

    observation_space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (2, 3), np.uint8), "mode": gym.spaces.Discrete(3)}
    )
    action_space = gym.spaces.Box(np.array([[-2, 0], [0, 1]], np.float32), np.array([[2, 1], [3, 4]], np.float32))

    def observe(self):
        return {"image": np.full((2, 3), 7, np.uint8), "mode": 1}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        assert action.shape == (2, 2) and self.action_space.contains(action.astype(np.float32))
        return self.observe(), float(action.sum()), False, False, {}


gym.register("Endless-v0", Endless, max_episode_steps=20)
gym.register("Limitless-v0", Endless)
gym.register("NanReward-v0", Spoiled, max_episode_steps=20, kwargs={"what": "reward"})
gym.register("InfiniteObservation-v0", Spoiled, max_episode_steps=20, kwargs={"what": "observation"})
gym.register("Odd-v0", Odd, max_episode_steps=10)
