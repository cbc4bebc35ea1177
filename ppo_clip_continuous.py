# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.9.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "moviepy==2.2.1"]
# ///
"""Proximal policy optimization (PPO) with the clipped surrogate, for continuous actions.

PPO improves a stochastic policy by gradient ascent on a surrogate: the advantage of the actions taken, weighted by the
ratio of their probabilities under the new and the old policy. Far from the old policy the surrogate tells little, so
the ratio is clipped: once it has left 1 ± `clip_coef` in the direction that the action's advantage asks for, the action
gives no further gradient. That is a cheap stand-in for the trust region of TRPO.

`train` is algorithm 1 of the paper. Below it come one iteration, the mathematics, the networks, the environments, and
last the bookkeeping, which is not PPO. Equation numbers are those of Schulman et al. 2017, arXiv 1707.06347; GAE is
Schulman et al. 2016, arXiv 1506.02438.

    python ppo_clip_continuous.py --env-id Walker2d-v5 --seed 2
    python ppo_clip_continuous.py --resume RUN_DIR --total-timesteps 2000000
    python ppo_clip_continuous.py --evaluate RUN_DIR --capture-video

The group "beyond the paper" in `Args` holds what later work added. Three of its defaults are unusual: advantages are
estimated anew before every epoch, they are not normalised, and the learning rate falls where the policy moves too far;
docs/notes.md tells what each does. This command takes the whole group away, and steps one environment as in the paper:

    python ppo_clip_continuous.py --num-envs 1 --num-steps 2048 --init-log-std 0 --no-anneal-lr --max-grad-norm 1e9 \
        --no-recompute-advantages --no-normalize-observations --no-scale-rewards --no-adapt-lr

These have no flag, as the paper says nothing of them: orthogonal layers, the actor's last one close to 0; an ε of 1e-5
in Adam; actions that are clipped to their bounds on the way into the environment; time limits that end an episode
without counting as a termination; `Staggered` episodes.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, distributed, nn
from torch.distributions import Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "ppo_clip_continuous"
# Under torchrun this is process RANK of WORLD: each steps its share of the environments, all learn from all of them.
RANK, WORLD = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if distributed.is_torchelastic_launched() else (0, 1)


@dataclass
class Args:  # the comment behind a field is its help text, in brackets where the value or the idea comes from
    env_id: str = "HalfCheetah-v5"  # a Gymnasium task with continuous actions; `module:Task-v0` imports module first
    seed: int = 1  # of the networks, the actions and the environments
    total_timesteps: int = 1_000_000  # steps of all environments together, rounded down to whole iterations [sec. 6.1]
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks live; small ones are faster on the CPU
    num_threads: int = 1  # CPU threads of PyTorch, set by the command line; small networks are fastest with one
    compile: bool = False  # compile the gradient: slow first step, faster updates; needs a C++ compiler and Python.h

    # PPO
    num_envs: int = 8  # N: environments stepped side by side [sec. 5: N actors]
    num_steps: int = 256  # T: steps of each in one iteration; the batch is N * T [table 3: 2048 in all]
    num_epochs: int = 10  # K: passes over the batch in one iteration [table 3]
    num_minibatches: int = 32  # gradient steps per pass, a divisor of N * T [table 3: minibatches of 64]
    learning_rate: float = 3e-4  # step size of Adam [table 3]
    gamma: float = 0.99  # discount factor, in [0, 1] [table 3]
    gae_lambda: float = 0.95  # decay of the advantage estimator, in [0, 1] [table 3]
    clip_coef: float = 0.2  # ε of eq. 7: how far a ratio may move before its gradient stops [table 1]
    value_coef: float = 0.5  # c1 of eq. 9, weight of the value loss; acts through max_grad_norm [SB3]
    entropy_coef: float = 0.0  # c2 of eq. 9, weight of the entropy bonus [sec. 6.1]
    hidden_size: int = 64  # width of the two hidden layers of actor and critic [sec. 6.1]

    # beyond the paper
    init_log_std: float = -0.5  # log of the actions' std at the start: 0.61 [arXiv 2006.05990, sec. 3.2: about 0.5]
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 over the run [the paper's table 5, for Atari]
    max_grad_norm: float = 0.5  # scale a gradient of larger norm down to this [OpenAI Baselines]
    recompute_advantages: bool = True  # estimate them anew before every epoch [arXiv 2006.05990, sec. 3.5; usual: once]
    center_advantages: bool = False  # subtract the batch's mean from them [OpenAI Baselines; usual: per minibatch]
    normalize_advantages: bool = False  # divide them by the batch's std [OpenAI Baselines; usual: per minibatch]
    normalize_observations: bool = True  # by their running mean and std, limited to ±10 [arXiv 2006.05990, sec. 3.3]
    scale_rewards: bool = True  # learn from rewards over the running std of the discounted return [OpenAI Baselines]
    adapt_lr: bool = True  # lower the rate after an iteration beyond target_kl, raise it again [table 4]
    target_kl: float = 0.02  # mean KL in nats that an iteration is to reach, by its actions [table 1: 0.003 to 0.03]

    # the run
    run_dir: Path | None = None  # a directory without a saved run; by default runs/<env>__<script>__<seed>__<time>
    checkpoint_interval: int = 10  # iterations between checkpoints; one more at the end, on Ctrl-C and on SIGTERM
    resume: Path | None = None  # go on with this run, with its arguments except those given anew (lr follows the total)
    evaluate: Path | None = None  # only play the policy saved in this directory
    eval_episodes: int = 10  # episodes of the noise-free evaluation after training, or of --evaluate
    capture_video: bool = False  # record the first evaluation episode as an mp4 in the run directory's videos/


# ---------------------------------------------------------------------------- the algorithm
def train(args: Args) -> Path:
    """PPO, algorithm 1 of the paper: collect, estimate advantages, optimise the surrogate, repeat.

    Returns the run directory. Raises RefusedError, before any work, for arguments that cannot work, FloatingPointError
    for a NaN or an infinity, and SystemExit after Ctrl-C or SIGTERM. Checkpoints already written stay good.
    """
    check_args(args)
    torch.manual_seed(args.seed)
    with ExitStack() as opened:  # whatever ends this block, what was opened in it is closed
        envs = make_envs(args, opened)
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # fused: faster
        reward_scaler = RewardScaler(args.num_envs, args.gamma).to(args.device)
        run = Run(args, opened, agent=agent, optimizer=optimizer, reward_scaler=reward_scaler)
        obs, _ = envs.reset(seed=int(torch.randint(2**30, ())) + RANK * envs.num_envs)  # drawn: a resumed run's are new
        batch_size = args.num_envs * args.num_steps

        while run.global_step + batch_size <= args.total_timesteps and not run.stop_signal:
            # Run the policy π_old in N environments for T steps.
            rollout, obs, episodes = collect(envs, agent, obs, args.num_steps, run.global_step)
            if args.scale_rewards:
                rollout = rollout._replace(rewards=reward_scaler(rollout.rewards, rollout.dones))

            # Estimate the advantages of the actions taken.
            advantages, returns = estimate_advantages(agent, rollout, args)

            # Optimise the surrogate in K epochs of minibatches. Before each further one `update` re-estimates.
            progress = run.global_step / args.total_timesteps if args.anneal_lr else 0.0
            ceiling = args.learning_rate * (1.0 - progress)
            lr = optimizer.param_groups[0]["lr"] if args.adapt_lr else ceiling
            optimizer.param_groups[0]["lr"] = min(lr, ceiling)
            metrics = update(agent, optimizer, rollout, advantages, returns, args)

            # Adapt the learning rate to how far that has moved the policy.
            if args.adapt_lr:
                kl, lr = metrics["losses/approx_kl"], metrics["charts/learning_rate"]
                optimizer.param_groups[0]["lr"] = adapt_learning_rate(lr, kl, args.target_kl)

            # New statistics of observations change the policy a little, too: only now, between two iterations.
            if args.normalize_observations:
                agent.obs_stats.update(rollout.obs.flatten(0, 1))
            run.global_step += batch_size
            run.log(episodes, metrics)
        run.finish()
    return run.run_dir


# ---------------------------------------------------------------------------- one iteration
class Rollout(NamedTuple):
    """What one iteration has seen, each [num_steps, num_envs, ...]."""

    obs: Tensor
    actions: Tensor  # as sampled, before they are clipped to the environment's bounds
    rewards: Tensor
    next_obs: Tensor  # the true successor, also where an episode ended
    terminations: Tensor  # the episode ended in a state that nothing follows
    dones: Tensor  # the episode ended, terminated or truncated


@torch.no_grad()
def collect(
    envs: VectorEnv, agent: Agent, obs: np.ndarray, num_steps: int, global_step: int
) -> tuple[Rollout, np.ndarray, list[tuple[int, float, int]]]:
    """Run the policy for num_steps in each of envs (made by `make_envs`), from obs [num_envs, obs_size] on.

    Returns (rollout with raw rewards, the observations to go on from, the finished episodes as (global step, raw
    return, length)). Raises FloatingPointError where an environment returns a NaN or an infinity.
    """
    low = torch.as_tensor(envs.single_action_space.low.flatten())
    high = torch.as_tensor(envs.single_action_space.high.flatten())
    device = agent.actor_log_std.device
    steps = []
    episodes = []
    if WORLD > 1:  # each process draws its own actions
        torch.manual_seed(int(torch.randint(2**62, ())) + RANK)
    for _ in range(num_steps):
        check_finite("an observation", obs, global_step)
        action = agent.distribution(torch.from_numpy(obs).to(device)).sample().cpu()
        # The environment gets the action within its bounds. The rollout keeps it as sampled, for its log-probability.
        bounded_action = action.clamp(low, high).reshape(envs.action_space.shape)
        next_obs, reward, terminated, truncated, infos = envs.step(bounded_action.numpy())
        done = terminated | truncated
        successor = next_obs
        if done.any():  # these environments have already begun their next episode: next_obs is its first observation
            successor = next_obs.copy()
            successor[done] = np.stack(infos["final_obs"][done])
            episodes += finished_episodes(infos, done, global_step + RANK * envs.num_envs)
        global_step += WORLD * envs.num_envs
        check_finite("a reward", reward, global_step)
        check_finite("an observation", successor, global_step)
        steps.append((obs, action.numpy(), reward.astype(np.float32), successor, terminated, done))
        obs = next_obs

    # From a list of steps to one tensor for each field of the rollout.
    fields = [np.stack(field) for field in zip(*steps)]
    if WORLD > 1:
        fields = gather(fields)
    rollout = Rollout(*(torch.as_tensor(field, device=device) for field in fields))
    return rollout, obs, episodes


@torch.no_grad()
def estimate_advantages(agent: Agent, rollout: Rollout, args: Args) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of the rollout by the current critic, each [num_steps * num_envs]."""
    values = agent.value(rollout.obs)
    # Step t led to where step t + 1 began, except at the end of the rollout and where an episode ended.
    next_values = torch.cat([values[1:], agent.value(rollout.next_obs[-1:])])
    next_values[rollout.dones] = agent.value(rollout.next_obs[rollout.dones])
    advantages, returns = compute_gae(
        rollout.rewards, values, next_values, rollout.terminations, rollout.dones, args.gamma, args.gae_lambda
    )
    mean, std = advantages.mean(), advantages.std(correction=0)
    if args.center_advantages:
        advantages = advantages - mean
    if args.normalize_advantages:
        advantages = advantages / (std + 1e-8)
    return advantages.flatten(), returns.flatten()


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, advantages: Tensor, returns: Tensor, args: Args
) -> dict[str, float]:
    """num_epochs passes of minibatch gradient steps on eq. 9, with advantages and returns [num_steps * num_envs].

    Returns the scalars for the log. They describe the whole batch, after the last step where nothing else is said.
    """
    obs = rollout.obs.flatten(0, 1)  # [num_steps * num_envs, obs_size]
    actions = rollout.actions.flatten(0, 1)
    with torch.no_grad():
        old_log_probs = agent.distribution(obs).log_prob(actions)  # of π_old, which the agent still is
        explained_variance = 1.0 - (returns - agent.value(obs)).var() / (returns.var() + 1e-8)
    gradient = compiled(compute_gradient) if args.compile else compute_gradient

    for epoch in range(args.num_epochs):
        if epoch > 0 and args.recompute_advantages:  # because the critic has learned in the meantime
            advantages, returns = estimate_advantages(agent, rollout, args)
        order = torch.randperm(len(obs), device=obs.device)
        batch = (obs, actions, old_log_probs, advantages, returns)
        for minibatch in zip(*(x[order].chunk(args.num_minibatches) for x in batch)):
            optimizer.zero_grad()
            gradient(agent, *minibatch, args)
            optimizer.step()

    with torch.no_grad():
        distribution = agent.distribution(obs)
        ratio = (distribution.log_prob(actions) - old_log_probs).exp()
        metrics = {
            "losses/policy_loss": -clipped_surrogate(ratio, advantages, args.clip_coef).mean(),
            "losses/value_loss": ((agent.value(obs) - returns) ** 2).mean(),
            "losses/entropy": distribution.entropy().mean(),
            "losses/approx_kl": approximate_kl(agent, obs, actions, old_log_probs),
            "losses/clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
            "losses/explained_variance": explained_variance,  # before the first step
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
    return {name: float(value) for name, value in metrics.items()}


def compute_gradient(
    agent: Agent, obs: Tensor, actions: Tensor, old_log_probs: Tensor, advantages: Tensor, returns: Tensor, args: Args
) -> None:
    """Put the gradient of -L^{CLIP+VF+S} (eq. 9) over one minibatch into the parameters' `.grad`, its norm clipped.

    obs [batch, obs_size], actions [batch, action_size], the others [batch].
    """
    distribution = agent.distribution(obs)
    ratio = (distribution.log_prob(actions) - old_log_probs).exp()  # r_t(θ), eq. 6
    objective = clipped_surrogate(ratio, advantages, args.clip_coef).mean()  # L^CLIP, eq. 7
    value_loss = ((agent.value(obs) - returns) ** 2).mean()  # L^VF
    loss = -objective + args.value_coef * value_loss
    if args.entropy_coef > 0.0:
        loss = loss - args.entropy_coef * distribution.entropy().mean()  # S
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)


# ---------------------------------------------------------------------------- mathematics
def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminations: Tensor, dones: Tensor,
    gamma: float, gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalized advantage estimation (GAE paper, eq. 16; PPO paper, eq. 11 and 12).

    All tensors are [num_steps, num_envs]. `values[t]` is V of the state in which step t was taken, `next_values[t]` V
    of the one that it really led to. Of three steps s0 → s1 → s2 | u0 → u1, where the second ended an episode in s2 and
    the third began the next one in u0:

        values      = [V(s0), V(s1), V(u0)]
        next_values = [V(s1), V(s2), V(u1)]     # V(s2), not V(u0)
        dones       = [False, True,  False]     # dones[t] belongs to step t; some codes shift it by one

    `terminations` says that nothing follows the state, and stops the bootstrap; `dones`, that the episode was
    terminated or truncated there, and stops the sum over later steps. Returns (advantages, returns), with returns =
    advantages + values the targets of the critic.
    """
    deltas = rewards + gamma * next_values.masked_fill(terminations.bool(), 0.0) - values  # PPO eq. 12
    decays = gamma * gae_lambda * (1.0 - dones.to(values.dtype))
    advantage = torch.zeros_like(values[0])
    advantages = []
    for delta, decay in zip(deltas.flip(0), decays.flip(0)):  # from the last step to the first
        advantage = delta + decay * advantage  # PPO eq. 11
        advantages.append(advantage)
    advantages = torch.stack(advantages).flip(0)
    return advantages, advantages + values


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """L^CLIP of each sample (eq. 7), to be maximised; ratio = π(a|s) / π_old(a|s), all [batch].

    The minimum makes this a pessimistic bound: moving an action's probability further as its advantage asks for stops
    paying off at 1 ± ε, but a ratio that has gone the wrong way is always pulled back.
    """
    return torch.min(ratio * advantages, ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef) * advantages)


@torch.no_grad()
def approximate_kl(agent: Agent, obs: Tensor, actions: Tensor, old_log_probs: Tensor) -> Tensor:
    """KL(π_old ‖ π), in nats, estimated from actions of π_old: the mean of r - 1 - log r, which is never negative.

    Estimator k3 of http://joschu.net/blog/kl-approx.html. It is unbiased for fresh actions. Here π was fitted to these
    very actions, so where it is far above the true KL, π overfits them.
    """
    log_ratio = agent.distribution(obs).log_prob(actions) - old_log_probs
    return (log_ratio.exp() - 1.0 - log_ratio).mean()


def adapt_learning_rate(learning_rate: float, kl: float, target_kl: float) -> float:
    """Adam's step size for the next iteration, from the mean KL that this one has moved the policy by.

    Too far, kl > 1.5 target_kl: it is divided by 1.5; too little, kl < target_kl / 1.5: multiplied by it. The paper
    adjusted it to a target KL for its humanoids (table 4), without saying how: the thresholds are those of the penalty
    (sec. 4), the factor is that of ACKTR in OpenAI Baselines. Below 1e-5 nothing would be learned any more.
    """
    if kl > 1.5 * target_kl:
        learning_rate = learning_rate / 1.5
    elif kl < target_kl / 1.5:
        learning_rate = learning_rate * 1.5
    return max(learning_rate, 1e-5)


# ---------------------------------------------------------------------------- networks and running statistics
class Agent(nn.Module):
    """Actor and critic without shared parameters (sec. 6.1), and the statistics of what they observe.

    Takes the single environment's spaces: a flat Box of observations, a Box of actions of any shape.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args | None = None):
        super().__init__()
        args = args or Args()
        obs_size = gym.spaces.flatdim(observation_space)
        action_size = gym.spaces.flatdim(action_space)
        # A last actor layer close to 0 starts with the same wide distribution everywhere (arXiv 2006.05990).
        self.actor_mean = mlp([obs_size, args.hidden_size, args.hidden_size, action_size], last_gain=0.01)
        self.actor_log_std = nn.Parameter(torch.full((action_size,), float(args.init_log_std)))
        self.critic = mlp([obs_size, args.hidden_size, args.hidden_size, 1], last_gain=1.0)
        self.obs_stats = RunningMeanStd((obs_size,))  # mean 0 and std 1 unless `train` updates it
        self.obs_limit = 10.0 if args.normalize_observations else torch.inf

    def normalize(self, obs: Tensor) -> Tensor:
        """obs [..., obs_size] in standard deviations from the mean, within ± the limit, in the networks' precision."""
        return self.obs_stats.normalize(obs).clamp_(-self.obs_limit, self.obs_limit).to(self.actor_log_std.dtype)

    def distribution(self, obs: Tensor) -> Distribution:
        """π(·|obs): a Gaussian over one action [action_size] for each row of obs [batch, obs_size]."""
        mean = self.actor_mean(self.normalize(obs))
        # Without PyTorch's checks of the arguments, which cost more than the arithmetic.
        return Independent(Normal(mean, self.actor_log_std.exp(), validate_args=False), 1, validate_args=False)

    def value(self, obs: Tensor) -> Tensor:
        """V(obs), [...], in units of scaled reward, for obs [..., obs_size]."""
        return self.critic(self.normalize(obs)).squeeze(-1)


def mlp(sizes: list[int], last_gain: float) -> nn.Sequential:
    """Layers of these sizes with tanh between them, orthogonal weights and biases of 0."""
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    nn.init.orthogonal_(linear.weight, last_gain)  # the last layer has a gain of its own, and no tanh behind it
    return nn.Sequential(*layers[:-1])


class RunningMeanStd(nn.Module):
    """Mean and variance of all the data seen so far, in buffers, so that a checkpoint carries them."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("inverse_std", torch.ones(shape, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in x, [batch, *shape]; exact however the data is batched (Chan et al. 1979)."""
        x = x.double()
        mean, var, count = x.mean(0), x.var(0, correction=0), len(x)
        delta, total = mean - self.mean, self.count + count
        self.var.copy_((self.var * self.count + var * count + delta**2 * self.count * count / total) / total)
        self.mean.add_(delta * count / total)
        self.count.copy_(total)
        self.inverse_std.copy_(torch.rsqrt(self.var + 1e-8))

    def normalize(self, x: Tensor) -> Tensor:
        """x [..., *shape] in standard deviations from the mean, in float64: a signal on a large offset survives."""
        return (x - self.mean).mul_(self.inverse_std)


class RewardScaler(nn.Module):
    """Divides rewards by the std of the discounted sum of an episode's past rewards (after OpenAI Baselines)."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.stats = RunningMeanStd()
        self.register_buffer("discounted_sums", torch.zeros(num_envs), persistent=False)  # of episodes under way

    @torch.no_grad()
    def forward(self, rewards: Tensor, dones: Tensor) -> Tensor:
        """The scaled rewards, for rewards and dones [num_steps, num_envs], which enter the statistics first."""
        sums = []
        for reward, done in zip(rewards, dones):
            self.discounted_sums.mul_(self.gamma).add_(reward)
            sums.append(self.discounted_sums.clone())
            self.discounted_sums[done] = 0.0
        self.stats.update(torch.cat(sums))
        # Where the sum hardly varies, as under a constant reward, the std is rounding: take 1e-4 of the mean instead.
        std = torch.maximum(self.stats.var.sqrt(), 1e-4 * self.stats.mean.abs())
        return rewards * (1.0 / std).to(rewards.dtype) if std > 0.0 else rewards


# ---------------------------------------------------------------------------- environments and evaluation
def make_envs(args: Args, opened: ExitStack) -> VectorEnv:
    """This process's share of num_envs environments, stepped one after the other; `opened` closes them. SAME_STEP: the
    step that ends an episode returns the next one's first observation, and its own last one in infos["final_obs"]."""

    def make(i: int) -> gym.Env:
        env = make_env(args.env_id, opened)
        return Staggered(env, i * (env.spec.max_episode_steps or 0) // args.num_envs)

    share = args.num_envs // WORLD
    makers = [functools.partial(make, i) for i in range(RANK * share, (RANK + 1) * share)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


class Staggered(gym.Wrapper):
    """Cuts one episode short, the one under way after `steps_until_cut` steps (0: none). Where an episode ends, says in
    its info whether it was cut, and its raw return and length.

    Where no episode ends before its time limit (HalfCheetah), the environments would otherwise go through their
    episodes in step, and every batch would hold a single phase of them.
    """

    def __init__(self, env: gym.Env, steps_until_cut: int):
        super().__init__(env)
        self.steps_until_cut = steps_until_cut

    # The task's own infos are left out: training reads none, and merging them at every step would be slow.
    def reset(self, **kwargs):
        self.episode_return, self.length = 0.0, 0
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.episode_return += float(reward)
        self.length += 1
        self.steps_until_cut -= 1
        ended = terminated or truncated
        cut_short = self.steps_until_cut == 0 and not ended
        if not (ended or cut_short):
            return obs, reward, False, False, {}
        # Copied, as the reset that follows at once may fill the same array again.
        info = {"cut_short": cut_short, "return": self.episode_return, "length": self.length}
        return np.copy(obs), reward, terminated, truncated or cut_short, info


def finished_episodes(infos: dict, done: np.ndarray, global_step: int) -> list[tuple[int, float, int]]:
    """(global step, raw return, length) of the episodes that ended in this vector step, done [num_envs], uncut."""
    episodes = []
    ended = infos["final_info"]
    for i in np.flatnonzero(done & ~ended["cut_short"]):
        step = int(global_step + 1 + i)  # each its own, as TensorBoard shows one value a step
        episodes.append((step, float(ended["return"][i]), int(ended["length"][i])))
    return episodes


def make_env(env_id: str, opened: ExitStack, video_dir: Path | None = None) -> gym.Env:
    """The environment with observations flattened to a vector, which `opened` closes; with video_dir the first episode
    is recorded there. Raises RefusedError where it cannot be made or does not fit."""
    if video_dir and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a display; MuJoCo reads it when it is imported
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if video_dir else {}))
        opened.callback(lambda: env.close())  # of the outermost wrapper that it has by then
        if video_dir:
            env.reset()
            model = getattr(env.unwrapped, "model", None)
            if "track" in [model.camera(i).name for i in range(getattr(model, "ncam", 0))]:
                # Gymnasium takes a camera that stands still, and HalfCheetah runs out of its picture.
                env.unwrapped.mujoco_renderer.camera_id = model.camera("track").id
            env.render()
            env = gym.wrappers.RecordVideo(env, str(video_dir), lambda episode: episode == 0, disable_logger=True)
    except Exception as error:  # an environment is other people's code
        what = "filmed" if video_dir else "made"
        raise RefusedError(f"env_id: {env_id!r} cannot be {what} ({error!r})") from error
    if not (isinstance(env.action_space, gym.spaces.Box) and np.issubdtype(env.action_space.dtype, np.floating)):
        raise RefusedError(f"env_id: {env_id} has the actions {env.action_space}, but a Box of floats is needed")
    if not env.observation_space.is_np_flattenable:
        raise RefusedError(f"env_id: {env_id} has observations of no fixed size, but a vector is needed")
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        env = gym.wrappers.FlattenObservation(env)
    return env


@torch.no_grad()
def evaluate(args: Args, run_dir: Path) -> np.ndarray:
    """Raw returns [eval_episodes] of the policy that is saved in run_dir, with its mean actions, on the CPU.

    Raises RefusedError where there is none that fits, FloatingPointError for a NaN or an infinity.
    """
    returns = np.zeros(args.eval_episodes)
    with ExitStack() as opened:
        env = make_env(args.env_id, opened, run_dir / "videos" if args.capture_video else None)
        agent = Agent(env.observation_space, env.action_space, args)
        load_checkpoint(run_dir, agent=agent)
        for episode in range(args.eval_episodes):
            obs, _ = env.reset(seed=args.seed + 10_000 if episode == 0 else None)
            for step in itertools.count(1):
                check_finite("an observation", obs, f"{step - 1} of evaluation episode {episode + 1}")
                action = agent.distribution(torch.as_tensor(obs)[None]).mean[0].numpy().reshape(env.action_space.shape)
                action = action.clip(env.action_space.low, env.action_space.high)
                obs, reward, terminated, truncated, _ = env.step(action)
                check_finite("a reward", reward, f"{step} of evaluation episode {episode + 1}")
                returns[episode] += reward
                if terminated or truncated:
                    break
                if step == 10_000 and env.spec.max_episode_steps is None:  # nothing else might end it
                    print(f"evaluation episode {episode + 1} was cut at 10,000 steps, as the task has no time limit")
                    break
    return returns


def check_finite(what: str, values: np.ndarray, step: int | str) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError(f"the environment returned {what} that is NaN or infinite at step {step}")


# ---------------------------------------------------------------------------- bookkeeping, from here to the end
class Run:
    """Run directory, log, progress bar, checkpoints, stop signals. `parts` are what a checkpoint holds besides counters
    and random state: whatever has a state_dict. With --resume they are loaded here. `opened` gives it all back."""

    def __init__(self, args: Args, opened: ExitStack, **parts):
        self.args = args
        self.parts = parts
        self.global_step = 0
        self.recent_returns = deque(maxlen=100)
        self.own_signal = self.stop_signal = 0  # the one that reached this process, and the one that counts for all
        if WORLD > 1:  # now that all have accepted the arguments, the first process may write, and it alone
            distributed.init_process_group()
            opened.callback(distributed.destroy_process_group)
        if args.resume:
            checkpoint = load_checkpoint(args.resume, **parts)
            self.global_step = checkpoint["global_step"]
            self.recent_returns.extend(checkpoint["recent_returns"])
            torch.set_rng_state(checkpoint["torch_rng"])
            if torch.cuda.is_initialized() and len(checkpoint["cuda_rng"]):
                torch.cuda.set_rng_state(checkpoint["cuda_rng"])
            time.sleep(1.01 - time.time() % 1.0)  # event files are read in the order of the seconds in their names
        if threading.current_thread() is threading.main_thread():  # Python takes signal handlers from no other
            for number in (signal.SIGINT, signal.SIGTERM):
                opened.callback(signal.signal, number, signal.signal(number, self.stop))
        if RANK > 0:
            return
        self.run_dir = make_run_dir(args)
        self.writer = opened.enter_context(SummaryWriter(str(self.run_dir), purge_step=self.global_step + 1))
        self.writer.add_text("args", f"```\n{(self.run_dir / 'args.json').read_text()}```", self.global_step)
        self.save()  # a run that is killed before its next checkpoint resumes too
        bar = tqdm(total=args.total_timesteps, initial=self.global_step, unit=" steps", dynamic_ncols=True)
        self.bar = opened.enter_context(bar)
        self.start = (time.perf_counter(), self.global_step)

    def stop(self, number: int, frame) -> None:
        if self.own_signal and WORLD == 1:  # asked twice: at once, with the last checkpoint; torchrun always does
            sys.exit(128 + number)
        self.own_signal = number  # asked once: after this iteration, so that checkpoints hold whole ones
        if WORLD == 1:
            self.stop_signal = number

    def log(self, episodes: list[tuple[int, float, int]], metrics: dict[str, float]) -> None:
        """Write what one iteration brought, move the bar, and save a checkpoint when one is due."""
        if WORLD > 1:
            episodes = self.agree(episodes)
        if RANK > 0:
            return
        start_time, start_step = self.start
        metrics["charts/SPS"] = (self.global_step - start_step) / (time.perf_counter() - start_time)
        for name, value in metrics.items():
            if not np.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after the update at step {self.global_step}")
            self.writer.add_scalar(name, value, self.global_step)
        for step, episodic_return, length in episodes:
            self.writer.add_scalar("charts/episodic_return", episodic_return, step)
            self.writer.add_scalar("charts/episodic_length", length, step)
            self.recent_returns.append(episodic_return)
        if self.recent_returns:
            self.bar.set_postfix_str(f"return {np.mean(self.recent_returns):.1f}", refresh=False)
        self.bar.update(self.global_step - self.bar.n)
        if self.global_step // (self.args.num_envs * self.args.num_steps) % self.args.checkpoint_interval == 0:
            self.save()

    def agree(self, episodes: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
        """The episodes of all processes, which go on with the parameters of the first, as unlike processors round
        differently, and stop where one is asked to."""
        agent = self.parts["agent"]
        state = {name: x.cpu() for name, x in agent.state_dict().items()} if RANK == 0 else None
        shares, signals, states = zip(*exchange((episodes, self.own_signal, state)))
        agent.load_state_dict(states[0])
        self.stop_signal = max(signals)
        return sorted(sum(shares, []))

    def save(self) -> None:
        self.writer.flush()  # what happened before a checkpoint must outlive a kill with it
        save_checkpoint(self.run_dir, self.args, self.global_step, list(self.recent_returns), **self.parts)

    def finish(self) -> None:
        """Save the last checkpoint and sum up; after a stop signal, exit with the status that shells give to it."""
        if RANK > 0:
            sys.exit()
        self.save()
        self.bar.close()
        if self.recent_returns:
            mean, std = np.mean(self.recent_returns), np.std(self.recent_returns)
            print(f"training: {mean:.1f} ± {std:.1f} over the last {len(self.recent_returns)} episodes")
        if self.stop_signal:
            print(f"stopped at step {self.global_step}; go on with --resume {self.run_dir}, or try it with --evaluate")
            sys.exit(128 + self.stop_signal)


def gather(fields: list[np.ndarray]) -> list[np.ndarray]:
    """The rollouts of all processes side by side, so that all learn from the whole batch, with one random state."""
    shares = exchange(fields)
    torch.manual_seed(torch.initial_seed() - RANK + WORLD)  # the number that `collect` drew, but nobody's own
    return [np.concatenate(field, axis=1) for field in zip(*shares)]


def exchange(share) -> list:
    """The shares of all processes, in the order of their ranks; every process has to ask."""
    shares = [share] * WORLD
    if WORLD > 1:
        try:
            distributed.all_gather_object(shares, share)
        except RuntimeError:  # another process has ended, and said why
            sys.exit(1)
    return shares


def make_run_dir(args: Args) -> Path:
    """Makes the run's directory with args.json in it. Raises RefusedError where that cannot be."""
    name = f"{args.env_id}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}".replace("/", "-").replace(":", "-")
    given = args.resume or args.run_dir
    run_dir = Path(given or Path("runs", name))
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_dir.mkdir(exist_ok=bool(given))
        except FileExistsError:
            if given:
                raise
            run_dir = Path(tempfile.mkdtemp(prefix=f"{name}-", dir="runs"))  # another run of this second has that name
        (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    except OSError as error:
        raise RefusedError(f"run_dir: {run_dir} cannot be written ({error.strerror})") from error
    return run_dir


def save_checkpoint(run_dir: Path, args: Args, global_step: int, recent_returns: list[float], **parts) -> None:
    """Write run_dir/checkpoint.pt whole or not at all: plain values, tensors, and the parts' state_dicts."""
    checkpoint = {
        "script": SCRIPT,
        "args": json.loads(json.dumps(vars(args), default=str)),  # plain values, which load without running code
        "global_step": global_step,
        "recent_returns": recent_returns,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else torch.empty(0),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    torch.save(checkpoint, Path(run_dir, "checkpoint.tmp"))
    os.replace(Path(run_dir, "checkpoint.tmp"), Path(run_dir, "checkpoint.pt"))


def load_checkpoint(run_dir: Path, **parts) -> dict:
    """The checkpoint in run_dir, without running code in it; its states are put into `parts`.

    Raises RefusedError where there is none, or none that this script can use.
    """
    try:
        checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"{checkpoint['script']}.py wrote it")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint
    except Exception as error:
        raise RefusedError(f"{run_dir} holds no checkpoint that {SCRIPT}.py can use ({error!r})") from error


class RefusedError(ValueError):
    """An argument that cannot work, found before any work was done."""


def check_args(args: Args) -> None:
    """Raises RefusedError, in one sentence, for an argument that cannot work; tyro has seen to the types."""

    def check(name: str, ok: bool, right: str) -> None:
        if not ok:
            raise RefusedError(f"{name}: {getattr(args, name)} was given, but it must be {right}")

    for name, value in vars(args).items():
        if name in ("gamma", "gae_lambda"):
            check(name, 0 <= value <= 1, "between 0 and 1")
        elif name in ("seed", "value_coef", "entropy_coef"):
            check(name, 0 <= value <= 2**62, "0 or more, up to 2**62")
        elif name == "init_log_std":
            check(name, -10 <= value <= 10, "between -10 and 10")
        elif type(value) in (int, float):
            check(name, 0 < value < np.inf, "positive and finite")
    batch_size = args.num_envs * args.num_steps
    check("num_steps", batch_size > 1, "at least 2 for one environment, as one sample has no variance")
    check("num_envs", args.num_envs % WORLD == 0, f"a multiple of {WORLD}, the number of processes")
    check("evaluate", not args.evaluate or WORLD == 1, "left out under torchrun: one process plays it")
    check("num_minibatches", batch_size % args.num_minibatches == 0, f"a divisor of num_envs * num_steps, {batch_size}")
    check("device", args.device != "cuda" or torch.cuda.is_available(), "cpu, as PyTorch finds no CUDA device")
    steps_so_far = 0
    if args.resume or args.evaluate:
        check("resume", not (args.resume and args.evaluate), "left out beside --evaluate")
        check("run_dir", not args.run_dir, "left out beside --resume and --evaluate")
        saved = load_checkpoint(args.resume or args.evaluate)
        check("env_id", args.env_id == saved["args"]["env_id"], f"{saved['args']['env_id']}, as in the saved run")
        steps_so_far = saved["global_step"] if args.resume else 0
    elif args.run_dir:
        check("run_dir", not Path(args.run_dir, "checkpoint.pt").exists(), "a directory without a saved run")
    least = steps_so_far + batch_size
    check("total_timesteps", args.total_timesteps >= least, f"at least {least}, for one more batch of {batch_size}")
    if args.capture_video and not args.evaluate:  # what it needs is missed now rather than after the training
        with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
            make_env(args.env_id, opened, Path(folder, "videos"))


@functools.cache
def compiled(function):
    """The function compiled as a whole, with the backward pass in it; once, however often it is asked for."""
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function)


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as Args. With --resume or --evaluate the saved arguments are the defaults."""
    args = tyro.cli(Args, description=__doc__, args=argv)
    if args.resume or args.evaluate:
        saved = load_checkpoint(args.resume or args.evaluate)["args"] | {"run_dir": None, "resume": None}
        if args.evaluate:  # perhaps on another machine, and without a video unless this command asks for one
            saved |= {"device": Args.device, "num_threads": Args.num_threads, "capture_video": False}
        known = {name: value for name, value in saved.items() if name in vars(args)}  # Args may have changed since
        args = tyro.cli(Args, description=__doc__, args=argv, default=Args(**known))
    return args


def main(argv: list[str] | None = None) -> None:
    """Train or resume, then evaluate; or only that. Exits with 2 for a refusal, 1 for a NaN, 128 + n for signal n."""
    try:
        args = parse_args(argv)
        torch.set_num_threads(args.num_threads)
        if WORLD > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if args.evaluate:
            check_args(args)
        run_dir = args.evaluate or train(args)
        returns = evaluate(args, run_dir)
        print(f"run directory: {run_dir}")
        print(f"evaluation: {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")
        if args.capture_video:
            print(f"video: {run_dir / 'videos'}")
    except RefusedError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"{SCRIPT}: stopped: {error}; the last checkpoint is untouched")
    except KeyboardInterrupt:  # while it starts or evaluates: `Run` answers during training
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__" and "ipykernel" not in sys.modules:  # pasted into a notebook, it only defines its names
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that open environments are closed
    main()
