"""Tiny environments with known answers; importing this module registers them."""

import os
import signal

import gymnasium as gym
import numpy as np


class Endless(gym.Env):
    """Reward 1 for ever, from one state: worth 1 / (1 - γ). A time limit ends each episode after 20 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Held(Endless):
    """Counts how many of it are open; `limit` may be at a time. `fault` happens at its 95th step, or at its start; of
    several processes only in the second."""

    opened, limit = 0, 2

    def __init__(self, fault=None):
        if Held.opened == Held.limit:
            raise RuntimeError(f"{Held.limit} are open")
        Held.opened += 1
        self.is_open, self.fault, self.t = True, fault, 0

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0] + np.float32(np.inf if self.fault == "start" else 0.0), {}

    def step(self, action):
        self.t += 1
        fault = self.fault if self.t == 95 and os.environ.get("RANK", "1") == "1" else None
        for _ in range(2 if fault == "signals" else 0):  # the second one ends the run at once
            os.kill(os.getpid(), signal.SIGTERM)
        obs, reward = np.full(1, np.inf if fault == "observation" else 0.0, np.float32), 1.0
        return obs, np.nan if fault == "reward" else reward, False, False, {}

    def close(self):
        Held.opened -= self.is_open
        self.is_open = False


class Counting(Endless):
    """Observes the number of the step within its episode, in an array that it fills again and again; the reward is the
    action that arrived."""

    def __init__(self):
        self.t = np.zeros(1, np.float32)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.t[0] = 0.0
        return self.t, {}

    def step(self, action):
        self.t += 1.0
        return self.t, float(action[0]), False, False, {}


class Odd(gym.Env):
    """Dict observations with an image in them, actions in a 2 x 2 box that is not symmetric."""

    image, low = gym.spaces.Box(0, 255, (2, 3), np.uint8), np.array([[-2, 0], [0, 1]], np.float32)
    observation_space = gym.spaces.Dict({"image": image, "mode": gym.spaces.Discrete(3)})
    action_space = gym.spaces.Box(low, low + 3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"image": np.full((2, 3), 7, np.uint8), "mode": 1}, {}

    def step(self, action):
        assert action.shape == (2, 2) and self.action_space.contains(action.astype(np.float32))
        return self.reset()[0], float(action.sum()), False, False, {}


for env in (Endless, Held, Odd):
    gym.register(f"{env.__name__}-v0", env, max_episode_steps=20)
for fault in ("reward", "observation", "start", "signals"):
    gym.register(f"Held-{fault}-v0", Held, max_episode_steps=20, kwargs={"fault": fault})
gym.register("Counting-v0", Counting, max_episode_steps=7)
gym.register("Limitless-v0", Endless)
