# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "opencv-python-headless==5.0.0.93",
#                 "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "moviepy==2.2.1"]
# ///
"""Proximal policy optimization (PPO) with the clipped surrogate, for Atari games, from pixels.

PPO improves a stochastic policy by gradient ascent on a surrogate: the advantage of the actions taken, weighted by the
ratio of their probabilities under the new and the old policy. Far from the old policy the surrogate tells little, so
the ratio is clipped; `ppo_clip_continuous.py` tells the story. Here actor and critic share a convolutional network, the
actions are the buttons of a joystick, and observations stay bytes until they reach the network.

The games follow the protocol of the literature: every fourth frame, the pixelwise maximum of the last two, 84 x 84 in
grey, four of them stacked, up to 30 idle frames at the start, FIRE pressed once at the start of a game that has it (not
after a lost life, as OpenAI Baselines and CleanRL do), at most 108,000 frames. A lost life ends the learning episode,
the game goes on. Rewards are learned from by their sign. Reported returns are raw scores of full games.

`train` is algorithm 1 of the paper. Below it come one iteration, the mathematics, the network, the games, and last the
bookkeeping, which is not PPO. Equation numbers are those of Schulman et al. 2017, arXiv 1707.06347; GAE is Schulman et
al. 2016, arXiv 1506.02438, the network that of Mnih et al. 2015.

    python ppo_atari.py --env-id ALE/Pong-v5 --total-timesteps 3000000
    python ppo_atari.py --resume RUN_DIR --total-timesteps 20000000
    python ppo_atari.py --evaluate RUN_DIR --capture-video

The group "beyond the paper" in `Args` holds what later work added. This command takes it away, and sets the paper's
epochs and c1; its clip range falls with the learning rate, the one here stays:

    python ppo_atari.py --num-epochs 3 --value-coef 1 --max-grad-norm 1e9 --no-center-advantages \
        --no-normalize-advantages

These have no flag: a larger network than that of 2016 which the paper cites, as in CleanRL and OpenAI Baselines;
orthogonal layers; an ε of 1e-5 in Adam.
"""

from __future__ import annotations

import functools
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

# OpenMP reads it when PyTorch is imported: idle threads sleep after microseconds, and leave their cores to the games.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, distributed, nn
from torch.distributions import Categorical, Distribution
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "ppo_atari"
# Under torchrun this is process RANK of WORLD: each has its share of the games and of every minibatch.
RANK, WORLD = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if distributed.is_torchelastic_launched() else (0, 1)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if WORLD > 1:  # of this process, when all on this machine are busy
    CORES = max(1, CORES // int(os.environ["LOCAL_WORLD_SIZE"]))
FAST_BFLOAT16 = torch.backends.mkldnn.is_available() and any(  # the processor has instructions for it
    torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
)
gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for every game


@dataclass
class Args:  # the comment behind a field is its help text, in brackets where the value or the idea comes from
    env_id: str = "ALE/Breakout-v5"  # a game of ale-py by its Gymnasium id
    seed: int = 1  # of the network, the actions and the games
    total_timesteps: int = 10_000_000  # steps of all games together, of 4 frames each [app. B: 40M frames]
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the network lives; auto is the GPU where there is one
    num_threads: int = CORES  # CPU threads of PyTorch and of the emulators; by default one for each core
    bfloat16: bool = FAST_BFLOAT16  # the shared layers in bfloat16: twice as fast where processors have it, else slower
    compile: bool = False  # compile the gradient: slow first step, faster updates; needs a C++ compiler and Python.h
    repeat_action_probability: float = 0.0  # sticky actions, in [0, 1] [Machado et al. 2018: 0.25; earlier papers: 0]

    # PPO
    num_envs: int = 8  # N: games stepped side by side [table 5]
    num_steps: int = 128  # T: steps of each in one iteration; the batch is N * T [table 5]
    num_epochs: int = 4  # K: passes over the batch in one iteration [table 5: 3; OpenAI Baselines, CleanRL: 4]
    num_minibatches: int = 4  # gradient steps per pass, a divisor of N * T [table 5: minibatches of 32 * 8]
    learning_rate: float = 2.5e-4  # step size of Adam [table 5]
    anneal_lr: bool = True  # let it fall linearly to 0 over the run [table 5]
    gamma: float = 0.99  # discount factor, in [0, 1] [table 5]
    gae_lambda: float = 0.95  # decay of the advantage estimator, in [0, 1] [table 5]
    clip_coef: float = 0.1  # ε of eq. 7: how far a ratio may move before its gradient stops [table 5, annealed there]
    value_coef: float = 0.25  # c1 of eq. 9, weight of the value loss [table 5: 1; CleanRL: 0.5 on half the square]
    entropy_coef: float = 0.01  # c2 of eq. 9, weight of the entropy bonus [table 5]

    # beyond the paper
    max_grad_norm: float = 0.5  # scale a gradient of larger norm down to this [OpenAI Baselines]
    recompute_advantages: bool = False  # estimate advantages anew before every epoch [arXiv 2006.05990, sec. 3.5]
    center_advantages: bool = True  # subtract the batch's mean from them [OpenAI Baselines; usual: per minibatch]
    normalize_advantages: bool = True  # divide them by the batch's std [OpenAI Baselines; usual: per minibatch]
    target_kl: float | None = None  # leave the iteration after an epoch beyond this mean KL, in nats [Spinning Up]

    # the run
    run_dir: Path | None = None  # a directory without a saved run; by default runs/<env>__<script>__<seed>__<time>
    checkpoint_interval: int = 10  # iterations between checkpoints; one more at the end, on Ctrl-C and on SIGTERM
    resume: Path | None = None  # go on with this run, with its arguments except those given anew (lr follows the total)
    evaluate: Path | None = None  # only play the policy saved in this directory
    eval_episodes: int = 10  # games of the evaluation after training, or of --evaluate; actions are sampled there too
    capture_video: bool = False  # record the first evaluation game, in colour, as an mp4 in the run directory's videos/


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
        device = device_of(args)
        agent = Agent(envs.single_observation_space, envs.single_action_space, args.bfloat16).to(device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # fused: faster
        run = Run(args, opened, agent=agent, optimizer=optimizer)
        obs, _ = envs.reset(seed=int(torch.randint(2**30, ())) + RANK * envs.num_envs)  # drawn: a resumed run's are new
        batch_size = args.num_envs * args.num_steps

        while run.global_step + batch_size <= args.total_timesteps and not run.stop_signal:
            # Run the policy π_old in N environments for T steps.
            rollout, obs, episodes = collect(envs, agent, obs, args.num_steps, run.global_step)

            # Estimate the advantages of the actions taken.
            advantages, returns = estimate_advantages(agent, rollout, args)

            # Optimise the surrogate in K epochs of minibatches. The result is the next π_old.
            progress = run.global_step / args.total_timesteps if args.anneal_lr else 0.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - progress)
            metrics = update(agent, optimizer, rollout, advantages, returns, args)

            run.global_step += batch_size
            run.log(episodes, metrics)
        run.finish()
    return run.run_dir


# ---------------------------------------------------------------------------- one iteration
class Rollout(NamedTuple):
    """What one iteration has seen, each [num_steps, num_envs, ...] except last_obs."""

    obs: Tensor  # bytes
    actions: Tensor
    log_probs: Tensor  # of the actions, and
    values: Tensor  # V(obs), both by π_old: actor and critic share the pass through the network
    rewards: Tensor  # -1, 0 or 1
    terminations: Tensor  # a life, as the emulator counts them, or the game is lost
    dones: Tensor  # terminated or truncated
    last_obs: Tensor  # [ends, 4, 84, 84], the true successors of the steps in `ends`

    @property
    def ends(self) -> Tensor:
        """The steps whose successor is not the next step's obs: those that ended an episode, and the last ones."""
        return torch.cat([self.dones[:-1], torch.ones_like(self.dones[-1:])])


@torch.no_grad()
def collect(
    envs: VectorEnv, agent: Agent, obs: np.ndarray, num_steps: int, global_step: int
) -> tuple[Rollout, np.ndarray, list[tuple[int, float, int]]]:
    """Run the policy for num_steps in each of envs (made by `make_envs`), from obs [num_envs, 4, 84, 84] on.

    Returns (rollout, the observations to go on from, the finished games as (global step, raw score, length)).
    """
    device = agent.actor.weight.device
    steps = []
    last_obs = []
    episodes = []
    if WORLD > 1:  # each process draws its own actions
        torch.manual_seed(exchange(int(torch.randint(2**62, ())))[0] + RANK)
    # The outermost autocast keeps the weights' bfloat16 copies: this one makes them once a rollout, not once a step.
    with torch.autocast(device.type, enabled=False):
        for t in range(num_steps):
            distribution, value = agent.both(torch.as_tensor(obs, device=device))
            action = distribution.sample()
            next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
            done = terminated | truncated
            game_over = infos["game_over"]
            successor = next_obs
            if game_over.any():  # next_obs is already the beginning of the next game; after a lost life it is not
                successor = next_obs.copy()
                successor[game_over] = infos["final_obs"][game_over]
            for i in np.flatnonzero(game_over):
                step = int(global_step + (t * WORLD + RANK) * envs.num_envs + 1 + i)  # its own, for TensorBoard
                episodes.append((step, float(infos["score"][i]), int(infos["length"][i])))
            last_obs.append(successor if t == num_steps - 1 else successor[done])
            log_prob = distribution.log_prob(action)
            steps.append((obs, action, log_prob, value, reward.astype(np.float32), terminated, done))
            obs = next_obs

    # From a list of steps to one tensor for each field of the rollout.
    fields = (torch.stack([torch.as_tensor(x) for x in field]).to(device) for field in zip(*steps))
    return Rollout(*fields, torch.as_tensor(np.concatenate(last_obs), device=device)), obs, episodes


@torch.no_grad()
def estimate_advantages(agent: Agent, rollout: Rollout, args: Args) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of the rollout by its values, each [num_steps * num_envs]."""
    next_values = rollout.values.roll(-1, dims=0)  # step t led to what step t + 1 started from, except at the ends
    next_values[rollout.ends] = agent.value(rollout.last_obs)
    advantages, returns = compute_gae(
        rollout.rewards, rollout.values, next_values, rollout.terminations, rollout.dones, args.gamma, args.gae_lambda
    )
    whole_batch = torch.cat(exchange(advantages.cpu())) if WORLD > 1 else advantages
    mean, std = whole_batch.mean(), whole_batch.std(correction=0)
    if args.center_advantages:
        advantages = advantages - mean
    if args.normalize_advantages:
        advantages = advantages / (std + 1e-8)
    return advantages.flatten(), returns.flatten()


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, advantages: Tensor, returns: Tensor, args: Args
) -> dict[str, float]:
    """num_epochs passes of minibatch gradient steps on eq. 9, with advantages and returns [num_steps * num_envs].

    Returns the scalars for the log. They describe the last minibatch after its own step, as the whole batch takes long.
    """
    pixels = agent.pixels(rollout.obs.flatten(0, 1))  # once for all passes
    images = pixels.permute(0, 2, 3, 1)  # each in one piece of memory, as index_select copies such rows fastest
    actions = rollout.actions.flatten(0, 1)
    old_log_probs = rollout.log_probs.flatten()
    explained_variance = 1.0 - (returns - rollout.values.flatten()).var() / (returns.var() + 1e-8)
    gradient = compiled(compute_gradient) if args.compile else compute_gradient

    for epoch in range(args.num_epochs):
        if epoch > 0 and args.recompute_advantages:  # because the critic has learned in the meantime
            with torch.no_grad():
                values = agent.value(pixels).view_as(rollout.values)
            advantages, returns = estimate_advantages(agent, rollout._replace(values=values), args)
        for i in torch.randperm(len(pixels), device=pixels.device).chunk(args.num_minibatches):
            optimizer.zero_grad()
            obs = images.index_select(0, i).permute(0, 3, 1, 2)
            gradient(agent, obs, actions[i], old_log_probs[i], advantages[i], returns[i], args)
            optimizer.step()
        if args.target_kl is not None:
            kls = exchange(float(approximate_kl(agent, pixels, actions, old_log_probs)))
            if sum(kls) / WORLD > args.target_kl:
                break

    with torch.no_grad():  # obs and i are still those of the last minibatch
        distribution, values = agent.both(obs)
        ratio = (distribution.log_prob(actions[i]) - old_log_probs[i]).exp()
        metrics = {
            "losses/policy_loss": -clipped_surrogate(ratio, advantages[i], args.clip_coef).mean(),
            "losses/value_loss": ((values - returns[i]) ** 2).mean(),
            "losses/entropy": distribution.entropy().mean(),
            "losses/approx_kl": approximate_kl(agent, obs, actions[i], old_log_probs[i]),
            "losses/clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
            "losses/explained_variance": explained_variance,  # of the batch, before the first step
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
    return {name: float(value) for name, value in metrics.items()}


def compute_gradient(
    agent: Agent, obs: Tensor, actions: Tensor, old_log_probs: Tensor, advantages: Tensor, returns: Tensor, args: Args
) -> None:
    """Put the gradient of -L^{CLIP+VF+S} (eq. 9) over one minibatch into the parameters' `.grad`, its norm clipped.

    obs are the `pixels` of the batch's observations, the others [batch].
    """
    distribution, values = agent.both(obs)
    ratio = (distribution.log_prob(actions) - old_log_probs).exp()  # r_t(θ), eq. 6
    objective = clipped_surrogate(ratio, advantages, args.clip_coef).mean()  # L^CLIP, eq. 7
    value_loss = ((values - returns) ** 2).mean()  # L^VF
    loss = -objective + args.value_coef * value_loss
    if args.entropy_coef > 0.0:
        loss = loss - args.entropy_coef * distribution.entropy().mean()  # S
    loss.backward()
    if WORLD > 1:
        average_gradients(agent)
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)


def average_gradients(agent: Agent) -> None:
    """Make every gradient the mean of all processes': that of the whole minibatch, of which each has an equal share."""
    gradients = [p.grad for p in agent.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)  # one exchange, of the sum
    for gradient, mean in zip(gradients, flat.div_(WORLD).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


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


# ---------------------------------------------------------------------------- the network
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

    def pixels(self, obs: Tensor) -> Tensor:
        """`F.pixel_unshuffle(obs / 255, 4)`, [batch, 64, 21, 21], for obs [batch, 4, 84, 84], bytes: in [0, 1], in the
        first layer's blocks (`F.pixel_shuffle(x, 4)` undoes them), in the layout and precision of convolutions."""
        fours = obs.contiguous().view(torch.int32)  # the four bytes of a block's row move as one number
        blocks = fours.unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8).flatten(3)
        pixels = blocks.permute(0, 3, 1, 2).to(torch.bfloat16 if self.bfloat16 else torch.float32)
        return pixels.div_(255.0)  # in place: `to` made a copy

    def features(self, obs: Tensor) -> Tensor:
        """[batch, 512] in float32 for obs [batch, 4, 84, 84], bytes or already the `pixels` of them."""
        pixels = self.pixels(obs) if obs.dtype == torch.uint8 else obs
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.trunk(pixels).float()

    def both(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        """(distribution, value) of obs for the price of one pass through the shared layers."""
        features = self.features(obs)
        return Categorical(logits=self.actor(features), validate_args=False), self.critic(features).squeeze(-1)

    def distribution(self, obs: Tensor) -> Distribution:
        """π(·|obs): a categorical over the actions for each row of obs [batch, 4, 84, 84]."""
        return self.both(obs)[0]

    def value(self, obs: Tensor) -> Tensor:
        """V(obs), [batch], in units of clipped reward, for obs [batch, 4, 84, 84]."""
        return self.both(obs)[1]


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

    def forward(self, blocks: Tensor) -> Tensor:
        return F.conv2d(blocks, F.pixel_unshuffle(self.weight, self.stride[0]), self.bias)


# ---------------------------------------------------------------------------- games and evaluation
def make_envs(args: Args, opened: ExitStack) -> VectorEnv:
    """This process's share of num_envs games, stepped together in C++ threads with preprocessing; `opened` closes them.

    Of the two switches for lives `episodic_life` would restart the whole game after each, so it is `life_loss_info`
    that is on. SAME_STEP: the step that ends a game already returns the beginning of the next one, and its own last
    observation in infos["final_obs"].
    """
    envs = AtariVectorEnv(
        game_of(args.env_id),
        args.num_envs // WORLD,
        num_threads=min(args.num_threads, args.num_envs // WORLD),
        repeat_action_probability=args.repeat_action_probability,
        autoreset_mode=AutoresetMode.SAME_STEP,
        life_loss_info=True,
        reward_clipping=False,  # the raw score would be lost
    )
    opened.callback(envs.close)
    return FullGames(envs)


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


def make_env(
    env_id: str, opened: ExitStack, video_dir: Path | None = None, repeat_action_probability: float = 0.0
) -> gym.Env:
    """One game, played to its end, with the same preprocessing, which `opened` closes; with video_dir the first one is
    recorded there, in colour. Raises RefusedError where it cannot be made."""
    game_of(env_id)
    options = {"frameskip": 1, "repeat_action_probability": repeat_action_probability}
    try:
        env = gym.make(env_id, render_mode="rgb_array" if video_dir else None, **options)
        opened.callback(lambda: env.close())  # of the outermost wrapper that it has by then
        noop_max = 30 if env.unwrapped.get_action_meanings()[0] == "NOOP" else 0  # Backgammon, VideoCheckers: none
        env = gym.wrappers.AtariPreprocessing(FireReset(env), noop_max, frame_skip=4, screen_size=84)
        if video_dir:  # one picture a step: a game of 108,000 frames must fit into memory
            env = gym.wrappers.RecordVideo(env, str(video_dir), lambda i: i == 0, fps=15, disable_logger=True)
    except gym.error.Error as error:
        raise RefusedError(f"env_id: {env_id!r} cannot be made ({error})") from error
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


class FireReset(gym.Wrapper):
    """Presses FIRE once at the start of a game that has it, as the emulator's vector environment does."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        meanings = self.unwrapped.get_action_meanings()
        return self.env.step(meanings.index("FIRE"))[::4] if "FIRE" in meanings else (obs, info)


@torch.no_grad()
def evaluate(args: Args, run_dir: Path) -> np.ndarray:
    """Raw scores [eval_episodes] of full games by the policy that is saved in run_dir.

    Actions are sampled, as in training: the most likely one alone can wait for ever for a ball that only FIRE would
    bring. Raises RefusedError where there is no policy that fits.
    """
    returns = np.zeros(args.eval_episodes)
    device = device_of(args)
    generator = torch.Generator(device).manual_seed(args.seed + 10_000)
    video_dir = run_dir / "videos" if args.capture_video else None
    with ExitStack() as opened:
        env = make_env(args.env_id, opened, video_dir, args.repeat_action_probability)
        agent = Agent(env.observation_space, env.action_space, args.bfloat16).to(device)
        load_checkpoint(run_dir, agent=agent)
        for episode in range(args.eval_episodes):
            obs, _ = env.reset(seed=args.seed + 10_000 if episode == 0 else None)
            done = False
            while not done:
                probs = agent.distribution(torch.as_tensor(obs, device=device)[None]).probs
                action = int(torch.multinomial(probs, 1, generator=generator))
                obs, reward, terminated, truncated, _ = env.step(action)
                returns[episode] += reward
                done = terminated or truncated
    return returns


def device_of(args: Args) -> torch.device:
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


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
        if name in ("gamma", "gae_lambda", "repeat_action_probability"):
            check(name, 0 <= value <= 1, "between 0 and 1")
        elif name in ("seed", "value_coef", "entropy_coef"):
            check(name, 0 <= value <= 2**62, "0 or more, up to 2**62")
        elif type(value) in (int, float):
            check(name, 0 < value < np.inf, "positive and finite")
    batch_size = args.num_envs * args.num_steps
    check("num_steps", batch_size > 1, "at least 2 for one environment, as one sample has no variance")
    check("num_envs", args.num_envs % WORLD == 0, f"a multiple of {WORLD}, the number of processes")
    check("evaluate", not args.evaluate or WORLD == 1, "left out under torchrun: one process plays it")
    share = batch_size // WORLD
    check("num_minibatches", share % args.num_minibatches == 0, f"a divisor of num_envs * num_steps / {WORLD}, {share}")
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
    if not args.evaluate:  # what the evaluation needs is missed now rather than after the training
        with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
            make_env(args.env_id, opened, Path(folder, "videos") if args.capture_video else None)


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
