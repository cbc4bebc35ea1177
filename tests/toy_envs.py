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
    """Returns a NaN reward, or an infinite observation or one beyond float32, at its 300th step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    steps = 0

    def __init__(self, what):
        self.what = what

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.steps += 1
        if self.steps == 300:
            reward = np.nan if self.what == "reward" else reward
            obs = obs.astype(float) + {"reward": 0.0, "observation": np.inf, "huge": 1e39}[self.what]
        return obs, reward, *rest


class InfiniteStart(Endless):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0] + np.float32(np.inf), {}


class Five(Endless):
    """Ends by itself after 5 steps, and its infos never have the same shape twice."""

    length = 0

    def reset(self, **kwargs):
        self.t = 0
        Five.length += 1
        return super().reset(**kwargs)[0], {"history": np.zeros(Five.length)}

    def step(self, action):
        self.t += 1
        obs, reward, _, truncated, _ = super().step(action)
        return obs, reward, self.t == 5, truncated, {"history": np.zeros(self.t)}


class Whole(Endless):
    action_space = gym.spaces.Box(0, 10, (2,), np.int64)


class Unbounded(Endless):
    observation_space = gym.spaces.Sequence(gym.spaces.Box(-1.0, 1.0, (1,)))


class Broken(Endless):
    def __init__(self):
        raise ValueError("no such\nfile")


class Counting(Endless):
    """Observes the number of the step within its episode, in an array that it fills again and again; the reward is the
    action that arrived."""

    observation_space = gym.spaces.Box(0.0, 20.0, (1,))

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
gym.register("HugeObservation-v0", Spoiled, max_episode_steps=20, kwargs={"what": "huge"})
gym.register("InfiniteStart-v0", InfiniteStart, max_episode_steps=20)
gym.register("Counting-v0", Counting, max_episode_steps=7)
gym.register("Five-v0", Five, max_episode_steps=20)
gym.register("Whole-v0", Whole, max_episode_steps=20)
gym.register("Unbounded-v0", Unbounded, max_episode_steps=20)
gym.register("Broken-v0", Broken, max_episode_steps=20)
gym.register("Odd-v0", Odd, max_episode_steps=10)
