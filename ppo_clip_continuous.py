# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.9.0",
#     "ale-py==0.12.1",
#     "opencv-python-headless==5.0.0.93",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
# ]
# ///
"""Proximal policy optimization (PPO) with the clipped surrogate, for continuous actions.

PPO improves a stochastic policy by gradient ascent on a surrogate: the advantage of the actions taken,
weighted by the ratio of their probabilities under the new and the old policy. Far from the old policy
the surrogate means nothing, so the ratio is clipped: an action whose probability has already moved by
more than `clip_coef` in the direction that its advantage asks for gives no further gradient. That is a
cheap stand-in for the trust region of TRPO (`trpo_continuous.py`) and needs nothing but a first-order
optimizer.

Paper: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347; equation
numbers below are its own. GAE is Schulman et al. 2016, arXiv 1506.02438.

Where this file departs from the paper, each a field of `Args` with its source or reason: observations are
normalised, rewards scaled, advantages recomputed with the newest critic at every epoch, the learning rate
decays, the gradient's norm is clipped, the log-std starts at -0.5. Besides, a time limit is not a
termination, and the environments are spread over the length of an episode (`Staggered`).

    python ppo_clip_continuous.py --env-id Walker2d-v5 --seed 2
    python ppo_clip_continuous.py --resume RUN_DIR --total-timesteps 2000000
    python ppo_clip_continuous.py --evaluate RUN_DIR --capture-video
"""

import errno
import io
import itertools
import json
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from ctypes.util import find_library
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

if sys.platform == "linux" and not os.environ.get("DISPLAY") and find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it at import: videos without a display

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import nn
from torch.distributions import Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """Any registered Gymnasium environment with a continuous action space, at best one with bounds near ±1, as actions
    start around 0 in the environment's units and are clipped to its bounds; `module:Env-v0` imports module first."""
    seed: int = 1
    """Seed of the networks, the actions and the environments."""
    total_timesteps: int = 1_000_000
    """Environment steps of the whole run, all environments together, those before a resume included; rounded down to
    whole iterations. [paper, sec. 6.1: 1M]"""
    num_envs: int = 8
    """Environments stepped side by side. [DPPO and A3C use parallel workers; the paper says nothing]"""
    num_steps: int = 256
    """Steps of each environment in one iteration; the batch is num_envs * num_steps. [paper, table 3: 2048 in all]"""
    vectorization: Literal["sync", "async"] = "sync"
    """Step the environments one after the other, or each in a process of its own; on 2 cores sync is faster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks live; auto is the CPU, which is faster for networks as small as these."""
    num_threads: int = 1
    """CPU threads of PyTorch; one is fastest for small networks and leaves the other cores to other seeds."""
    compile: bool = False
    """Compile the gradient with torch.compile: some seconds at the start, then faster updates; needs a C++ compiler and
    Python's header files."""

    hidden_size: int = 64
    """Width of the two hidden layers of actor and critic. [paper, sec. 6.1: 64]"""
    init_log_std: float = -0.5
    """Start value of the log standard deviation of the actions, in [-10, 10]. [arXiv 2006.05990, sec. 3.2: a std of
    about 0.5]"""
    learning_rate: float = 3e-4
    """Step size of Adam at the start. [paper, table 3; Adam's ε, 1e-5: OpenAI Baselines, CleanRL]"""
    anneal_lr: bool = True
    """Let the learning rate fall linearly to 0 over the run. [paper, table 5, on Atari; arXiv 2006.05990]"""
    num_epochs: int = 10
    """Passes over the batch in one iteration. [paper, table 3]"""
    num_minibatches: int = 32
    """Gradient steps per pass, a divisor of num_envs * num_steps. [paper, table 3: minibatches of 64 samples]"""
    gamma: float = 0.99
    """Discount factor, in [0, 1]. [paper, table 3]"""
    gae_lambda: float = 0.95
    """Decay of the advantage estimator, in [0, 1]. [paper, table 3; arXiv 2006.05990, sec. 3.4: 0.9]"""
    clip_coef: float = 0.2
    """Epsilon of eq. 7: how far the probability ratio may move before its gradient stops. [paper, table 1: best]"""
    value_coef: float = 0.5
    """c1 of eq. 9, the weight of the value loss, the mean squared error; as Adam rescales and the networks are
    separate, it acts through the joint gradient clipping. [SB3; OpenAI Baselines, CleanRL: 0.5 on half the square]"""
    entropy_coef: float = 0.0
    """c2 of eq. 9, the weight of the entropy bonus. [paper, sec. 6.1: none on MuJoCo]"""
    value_clip: float | None = None
    """Clip the change of a value per iteration to this, in units of scaled reward; None: not.
    [OpenAI Baselines; arXiv 2006.05990: no gain]"""
    max_grad_norm: float = 0.5
    """Scale a gradient of larger norm, over all parameters, down to this. [Baselines; arXiv 2006.05990, sec. 3.3]"""
    target_kl: float | None = None
    """Leave the iteration after an epoch that has moved the policy beyond this estimated mean KL, in nats; None: never.
    [Spinning Up. 0.03 helps on Humanoid, where clipping alone goes three times as far; elsewhere it costs returns:
    benchmark/README.md]"""
    recompute_advantages: bool = True
    """Estimate the advantages anew with the current critic before every epoch. [arXiv 2006.05990, sec. 3.5]"""
    center_advantages: bool = False
    """Subtract the batch's mean from the advantages: worth it where a large part of every reward is the same, which
    the critic takes long to learn. [OpenAI Baselines; the paper does not mention it]"""
    normalize_advantages: bool = False
    """Divide the batch's advantages by their standard deviation. [OpenAI Baselines; the paper does not mention it.
    Those of a task that is solved are small and mostly noise: blown up to 1 they undo what was learned]"""
    normalize_observations: bool = True
    """Shift and scale observations by their running mean and standard deviation, and keep them within ±10.
    [arXiv 2006.05990, sec. 3.3; the bound: OpenAI Baselines]"""
    scale_rewards: bool = True
    """Learn from rewards divided by the running std of the discounted return; reported ones stay raw. [Baselines]"""

    run_dir: Path | None = None
    """This run's own directory, one without a saved run; by default runs/<env>__<script>__<seed>__<time>."""
    checkpoint_interval: int = 10
    """Iterations between checkpoints; one more is written at the end, on Ctrl-C and on SIGTERM."""
    resume: Path | None = None
    """Go on with the run in this directory, with its arguments except those given beside this one; env_id, seed and
    what the networks are made of stay."""
    evaluate: Path | None = None
    """Only play the policy saved in this directory."""
    eval_episodes: int = 10
    """Episodes of the deterministic evaluation at the end of training, or of --evaluate."""
    capture_video: bool = False
    """Record the first evaluation episode as an mp4 in the run directory's videos/."""


LIMITS = {  # inclusive; a number that is not named here must be positive
    "seed": (0, 2**62),
    "num_threads": (1, 1024),
    "init_log_std": (-10.0, 10.0),
    "gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "value_coef": (0.0, 1e9),
    "entropy_coef": (0.0, 1e9),
}
FIXED = ("env_id", "seed", "hidden_size", "init_log_std", "normalize_observations")  # a resumed run keeps these


# ---------------------------------------------------------------------------- networks


class RunningMeanStd(nn.Module):
    """Mean and variance of all the data seen so far, in buffers, so that a checkpoint carries them."""

    def __init__(self, shape: tuple[int, ...] = (), limit: float = 10.0):
        super().__init__()
        self.limit = limit
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))  # what `normalize` needs of them, in float32
        self.register_buffer("scale", torch.ones(shape))

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Take in x, [batch, *shape]; exact however the data is batched (Chan et al. 1979)."""
        x = x.double()
        mean, var, count = x.mean(0), x.var(0, unbiased=False), len(x)
        delta, total = mean - self.mean, self.count + count
        self.var.copy_((self.var * self.count + var * count + delta**2 * self.count * count / total) / total)
        self.mean.add_(delta * count / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.rsqrt(self.var + 1e-8))

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., *shape] in standard deviations from the mean, within ± the limit."""
        x = x.to(self.shift.dtype)  # environments observe in float64
        return ((x - self.shift) * self.scale).clamp(-self.limit, self.limit)


class RewardScaler(RunningMeanStd):
    """Scales rewards by the standard deviation of the discounted return, so that values are of order 1."""

    @torch.no_grad()
    def forward(self, rewards: torch.Tensor, dones: torch.Tensor, gamma: float, running: torch.Tensor) -> torch.Tensor:
        """rewards and dones [num_steps, num_envs]; running [num_envs], each environment's discounted
        return so far, is carried on in place. The batch enters the statistics before it is scaled. What comes
        out is not clipped; OpenAI Baselines clip it at ±10."""
        returns = []
        for reward, done in zip(rewards, dones):
            running.mul_(gamma).add_(reward)
            returns.append(running.clone())
            running[done.bool()] = 0.0
        self.update(torch.cat(returns))
        return rewards * self.scale


def mlp(sizes: list[int], last_gain: float) -> nn.Sequential:
    """Tanh layers of these sizes, orthogonally initialised; the last one is linear with its own gain."""
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, 2**0.5)
        nn.init.zeros_(layers[-2].bias)
    nn.init.orthogonal_(layers[-2].weight, last_gain)
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Actor and critic without shared parameters (PPO paper, sec. 6.1), and the statistics of what they observe.

    Takes the single environment's spaces: a flat Box of observations, a Box of actions of any shape.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        hidden_size: int = 64,
        init_log_std: float = -0.5,
        normalize_observations: bool = True,
    ):
        super().__init__()
        obs_size, action_size = gym.spaces.flatdim(observation_space), gym.spaces.flatdim(action_space)
        # A last actor layer close to 0 starts with the same wide distribution everywhere (arXiv 2006.05990).
        self.actor_mean = mlp([obs_size, hidden_size, hidden_size, action_size], last_gain=0.01)
        self.actor_log_std = nn.Parameter(torch.full((action_size,), float(init_log_std)))
        self.critic = mlp([obs_size, hidden_size, hidden_size, 1], last_gain=1.0)
        # Statistics that `train` never updates change nothing, and then nothing is to be cut off either.
        self.obs_stats = RunningMeanStd((obs_size,), limit=10.0 if normalize_observations else float("inf"))

    def distribution(self, obs: torch.Tensor) -> Distribution:
        """π(·|obs): a Gaussian over one action [action_size] for each row of obs [batch, obs_size]."""
        mean = self.actor_mean(self.obs_stats.normalize(obs))
        return Independent(Normal(mean, self.actor_log_std.exp(), validate_args=False), 1, validate_args=False)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(obs), [batch], in units of scaled reward, for obs [batch, obs_size]."""
        return self.critic(self.obs_stats.normalize(obs)).squeeze(-1)


# ---------------------------------------------------------------------------- mathematics


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminations: torch.Tensor,
    dones: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (GAE paper, eq. 16; PPO paper, eq. 11 and 12).

    All tensors are [num_steps, num_envs]. `values[t]` is V of the state in which step t was taken,
    `next_values[t]` V of the state it really led to: of the last observation of the episode where one
    ended, not of the next one's first. `terminations` says that nothing follows that state, `dones`
    (terminated or truncated) that the episode ended there: the first stops the bootstrap, the second
    the sum over later steps. Returns (advantages, returns), with returns = advantages + values the
    targets of the critic.
    """
    deltas = rewards + gamma * next_values.masked_fill(terminations.bool(), 0.0) - values  # PPO eq. 12
    decays = gamma * gae_lambda * (1.0 - dones.to(values.dtype))
    advantage, advantages = torch.zeros_like(values[0]), []
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind())):
        advantage = delta + decay * advantage  # PPO eq. 11, from the last step to the first
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1])
    return advantages, advantages + values


def clipped_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """L^CLIP of each sample (eq. 7), to be maximised; ratio = π(a|s) / π_old(a|s), all [batch].

    The minimum takes the clipping only where it lowers the objective: a step can stop to pay, but a
    ratio on the wrong side of 1 is always pulled back.
    """
    return torch.min(ratio * advantages, ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef) * advantages)


def squared_error(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, value_clip: float | None
) -> torch.Tensor:
    """(V - V_targ)² of each sample (eq. 9), all [batch]; with value_clip the larger of it and the same
    with V kept within value_clip of old_values (OpenAI Baselines)."""
    error = (values - returns) ** 2
    if value_clip is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - returns) ** 2)
    return error


# ---------------------------------------------------------------------------- one iteration


class Rollout(NamedTuple):
    """What one iteration has seen, each [num_steps, num_envs, ...]."""

    obs: torch.Tensor
    actions: torch.Tensor  # as sampled, before the environment's box clips them
    rewards: torch.Tensor  # raw
    next_obs: torch.Tensor  # the true successor, also where an episode ended
    terminations: torch.Tensor
    dones: torch.Tensor  # terminated or truncated


@torch.no_grad()
def collect(
    envs: gym.vector.VectorEnv, agent: Agent, obs: np.ndarray, num_steps: int, global_step: int
) -> tuple[Rollout, np.ndarray, list[tuple[int, float, int]]]:
    """Run the policy for num_steps in each of envs (made by make_envs), from obs [num_envs, obs_size] on.

    Returns (rollout, the observations to go on from, the finished episodes as (step, return, length)).
    Raises FloatingPointError at the first NaN or infinity that an environment returns.
    """
    action_space, device = envs.single_action_space, agent.actor_log_std.device
    obs, steps, episodes = obs.astype(np.float32), [], []
    if not np.isfinite(obs).all():
        raise FloatingPointError(
            f"the environment returned an observation that is NaN or infinite at step {global_step}"
        )
    for _ in range(num_steps):
        action = agent.distribution(torch.as_tensor(obs, device=device)).sample().cpu().numpy()
        # Only the environment sees the clipped action: its log-probability would be another density's.
        env_action = action.reshape(-1, *action_space.shape).clip(action_space.low, action_space.high)
        next_obs, reward, terminated, truncated, infos = envs.step(env_action)
        next_obs, reward = next_obs.astype(np.float32), reward.astype(np.float32)
        successor, done = next_obs, terminated | truncated
        if done.any():  # these environments have already started their next episode; next_obs is its beginning
            successor = next_obs.copy()
            successor[done] = np.stack(infos["final_obs"][done])
            whole = done & np.logical_not(infos["final_info"].get("cut", False))  # what Staggered cut is no episode
            for i in np.flatnonzero(whole):
                step = int(global_step + 1 + i)  # one of its own: TensorBoard shows one value a step
                episodes.append((step, float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])))
        global_step += envs.num_envs
        if not (np.isfinite(reward).all() and np.isfinite(successor).all() and np.isfinite(next_obs).all()):
            what = "an observation" if np.isfinite(reward).all() else "a reward"
            raise FloatingPointError(f"the environment returned {what} that is NaN or infinite at step {global_step}")
        steps.append((obs, action, reward, successor, terminated, done))
        obs = next_obs
    rollout = Rollout(*(torch.as_tensor(np.stack(column), device=device) for column in zip(*steps)))
    return rollout, obs, episodes


@torch.no_grad()
def estimate_advantages(
    agent: Agent, rollout: Rollout, rewards: torch.Tensor, args: Args
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(advantages, returns, values) of the rollout by the current critic, each [num_steps * num_envs]."""
    values = agent.value(rollout.obs)
    # What step t led to is what step t + 1 started from, except after the last step and where an episode ended.
    next_values = torch.cat([values[1:], agent.value(rollout.next_obs[-1:])])
    next_values[rollout.dones] = agent.value(rollout.next_obs[rollout.dones])
    advantages, returns = compute_gae(
        rewards, values, next_values, rollout.terminations, rollout.dones, args.gamma, args.gae_lambda
    )
    mean, std = advantages.mean(), advantages.std(correction=0)
    if args.center_advantages:
        advantages = advantages - mean
    if args.normalize_advantages:
        advantages = advantages / (std + 1e-8)
    return advantages.flatten(), returns.flatten(), values.flatten()


@torch.no_grad()
def approximate_kl(agent: Agent, obs: torch.Tensor, actions: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    """KL(π_old ‖ π) estimated from the actions taken: mean of r - 1 - log r, unbiased and never negative
    (estimator k3 of http://joschu.net/blog/kl-approx.html)."""
    log_ratio = agent.distribution(obs).log_prob(actions) - old_log_probs
    return (log_ratio.exp() - 1.0 - log_ratio).mean()


def loss_gradient(
    agent: Agent, parameters: list[nn.Parameter], minibatch: tuple[torch.Tensor, ...], args: Args
) -> list[torch.Tensor]:
    """Gradient of -L^{CLIP+VF+S} (eq. 9) over one minibatch, one tensor a parameter, its norm clipped."""
    obs, actions, old_log_probs, advantages, returns, old_values = minibatch
    distribution = agent.distribution(obs)
    ratio = (distribution.log_prob(actions) - old_log_probs).exp()  # r_t(θ), eq. 6
    objective = clipped_surrogate(ratio, advantages, args.clip_coef).mean()  # eq. 7
    value_loss = squared_error(agent.value(obs), old_values, returns, args.value_clip).mean()
    loss = -objective + args.value_coef * value_loss
    if args.entropy_coef > 0.0:
        loss = loss - args.entropy_coef * distribution.entropy().mean()
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)  # 0 for parameters that it does not use
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    # Each laid out in memory as its parameter: fused Adam goes through both in that order, and would mix up another.
    return [torch.mul(gradient, scale, out=torch.empty_like(p)) for p, gradient in zip(parameters, gradients)]


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, rewards: torch.Tensor, args: Args, gradient
) -> dict[str, float]:
    """Learn from one rollout: num_epochs passes of minibatch gradient steps on eq. 9.

    `rewards` [num_steps, num_envs] are the scaled ones, `gradient` is `loss_gradient` or its compiled
    form. Returns the scalars for the log, taken over the whole batch after the last step (the explained
    variance before the first).
    """
    obs, actions = rollout.obs.flatten(0, 1), rollout.actions.flatten(0, 1)
    parameters = [p for p in agent.parameters() if p.requires_grad]
    with torch.no_grad():  # in the pass that the first gradient step repeats, so that every ratio starts at 1
        old_log_probs = agent.distribution(obs).log_prob(actions)
    advantages, returns, old_values = estimate_advantages(agent, rollout, rewards, args)
    explained_variance = 1.0 - (returns - old_values).var() / (returns.var() + 1e-8)

    for epoch in range(args.num_epochs):
        if epoch > 0 and args.recompute_advantages:
            advantages, returns, _ = estimate_advantages(agent, rollout, rewards, args)
        shuffle = torch.randperm(len(obs), device=obs.device)
        batch = (obs, actions, old_log_probs, advantages, returns, old_values)
        for minibatch in zip(*(x[shuffle].chunk(args.num_minibatches) for x in batch)):
            for parameter, grad in zip(parameters, gradient(agent, parameters, minibatch, args)):
                parameter.grad = grad
            optimizer.step()
        if args.target_kl is not None and approximate_kl(agent, obs, actions, old_log_probs) > args.target_kl:
            break

    with torch.no_grad():
        distribution = agent.distribution(obs)
        ratio = (distribution.log_prob(actions) - old_log_probs).exp()
        metrics = {
            "losses/policy_loss": -clipped_surrogate(ratio, advantages, args.clip_coef).mean(),
            "losses/value_loss": squared_error(agent.value(obs), old_values, returns, args.value_clip).mean(),
            "losses/entropy": distribution.entropy().mean(),
            "losses/approx_kl": approximate_kl(agent, obs, actions, old_log_probs),
            "losses/clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
            "losses/explained_variance": explained_variance,
        }
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------------------- the algorithm


def train(args: Args) -> Path:
    """PPO, algorithm 1 of the paper: collect, estimate advantages, optimise the surrogate, repeat.

    Returns the run directory. Raises RefusedError before any work for arguments that cannot work,
    FloatingPointError when a NaN or an infinity turns up, OSError when the disk is full; the last checkpoint is then
    still good. Ctrl-C and SIGTERM end it with SystemExit, the checkpoint saved.
    Resume from Python with train(parse_args(["--resume", str(run_dir), "--total-timesteps", "2000000"])), which
    takes all other arguments from the run.
    """
    if args.evaluate:
        raise RefusedError(f"evaluate: {args.evaluate} was given to train; main(['--evaluate', RUN_DIR]) plays it")
    check_args(args)
    envs = make_envs(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if args.device == "cuda" else "cpu")
    spaces = envs.single_observation_space, envs.single_action_space
    agent = Agent(*spaces, args.hidden_size, args.init_log_std, args.normalize_observations).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    reward_scaler = RewardScaler().to(device)
    torch._dynamo.config.trace_autograd_ops = True  # lets torch.compile see through torch.autograd.grad
    gradient = torch.compile(loss_gradient) if args.compile else loss_gradient

    batch_size = args.num_envs * args.num_steps
    discounted_returns = torch.zeros(args.num_envs, device=device)
    with Run(args, agent=agent, optimizer=optimizer, reward_scaler=reward_scaler) as run:
        obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))  # a resumed run draws on, and so plays new episodes
        while run.global_step + batch_size <= args.total_timesteps and not run.stop_signal:
            progress = run.global_step / args.total_timesteps if args.anneal_lr else 0.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - progress)
            rollout, obs, episodes = collect(envs, agent, obs, args.num_steps, run.global_step)
            rewards = rollout.rewards
            if args.scale_rewards:
                rewards = reward_scaler(rewards, rollout.dones, args.gamma, discounted_returns)
            metrics = update(agent, optimizer, rollout, rewards, args, gradient)
            if args.normalize_observations:  # only now: while it collects and learns, the policy sees one normalisation
                agent.obs_stats.update(rollout.obs.flatten(0, 1))
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            run.log(batch_size, episodes, metrics)
    envs.close()
    report_evaluation(agent, args, run.run_dir)
    return run.run_dir


# ---------------------------------------------------------------------------- environments and evaluation


class RefusedError(ValueError):
    """An argument that cannot work, found before any work was done."""


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment with observations flattened to a vector. Raises RefusedError where it does not exist or fit."""
    try:
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
        if render_mode:  # what is missing for a video shows at the first frame, so before any training
            env.reset()
            model = getattr(env.unwrapped, "model", None)
            if "track" in [model.camera(i).name for i in range(getattr(model, "ncam", 0))]:
                # Gymnasium 1.4 takes a camera that stands still, and HalfCheetah runs out of its picture.
                env.unwrapped.mujoco_renderer.camera_id = model.camera("track").id
            env.render()
    except Exception as error:  # an environment is other people's code
        hint = "; Atari games are played by ppo_atari.py" if env_id.startswith("ALE/") else ""
        if render_mode and sys.platform == "linux":
            hint += "; the environment variable MUJOCO_GL=egl, or osmesa, may help"
        what = "made" if render_mode is None else "made for --capture-video"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RefusedError(f"env_id: {env_id!r} cannot be {what} ({reason}){hint}") from error
    if not (isinstance(env.action_space, gym.spaces.Box) and np.issubdtype(env.action_space.dtype, np.floating)):
        raise RefusedError(
            f"env_id: {env_id} has the action space {env.action_space}, but this script needs continuous actions "
            f"(a Box of floats), and ppo_atari.py an Atari game; HalfCheetah-v5 and Pendulum-v1 would work"
        )
    if not env.observation_space.is_np_flattenable:
        raise RefusedError(f"env_id: {env_id} has observations of no fixed size, but this script needs a vector")
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        env = gym.wrappers.FlattenObservation(env)
    return env


class Staggered(gym.Wrapper):
    """Cuts one episode short, after `steps` steps. Where no episode ends before its time limit (HalfCheetah), the
    environments would else pass through their episodes in step, and every batch hold a single phase of them. (A limit
    that only the environment itself knows is none that `make_envs` could spread: give it in a TimeLimit.)"""

    def __init__(self, env: gym.Env, steps: int):
        super().__init__(env)
        self.steps = steps

    # Training reads nothing of info but "cut"; the vector environment would merge the rest key by key at every step.
    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.steps -= 1
        cut = self.steps == 0 and not (terminated or truncated)
        if terminated or truncated or cut:
            obs = np.copy(obs)  # the reset may fill the same array again
        return obs, reward, terminated, truncated or cut, {"cut": True} if cut else {}


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """num_envs environments stepped together. SAME_STEP: the step that ends an episode already returns the
    first observation of the next one, and its own last observation in infos["final_obs"]."""
    script = os.getpid()

    def make(i: int) -> gym.Env:
        if os.getpid() != script and os.name == "posix":  # in a process of its own
            os.setpgrp()  # Ctrl-C and the signals of a scheduler go to a group; they are for the script alone
        env = make_env(args.env_id)
        return Staggered(env, i * (env.spec.max_episode_steps or 0) // args.num_envs)

    vector_env = AsyncVectorEnv if args.vectorization == "async" else SyncVectorEnv
    envs = vector_env([partial(make, i) for i in range(args.num_envs)], autoreset_mode=AutoresetMode.SAME_STEP)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


@torch.no_grad()
def evaluate(agent: Agent, env_id: str, num_episodes: int, seed: int, video_dir: Path | None = None) -> np.ndarray:
    """Raw returns [num_episodes] of the policy's mean action; agent and statistics stay as they are.

    A task without a time limit gets one of 10,000 steps. With video_dir the first episode is recorded there as an mp4.
    Raises FloatingPointError at the first NaN or infinity that the environment returns.
    """
    env = make_env(env_id, render_mode="rgb_array" if video_dir else None)
    if env.spec.max_episode_steps is None:  # nothing else might end an episode of a policy that never fails
        env = gym.wrappers.TimeLimit(env, 10_000)
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda i: i == 0, disable_logger=True)
    returns = np.zeros(num_episodes)
    for i in range(num_episodes):
        obs, _ = env.reset(seed=seed if i == 0 else None)
        done, finite = False, np.isfinite(obs).all()
        while finite and not done:
            obs = torch.as_tensor(obs, dtype=torch.float32, device=agent.actor_log_std.device)
            action = agent.distribution(obs[None]).mean[0].cpu().numpy().reshape(env.action_space.shape)
            obs, reward, terminated, truncated, _ = env.step(action.clip(env.action_space.low, env.action_space.high))
            returns[i] += reward
            done = terminated or truncated
            finite = np.isfinite(obs).all() and np.isfinite(reward)
        if not finite:
            raise FloatingPointError(f"the environment returned a NaN or an infinity in evaluation episode {i + 1}")
    env.close()
    return returns


def report_evaluation(agent: Agent, args: Args, run_dir: Path) -> None:
    """Evaluate with args and print what came out."""
    video_dir = run_dir / "videos" if args.capture_video else None
    returns = evaluate(agent, args.env_id, args.eval_episodes, args.seed + 10_000, video_dir)
    print(f"run directory: {run_dir}")
    print(f"evaluation: {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")
    if video_dir:
        print(f"video: {video_dir}")


# ---------------------------------------------------------------------------- runs and checkpoints


class Run:
    """The bookkeeping around `train`: run directory, log, progress bar, checkpoints, resume, stop signals.

    `parts` are what a checkpoint holds besides the counters: anything with state_dict and load_state_dict.
    """

    def __init__(self, args: Args, **parts):
        self.args, self.parts = args, parts
        self.global_step = self.iterations = self.stop_signal = 0
        self.recent_returns = deque(maxlen=100)
        self.run_dir = Path(args.resume or args.run_dir or free_run_dir(args))
        if args.resume:
            self.restore(load_checkpoint(args.resume))
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(plain(args), indent=2)
            (self.run_dir / "args.json").write_text(text + "\n")
            self.writer = SummaryWriter(str(self.run_dir), purge_step=self.global_step + 1)
            self.writer.add_text("args", f"```\n{text}\n```", self.global_step)  # here also those before a resume
        except OSError as error:
            raise RefusedError(f"run_dir: {self.run_dir} cannot be written ({error.strerror})") from error
        self.save()  # a run killed before its first checkpoint resumes too
        self.bar = tqdm(total=args.total_timesteps, initial=self.global_step, unit=" steps", dynamic_ncols=True)
        self.start_time, self.start_step = time.perf_counter(), self.global_step
        # A signal is answered between two iterations, so that the last checkpoint is the state of whole iterations.
        # Python takes handlers from the main thread only; in another one, signals are left to the program around it.
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.old_handlers = {s: signal.signal(s, self.stop) for s in signals}

    def stop(self, signal_number: int, frame) -> None:
        if self.stop_signal:  # asked twice: at once, with the last checkpoint
            sys.exit(128 + signal_number)
        self.stop_signal = signal_number

    def log(self, steps: int, episodes: list[tuple[int, float, int]], metrics: dict[str, float]) -> None:
        """Count one iteration, write its scalars, and save a checkpoint when one is due."""
        self.global_step += steps
        self.iterations += 1
        for name, value in metrics.items():
            if not np.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after the update at step {self.global_step}")
            self.writer.add_scalar(name, value, self.global_step)
        for step, episodic_return, length in episodes:
            self.writer.add_scalar("charts/episodic_return", episodic_return, step)
            self.writer.add_scalar("charts/episodic_length", length, step)
            self.recent_returns.append(episodic_return)
        speed = (self.global_step - self.start_step) / (time.perf_counter() - self.start_time)
        self.writer.add_scalar("charts/SPS", speed, self.global_step)
        if self.recent_returns:
            self.bar.set_postfix_str(f"return {np.mean(self.recent_returns):.1f}", refresh=False)
        self.bar.update(steps)
        if self.iterations % self.args.checkpoint_interval == 0:
            self.save()

    def save(self) -> None:
        self.writer.flush()  # what happened before a checkpoint must outlive a kill with it
        counters = {"global_step": self.global_step, "recent_returns": list(self.recent_returns)}
        save_checkpoint(self.run_dir, self.args, **counters, **self.parts)

    def restore(self, checkpoint: dict) -> None:
        self.global_step = checkpoint["global_step"]
        self.recent_returns.extend(checkpoint["recent_returns"])
        load_parts(checkpoint, **self.parts)
        torch.set_rng_state(checkpoint["torch_rng"])
        if torch.cuda.is_initialized() and len(checkpoint["cuda_rng"]):
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, error, *_) -> None:
        """Save the last checkpoint unless an error ended the run, and exit with the shell's status after a signal."""
        # A signal that goes to every process (Slurm, systemd) ends the environments' ones: a stop like any other.
        if self.stop_signal and error and issubclass(error, (EOFError, ConnectionError, KeyboardInterrupt)):
            error = None
        try:
            if error is None:
                self.save()
        finally:  # also where the disk is full
            self.bar.close()
            for signal_number, handler in self.old_handlers.items():
                signal.signal(signal_number, handler)
            self.writer.close()
        if self.recent_returns and error is None:
            recent = np.array(self.recent_returns)
            print(f"training: {recent.mean():.1f} ± {recent.std():.1f} over the last {len(recent)} episodes")
        if self.stop_signal and error is None:
            batch_size = self.args.num_envs * self.args.num_steps
            done = self.global_step + batch_size > self.args.total_timesteps  # the signal came in the last iteration
            print(f"stopped at step {self.global_step}; go on with --{'evaluate' if done else 'resume'} {self.run_dir}")
            sys.exit(128 + self.stop_signal)


def free_run_dir(args: Args) -> Path:
    """Makes runs/<env>__<script>__<seed>__<time>; a number follows where a run of the same second has that."""
    name = f"{args.env_id}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}".replace("/", "-").replace(":", "-")
    for number in itertools.count(1):
        run_dir = Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            run_dir.mkdir(parents=True)  # asked by trying, as two runs may ask at once
            return run_dir
        except OSError as error:
            if not os.path.exists(run_dir):
                raise RefusedError(f"run_dir: {run_dir} cannot be written ({error.strerror})") from error


def plain(args: Args) -> dict:
    """The arguments as plain values, for JSON and for checkpoints that load without running code."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}


def save_checkpoint(run_dir: Path, args: Args, global_step: int, recent_returns: list[float], **parts) -> None:
    """Write run_dir/checkpoint.pt whole or not at all: plain values, tensors and the parts' state_dicts."""
    checkpoint = {
        "script": SCRIPT,
        "args": plain(args),
        "global_step": global_step,
        "recent_returns": recent_returns,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else torch.empty(0),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    path = Path(run_dir) / "checkpoint.pt"
    buffer = io.BytesIO()  # by way of memory, as torch.save does not say why a disk refuses a file
    torch.save(checkpoint, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(run_dir: Path) -> dict:
    """The checkpoint in run_dir, without running code in it. Raises RefusedError where it is not this script's."""
    path = Path(run_dir) / "checkpoint.pt"
    given = f"resume or evaluate: {path}"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script, saved_names = checkpoint["script"], set(checkpoint["args"])
        if not {"global_step", "recent_returns", "agent", "optimizer", "torch_rng", "cuda_rng"} <= checkpoint.keys():
            raise ValueError("parts are missing")
        torch.Generator().set_state(checkpoint["torch_rng"])  # raises where that is none
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RefusedError(f"{given} does not exist, so {run_dir} is not the directory of a run") from error
    except PermissionError as error:
        raise RefusedError(f"{given} cannot be read ({error.strerror})") from error
    except Exception as error:
        raise RefusedError(f"{given} is damaged or not a checkpoint of these scripts, so it was not loaded") from error
    if script != SCRIPT:
        raise RefusedError(f"{given} was written by {script}.py, so only that script can load it")
    if saved_names != {field.name for field in fields(Args)}:
        raise RefusedError(f"{given} was written by another version of {SCRIPT}.py, whose arguments differ")
    return checkpoint


def load_parts(checkpoint: dict, **parts) -> None:
    """Put the checkpoint's states into these parts. Raises RefusedError where they do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except Exception as error:
        what = f"env_id: {checkpoint['args']['env_id']} or this script's Agent has changed since the run was saved"
        raise RefusedError(f"{what}, so that the saved parts do not fit") from error


def check_args(args: Args) -> None:
    """Raises RefusedError, in one sentence, for an argument that cannot work."""

    def check(name: str, ok: bool, right: str) -> None:
        if not ok:
            raise RefusedError(f"{name}: {getattr(args, name)} was given, but it must be {right}")

    for field in fields(args):  # the command line knows the types too, a caller in Python may not
        value, types = getattr(args, field.name), get_args(field.type) or (field.type,)
        if get_origin(field.type) is Literal:
            check(field.name, value in types, f"one of {', '.join(types)}")
        else:  # an int will do for a float and text for a path, but no subclass: not True for 1, and not np.float64,
            # with which no checkpoint could be loaded
            accepted = types + (int,) * (float in types) + (str, type(Path())) * (Path in types)
            names = " or ".join(t.__name__ for t in types)
            check(field.name, type(value) in accepted, f"of type {names}, not {type(value).__name__}")
        if field.name in LIMITS:
            low, high = LIMITS[field.name]
            check(field.name, low <= value <= high, f"between {low} and {high}")
        elif type(value) in (int, float):
            check(field.name, 0 < value < float("inf"), "positive and finite")
    batch = least = args.num_envs * args.num_steps
    check("num_steps", batch > 1, "at least 2 for one environment, as one sample has no variance")
    if args.resume or args.evaluate:
        checkpoint = load_checkpoint(args.resume or args.evaluate)
        least += checkpoint["global_step"] if args.resume else 0
        for name in FIXED:
            saved = checkpoint["args"][name]
            if getattr(args, name) != saved and not (args.evaluate and name == "seed"):  # which plays other episodes
                raise RefusedError(f"{name}: the run in {args.resume or args.evaluate} has {saved!r}, which stays")
    check("total_timesteps", args.total_timesteps >= least, f"at least {least} for one batch of {batch} more")
    check("num_minibatches", batch % args.num_minibatches == 0, f"a divisor of num_envs * num_steps = {batch}")
    check("device", args.device != "cuda" or torch.cuda.is_available(), "cpu or auto, as PyTorch finds no CUDA device")
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")  # what is compiled includes it
    check("compile", not args.compile or shutil.which(compiler), f"off, as there is no C++ compiler {compiler!r} here")
    check("compile", not args.compile or header.exists(), f"off, as Python's own headers are missing: {header}")
    taken = args.run_dir and (args.resume or args.evaluate or os.path.exists(Path(args.run_dir, "checkpoint.pt")))
    check("run_dir", not taken, "a new directory, and left out for --resume and --evaluate, which have the saved run's")
    if args.capture_video:
        writable = not args.evaluate or os.access(args.evaluate, os.W_OK)
        check("capture_video", writable, f"off, as {args.evaluate} cannot be written")
        check("capture_video", find_spec("moviepy"), "off, as the package moviepy is not installed")
        make_env(args.env_id, "rgb_array").close()


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as Args; with --resume or --evaluate the saved arguments are the defaults."""
    args = tyro.cli(Args, description=__doc__, args=argv)
    if args.resume and args.evaluate:
        raise RefusedError("resume: give --resume or --evaluate, not both")
    if args.resume or args.evaluate:
        saved = load_checkpoint(args.resume or args.evaluate)["args"]
        saved |= {"run_dir": None, "resume": None, "evaluate": None}
        if args.evaluate:  # on whatever machine, and without a video unless this command asks for one
            saved |= {"device": "auto", "num_threads": Args.num_threads, "compile": False, "capture_video": False}
        args = tyro.cli(Args, description=__doc__, args=argv, default=Args(**saved))
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line: train, resume or evaluate.

    Exits with 2 for a refusal, 1 for a NaN or a full disk, 128 + n for signal n.
    """
    try:
        args = parse_args(argv)
        if args.evaluate:
            check_args(args)
            env = make_env(args.env_id)
            torch.set_num_threads(args.num_threads)
            spaces = env.observation_space, env.action_space
            device = torch.device("cuda" if args.device == "cuda" else "cpu")
            agent = Agent(*spaces, args.hidden_size, args.init_log_std, args.normalize_observations).to(device)
            load_parts(load_checkpoint(args.evaluate), agent=agent)
            report_evaluation(agent, args, args.evaluate)
        else:
            train(args)
    except RefusedError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # not a full disk: the traceback says more
        print(f"{SCRIPT}: stopped: {error}; the last checkpoint is untouched", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # while it starts or evaluates: `Run` answers during training
        print(f"{SCRIPT}: stopped; what was saved is complete", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
