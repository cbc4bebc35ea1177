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
"""Proximal policy optimization (PPO) with the clipped surrogate, for Atari games, from pixels.

PPO improves a stochastic policy by gradient ascent on a surrogate: the advantage of the actions taken,
weighted by the ratio of their probabilities under the new and the old policy. Far from the old policy
the surrogate means nothing, so the ratio is clipped; `ppo_clip_continuous.py` tells the story. Here actor
and critic share a convolutional network, the actions are the buttons of a joystick, and observations
stay bytes until they reach the network.

Paper: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347; equation numbers
below are its own. GAE is Schulman et al. 2016, arXiv 1506.02438, the network that of Mnih et al. 2015.
The games follow the literature's protocol: every fourth frame, the pixelwise maximum of the last two, 84
x 84 in grey, four of them stacked, up to 30 idle frames at the start, FIRE pressed once at the start of a
game that has it (not after a lost life, as OpenAI Baselines and CleanRL do), at most 108,000 frames. A
lost life ends the learning episode, the game goes on. Rewards are learned from by their sign. Reported
returns are raw scores of full games.

Where this file departs from the paper, each a field of `Args` with its source or reason: 4 epochs, value
weight 0.25 (CleanRL's 0.5 on half the square), a clip range that stays, the gradient's norm clipped,
advantages normalised (all as CleanRL, which normalises each minibatch instead of the batch). The network
is larger than that of 2016 which the paper cites, as in CleanRL and Baselines.

    python ppo_atari.py --env-id ALE/Pong-v5 --total-timesteps 3000000
    python ppo_atari.py --resume RUN_DIR --total-timesteps 20000000
    python ppo_atari.py --evaluate RUN_DIR --capture-video
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
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

# PyTorch reads it at import: its idle threads go to sleep after microseconds, not milliseconds, and leave the cores to
# the emulators' threads.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Categorical, Distribution
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for every game


@dataclass
class Args:
    env_id: str = "ALE/Breakout-v5"
    """Any game of ale-py by its Gymnasium id."""
    seed: int = 1
    """Seed of the networks, the actions and the environments."""
    total_timesteps: int = 10_000_000
    """Environment steps of the whole run, of 4 frames each, all environments together, those before a resume included;
    rounded down to whole iterations. [paper, app. B: 40M frames]"""
    num_envs: int = 8
    """Environments stepped side by side. [paper, table 5]"""
    num_steps: int = 128
    """Steps of each environment in one iteration; the batch is num_envs * num_steps. [paper, table 5]"""
    repeat_action_probability: float = 0.0
    """Sticky actions: how likely the emulator repeats the last action instead of taking the new one, in training and
    evaluation. [Machado et al. 2018: 0.25; earlier papers: 0]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network lives; auto is the GPU where there is one."""
    num_threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """CPU threads of PyTorch and of the emulators; by default one for each core that this process may use;
    a resumed run keeps its number."""
    bfloat16: bool = torch.backends.mkldnn.is_available() and any(
        torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )
    """The shared layers in bfloat16: about twice as fast where the processor has instructions for it, and by default
    only there, whatever the device; elsewhere it is emulated, and slower than float32."""
    compile: bool = False
    """Compile the gradient with torch.compile: some seconds at the start, then faster updates; needs a C++ compiler and
    Python's header files."""

    learning_rate: float = 2.5e-4
    """Step size of Adam at the start. [paper, table 5; Adam's ε, 1e-5: OpenAI Baselines, CleanRL]"""
    anneal_lr: bool = True
    """Let the learning rate fall linearly to 0 over the run. [paper, table 5]"""
    num_epochs: int = 4
    """Passes over the batch in one iteration. [OpenAI Baselines, CleanRL; paper, table 5: 3]"""
    num_minibatches: int = 4
    """Gradient steps per pass, a divisor of num_envs * num_steps. [paper, table 5: minibatches of 32 * 8 samples]"""
    gamma: float = 0.99
    """Discount factor, in [0, 1]. [paper, table 5]"""
    gae_lambda: float = 0.95
    """Decay of the advantage estimator, in [0, 1]. [paper, table 5]"""
    clip_coef: float = 0.1
    """Epsilon of eq. 7: how far the probability ratio may move before its gradient stops.
    [paper, table 5, where it falls to 0 with the learning rate; constant: CleanRL]"""
    value_coef: float = 0.25
    """c1 of eq. 9, the weight of the value loss. [CleanRL: 0.5 on half the square; paper, table 5: 1]"""
    entropy_coef: float = 0.01
    """c2 of eq. 9, the weight of the entropy bonus. [paper, table 5]"""
    value_clip: float | None = None
    """Clip the change of a value per iteration to this, in units of the rewards' signs; None: not.
    [OpenAI Baselines; arXiv 2006.05990: no gain]"""
    max_grad_norm: float = 0.5
    """Scale a gradient of larger norm, over all parameters, down to this. [OpenAI Baselines]"""
    target_kl: float | None = None
    """Leave the iteration after an epoch that has moved the policy beyond this estimated mean KL, in nats; None: never.
    [Spinning Up]"""
    recompute_advantages: bool = False
    """Estimate the advantages anew with the current critic before every epoch: a pass over the batch each.
    [arXiv 2006.05990, sec. 3.5; CleanRL: not]"""
    center_advantages: bool = True
    """Subtract the batch's mean from the advantages: what a critic that lags adds to all actions alike says nothing
    about any of them. [OpenAI Baselines]"""
    normalize_advantages: bool = True
    """Divide the batch's advantages by their standard deviation. [OpenAI Baselines]"""

    run_dir: Path | None = None
    """This run's own directory, one without a saved run; by default runs/<env>__<script>__<seed>__<time>."""
    checkpoint_interval: int = 10
    """Iterations between checkpoints; one more is written at the end, on Ctrl-C and on SIGTERM."""
    resume: Path | None = None
    """Go on with the run in this directory, with its arguments except those given beside this one; env_id and seed
    stay."""
    evaluate: Path | None = None
    """Only play the policy saved in this directory."""
    eval_episodes: int = 10
    """Games of the evaluation at the end of training, or of --evaluate; their actions are sampled, too."""
    capture_video: bool = False
    """Record the first evaluation game, in colour, as an mp4 in the run directory's videos/."""


LIMITS = {  # inclusive; a number that is not named here must be positive
    "seed": (0, 2**62),
    "num_threads": (1, 1024),
    "repeat_action_probability": (0.0, 1.0),
    "gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "value_coef": (0.0, 1e9),
    "entropy_coef": (0.0, 1e9),
}
FIXED = ("env_id", "seed")  # a resumed run keeps these


# ---------------------------------------------------------------------------- networks


def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """The layer itself, with orthogonal weights of this gain (by default that for ReLU) and biases of 0."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class BlockConv2d(nn.Conv2d):
    """A convolution whose input x [batch, channels, height, width] comes as `F.pixel_unshuffle(x, stride)`.

    Blocks of stride x stride pixels have become channels; with the kernel cut alike the same sums are a convolution
    of stride 1, which processors are faster at than at large strides over few channels.
    """

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        return F.conv2d(blocks, F.pixel_unshuffle(self.weight, self.stride[0]), self.bias)


class Agent(nn.Module):
    """The network of Mnih et al. 2015, shared by actor and critic, each with a linear head of its own.

    Takes the single environment's spaces: a Box [4, 84, 84] of bytes and a Discrete of actions.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, bfloat16: bool = False):
        super().__init__()
        self.bfloat16 = bfloat16
        self.trunk = nn.Sequential(
            orthogonal(BlockConv2d(observation_space.shape[0], 32, 8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            orthogonal(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)  # the layout that convolutions are fast in
        self.actor = orthogonal(nn.Linear(512, int(action_space.n)), gain=0.01)
        self.critic = orthogonal(nn.Linear(512, 1), gain=1.0)

    def pixels(self, obs: torch.Tensor) -> torch.Tensor:
        """`F.pixel_unshuffle(obs / 255, 4)`, [batch, 64, 21, 21], for obs [batch, 4, 84, 84], bytes: in [0, 1], in the
        first layer's blocks (`F.pixel_shuffle(x, 4)` undoes them), in the layout and precision of convolutions."""
        fours = obs.contiguous().view(torch.int32)  # the four bytes of a block's row move as one number
        blocks = fours.unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8).flatten(3)
        pixels = blocks.permute(0, 3, 1, 2).to(torch.bfloat16 if self.bfloat16 else torch.float32)
        return pixels.div_(255.0)  # in place: `to` made a copy

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        """[batch, 512] in float32 for obs [batch, 4, 84, 84], bytes or already the `pixels` of them."""
        pixels = self.pixels(obs) if obs.dtype == torch.uint8 else obs
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.trunk(pixels).float()

    def both(self, obs: torch.Tensor) -> tuple[Distribution, torch.Tensor]:
        """(distribution, value) of obs for the price of one pass through the shared layers."""
        features = self.features(obs)
        return Categorical(logits=self.actor(features), validate_args=False), self.critic(features).squeeze(-1)

    def distribution(self, obs: torch.Tensor) -> Distribution:
        """π(·|obs): a categorical over the actions for each row of obs [batch, 4, 84, 84]."""
        return self.both(obs)[0]

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(obs), [batch], in units of clipped reward, for obs [batch, 4, 84, 84]."""
        return self.both(obs)[1]


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
    """What one iteration has seen, each [num_steps, num_envs, ...] except last_obs."""

    obs: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor  # of the actions, and
    values: torch.Tensor  # V(obs), both by the old policy: actor and critic share the pass through the network
    rewards: torch.Tensor  # -1, 0 or 1
    terminations: torch.Tensor  # a life or the game is lost
    dones: torch.Tensor  # terminated or truncated
    last_obs: torch.Tensor  # [ends, 4, 84, 84], the true successors of the steps in `ends`

    @property
    def ends(self) -> torch.Tensor:
        """The steps whose successor is not the next step's obs: those that ended an episode, and the last ones."""
        return torch.cat([self.dones[:-1], torch.ones_like(self.dones[-1:])])


@torch.no_grad()
def collect(
    envs: gym.vector.VectorEnv, agent: Agent, obs: np.ndarray, num_steps: int, global_step: int
) -> tuple[Rollout, np.ndarray, list[tuple[int, float, int]]]:
    """Run the policy for num_steps in each of envs (made by make_envs), from obs [num_envs, 4, 84, 84] on.

    The critic runs along, as it shares the trunk's pass with the actor. Returns (rollout, the observations
    to go on from, the finished games as (step, score, length)).
    """
    device, steps, last_obs, episodes = agent.actor.weight.device, [], [], []
    for t in range(num_steps):
        distribution, value = agent.both(torch.as_tensor(obs, device=device))
        action = distribution.sample()
        next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
        successor, done, game_over = next_obs, terminated | truncated, infos["game_over"]
        if game_over.any():  # next_obs is already the beginning of the next one; after a lost life it is not
            successor = next_obs.copy()
            successor[game_over] = infos["final_obs"][game_over]
        for i in np.flatnonzero(game_over):
            step = int(global_step + t * envs.num_envs + 1 + i)  # its own: TensorBoard shows one value a step
            episodes.append((step, float(infos["score"][i]), int(infos["length"][i])))
        last_obs.append(successor if t == num_steps - 1 else successor[done])
        log_prob = distribution.log_prob(action)
        steps.append((obs, action, log_prob, value, reward.astype(np.float32), terminated, done))
        obs = next_obs
    columns = (torch.stack([torch.as_tensor(x) for x in column]).to(device) for column in zip(*steps))
    return Rollout(*columns, torch.as_tensor(np.concatenate(last_obs), device=device)), obs, episodes


@torch.no_grad()
def estimate_advantages(
    agent: Agent, rollout: Rollout, values: torch.Tensor, args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns) of the rollout, each [num_steps * num_envs], given the values of its observations."""
    values = values.view_as(rollout.rewards)
    next_values = values.roll(-1, dims=0)  # what step t led to is what step t + 1 started from, except at the ends
    next_values[rollout.ends] = agent.value(rollout.last_obs)
    advantages, returns = compute_gae(
        rollout.rewards, values, next_values, rollout.terminations, rollout.dones, args.gamma, args.gae_lambda
    )
    mean, std = advantages.mean(), advantages.std(correction=0)
    if args.center_advantages:
        advantages = advantages - mean
    if args.normalize_advantages:
        advantages = advantages / (std + 1e-8)
    return advantages.flatten(), returns.flatten()


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
    distribution, values = agent.both(obs)
    ratio = (distribution.log_prob(actions) - old_log_probs).exp()  # r_t(θ), eq. 6
    objective = clipped_surrogate(ratio, advantages, args.clip_coef).mean()  # eq. 7
    value_loss = squared_error(values, old_values, returns, args.value_clip).mean()
    loss = -objective + args.value_coef * value_loss - args.entropy_coef * distribution.entropy().mean()
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)  # 0 for parameters that it does not use
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    # Each laid out in memory as its parameter: fused Adam goes through both in that order, and would mix up another.
    return [torch.mul(gradient, scale, out=torch.empty_like(p)) for p, gradient in zip(parameters, gradients)]


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, args: Args, gradient) -> dict[str, float]:
    """Learn from one rollout: num_epochs passes of minibatch gradient steps on eq. 9.

    `gradient` is `loss_gradient` or its compiled form. Returns the scalars for the log, taken over the
    last minibatch after its own step (the explained variance over the whole batch, before the first).
    """
    obs, actions = agent.pixels(rollout.obs.flatten(0, 1)), rollout.actions.flatten(0, 1)  # pixels once for all passes
    images = obs.permute(0, 2, 3, 1)  # each in one piece of memory: index_select copies such rows faster than obs[rows]
    parameters = [p for p in agent.parameters() if p.requires_grad]
    old_log_probs, old_values = rollout.log_probs.flatten(), rollout.values.flatten()
    advantages, returns = estimate_advantages(agent, rollout, old_values, args)
    explained_variance = 1.0 - (returns - old_values).var() / (returns.var() + 1e-8)

    for epoch in range(args.num_epochs):
        if epoch > 0 and args.recompute_advantages:
            with torch.no_grad():
                advantages, returns = estimate_advantages(agent, rollout, agent.value(obs), args)
        for rows in torch.randperm(len(obs), device=obs.device).chunk(args.num_minibatches):
            pixels = images.index_select(0, rows).permute(0, 3, 1, 2)
            minibatch = (pixels, *(x[rows] for x in (actions, old_log_probs, advantages, returns, old_values)))
            for parameter, grad in zip(parameters, gradient(agent, parameters, minibatch, args)):
                parameter.grad = grad
            optimizer.step()
        if args.target_kl is not None and approximate_kl(agent, obs, actions, old_log_probs) > args.target_kl:
            break

    with torch.no_grad():
        obs, actions, old_log_probs, advantages, returns, old_values = minibatch
        distribution, values = agent.both(obs)
        log_ratio = distribution.log_prob(actions) - old_log_probs
        ratio = log_ratio.exp()
        metrics = {
            "losses/policy_loss": -clipped_surrogate(ratio, advantages, args.clip_coef).mean(),
            "losses/value_loss": squared_error(values, old_values, returns, args.value_clip).mean(),
            "losses/entropy": distribution.entropy().mean(),
            "losses/approx_kl": (ratio - 1.0 - log_ratio).mean(),
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
    Resume from Python with train(parse_args(["--resume", str(run_dir), "--total-timesteps", "20000000"])), which
    takes all other arguments from the run.
    """
    if args.evaluate:
        raise RefusedError(f"evaluate: {args.evaluate} was given to train; main(['--evaluate', RUN_DIR]) plays it")
    check_args(args)
    make_env(args.env_id).close()  # what only the evaluation needs is missed now rather than after the training
    envs = make_envs(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.bfloat16).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    torch._dynamo.config.trace_autograd_ops = True  # lets torch.compile see through torch.autograd.grad
    gradient = torch.compile(loss_gradient) if args.compile else loss_gradient

    batch_size = args.num_envs * args.num_steps
    with Run(args, agent=agent, optimizer=optimizer) as run:
        obs, _ = envs.reset(seed=int(torch.randint(2**30, ())))  # a resumed run draws on, and so plays new episodes
        while run.global_step + batch_size <= args.total_timesteps and not run.stop_signal:
            progress = run.global_step / args.total_timesteps if args.anneal_lr else 0.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - progress)
            # The outermost autocast keeps the weights' bfloat16 copies: made once a rollout then, not at each step.
            with torch.autocast(device.type, enabled=False):
                rollout, obs, episodes = collect(envs, agent, obs, args.num_steps, run.global_step)
            metrics = update(agent, optimizer, rollout, args, gradient)
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            run.log(batch_size, episodes, metrics)
    envs.close()
    report_evaluation(agent, args, run.run_dir)
    return run.run_dir


# ---------------------------------------------------------------------------- environments and evaluation


class RefusedError(ValueError):
    """An argument that cannot work, found before any work was done."""


class FullGames(gym.vector.VectorWrapper):
    """Keeps the raw score of full games, and hands on the sign of the rewards (Mnih et al. 2015).

    A lost life is reported as a termination, so a game's end shows only in its frame number falling. infos
    gains "game_over", and "score" and "length" of the games that are.
    """

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        self.scores, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self.frames = infos["episode_frame_number"].copy()
        return obs, infos

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self.scores, self.lengths = self.scores + rewards, self.lengths + 1
        game_over = infos["episode_frame_number"] < self.frames
        infos.update(game_over=game_over, score=self.scores, length=self.lengths)
        self.scores, self.lengths = np.where(game_over, 0.0, self.scores), np.where(game_over, 0, self.lengths)
        self.frames = infos["episode_frame_number"].copy()
        return obs, np.sign(rewards), terminations, truncations, infos


def game_of(env_id: str) -> str:
    """The name of the game's ROM. Raises RefusedError where env_id is not a game's current Gymnasium id."""
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        raise RefusedError(f"env_id: {env_id!r} does not exist ({error}); ALE/Breakout-v5 would work") from error
    game = spec.kwargs.get("game")
    if game is None:
        raise RefusedError(
            f"env_id: {env_id} is not an Atari game; ppo_clip_continuous.py learns tasks with continuous actions, "
            f"and no script of the four one with other observations and discrete actions"
        )
    right = f"ALE/{game.title().replace('_', '')}-v5"
    if env_id != right:
        raise RefusedError(
            f"env_id: {env_id} has another protocol in its name; give {right}, which is set up as needed"
        )
    return game


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """num_envs games stepped together in C++ threads, preprocessing included.

    Of the two switches for lives `episodic_life` would restart the whole game after each, so it is
    `life_loss_info` that is on. SAME_STEP: the step that ends a game already returns the beginning of the
    next one, and its own last observation in infos["final_obs"].
    """
    envs = AtariVectorEnv(
        game_of(args.env_id),
        args.num_envs,
        num_threads=min(args.num_threads, args.num_envs),
        repeat_action_probability=args.repeat_action_probability,
        autoreset_mode=AutoresetMode.SAME_STEP,
        life_loss_info=True,
        reward_clipping=False,  # the raw score would be lost
    )
    return FullGames(envs)


class FireReset(gym.Wrapper):
    """Presses FIRE once at the start of a game that has it, as the emulator's vector environment does."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        meanings = self.unwrapped.get_action_meanings()
        return self.env.step(meanings.index("FIRE"))[::4] if "FIRE" in meanings else (obs, info)


def make_env(
    env_id: str, render_mode: str | None = None, video_dir: Path | None = None, repeat_action_probability: float = 0.0
) -> gym.Env:
    """One game, played to its end, with the same preprocessing; video_dir records the first game in colour."""
    game_of(env_id)
    try:
        env = gym.make(
            env_id, frameskip=1, repeat_action_probability=repeat_action_probability, render_mode=render_mode
        )
        noop_max = 30 if env.unwrapped.get_action_meanings()[0] == "NOOP" else 0  # Backgammon, VideoCheckers: none
        env = gym.wrappers.AtariPreprocessing(FireReset(env), noop_max, frame_skip=4, screen_size=84)
    except gym.error.Error as error:
        raise RefusedError(f"env_id: {env_id!r} cannot be made ({error})") from error
    if video_dir:  # one picture a step: a game of 108,000 frames must fit into memory
        env = gym.wrappers.RecordVideo(env, str(video_dir), lambda i: i == 0, fps=15, disable_logger=True)
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


@torch.no_grad()
def evaluate(
    agent: Agent,
    env_id: str,
    num_episodes: int,
    seed: int,
    video_dir: Path | None = None,
    repeat_action_probability: float = 0.0,
) -> np.ndarray:
    """Raw scores [num_episodes] of full games; agent and random state stay as they are.

    Actions are sampled, as in training: the most likely one alone can wait for ever for a ball that
    only FIRE would bring. With video_dir the first game is recorded there as an mp4.
    """
    env = make_env(env_id, "rgb_array" if video_dir else None, video_dir, repeat_action_probability)
    returns = np.zeros(num_episodes)
    device = agent.actor.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # other devices are not this run's
        torch.manual_seed(seed)
        for i in range(num_episodes):
            obs, _ = env.reset(seed=seed if i == 0 else None)
            done = False
            while not done:
                obs = torch.as_tensor(obs, device=device)
                obs, reward, terminated, truncated, _ = env.step(int(agent.distribution(obs[None]).sample()))
                returns[i] += reward
                done = terminated or truncated
    env.close()
    return returns


def report_evaluation(agent: Agent, args: Args, run_dir: Path) -> None:
    """Evaluate with args and print what came out."""
    video_dir = run_dir / "videos" if args.capture_video else None
    returns = evaluate(
        agent, args.env_id, args.eval_episodes, args.seed + 10_000, video_dir, args.repeat_action_probability
    )
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
            device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
            agent = Agent(env.observation_space, env.action_space, args.bfloat16).to(device)
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
