# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.9.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "moviepy==2.2.1"]
# ///
"""Trust region policy optimization (TRPO) and natural policy gradient (NPG), for continuous actions.

What a rollout says about a policy is true near that policy only. TRPO therefore improves the surrogate, the advantage
of the actions taken weighted by how much more probable they become, inside a trust region: the policies whose mean KL
divergence from the old one is at most `max_kl`.

- Why the direction H⁻¹g: near θ_old the surrogate is linear, gᵀΔ, and the KL is quadratic, ½ΔᵀHΔ. The largest gain for
  a given KL lies along H⁻¹g, the natural gradient.
- Why conjugate gradient: H has as many rows as the policy has parameters. Conjugate gradient solves H x = g with
  nothing but products H v, each about as cheap as two gradients; H is never formed.
- Why a line search: the linear and the quadratic model are only models. The step is shortened until the measured
  surrogate rises and the measured KL keeps its bound; without it (`--no-line-search`) this is NPG. (Kakade's step size
  is a constant; here `max_kl` gives it.)

`train` is the practical algorithm of the paper's section 6, in six steps of our numbering. Below it come one iteration,
the mathematics, the networks, the environments, and last the bookkeeping, which is not TRPO. Equation numbers are those
of Schulman et al. 2015, arXiv 1502.05477; NPG is Kakade 2001, GAE is Schulman et al. 2016, arXiv 1506.02438.

    python trpo_continuous.py --env-id Walker2d-v5 --seed 2
    python trpo_continuous.py --no-line-search
    python trpo_continuous.py --resume RUN_DIR --total-timesteps 2000000
    python trpo_continuous.py --evaluate RUN_DIR --capture-video

The group "beyond the paper" in `Args` holds what later work added. This command takes it away, and sets batch, network
and advantages as the paper has them for its swimmer:

    python trpo_continuous.py --env-id Swimmer-v5 --num-envs 50 --num-steps 1000 --gae-lambda 1 --hidden-size 30 \
        --fisher-subsample 9 --init-log-std 0 --min-log-std -10 --cg-damping 0 --no-center-advantages \
        --no-normalize-advantages --no-normalize-observations --no-scale-rewards --total-timesteps 10000000

These have no flag: a learned critic as baseline, two hidden layers where the paper has one, and what it says nothing
of: orthogonal layers, the actor's last one close to 0; an ε of 1e-5 in Adam; actions that are clipped to their bounds
on the way into the environment; time limits that end an episode without counting as a termination; `Staggered`
episodes. The bound on the KL holds between policies with the same observation statistics; their change between two
iterations adds to it, noticeably after the first one.
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
from collections.abc import Callable
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
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "trpo_continuous"
# Under torchrun this is process RANK of WORLD: each steps its share of the environments, all learn from all of them.
RANK, WORLD = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if distributed.is_torchelastic_launched() else (0, 1)


@dataclass
class Args:  # the comment behind a field is its help text, in brackets where the value or the idea comes from
    env_id: str = "HalfCheetah-v5"  # a Gymnasium task with continuous actions; `module:Task-v0` imports module first
    seed: int = 1  # of the networks, the actions and the environments
    total_timesteps: int = 1_000_000  # steps of all environments together, rounded down to whole iterations [PPO paper]
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks live; small ones are faster on the CPU
    num_threads: int = 1  # CPU threads of PyTorch, set by the command line; small networks are fastest with one
    compile: bool = False  # compile the critic's gradient: slow first step, then faster; needs a C++ compiler

    # TRPO
    num_envs: int = 8  # environments stepped side by side [OpenAI Baselines: MPI workers]
    num_steps: int = 128  # steps of each in one iteration [Tianshou: 1024 in all; app. E: 50,000 to 1,000,000]
    max_kl: float = 0.01  # δ of eq. 14, the trust region: how far one update may move the mean KL, in nats [app. E]
    cg_iterations: int = 10  # of conjugate gradient, at most [app. C.1]
    cg_residual_tolerance: float = 1e-5  # it stops where ‖g - Hx‖ <= this * min(1, ‖g‖) [size: OpenAI Baselines]
    fisher_subsample: int = 1  # H from every n-th sample, in order of step, then environment [app. C.1: 10%]
    line_search: bool = True  # shorten the step until it keeps what it promises [app. C]; off: natural policy gradient
    backtrack_coef: float = 0.8  # α of the line search: each further try is this times as long [Spinning Up]
    max_backtracks: int = 10  # lengths that it tries before the step is given up [Spinning Up, OpenAI Baselines]
    gamma: float = 0.99  # discount factor, in [0, 1] [app. E]
    gae_lambda: float = 0.9  # decay of the advantage estimator, in [0, 1] [arXiv 2006.05990, sec. 3.4; paper: 1]
    hidden_size: int = 64  # width of the two hidden layers of actor and critic [sb3-contrib; app. E: one of 30 or 50]

    # the critic, which the paper leaves open
    learning_rate: float = 1e-3  # step size of Adam [OpenAI Baselines, Tianshou]
    anneal_lr: bool = True  # let it fall linearly to 0 over the run, as in the PPO scripts
    critic_epochs: int = 10  # passes over the batch in one iteration [sb3-contrib]
    num_minibatches: int = 16  # gradient steps per pass, a divisor of num_envs * num_steps [docs/notes.md]
    recompute_advantages: bool = False  # estimate its targets anew before every pass [arXiv 2006.05990, sec. 3.5]

    # beyond the paper
    init_log_std: float = -0.5  # log of the actions' std at the start: 0.61 [arXiv 2006.05990, sec. 3.2: about 0.5]
    min_log_std: float = -2.0  # its floor: the trust region lets a narrow policy hardly move [docs/notes.md]
    cg_damping: float = 3.0  # added to the diagonal of H, or a step learns its batch by heart [docs/notes.md]
    max_step_size: float | None = None  # take at most this many times the natural gradient; None: no limit [ACKTR]
    center_advantages: bool = True  # subtract the batch's mean from them [OpenAI Baselines]
    normalize_advantages: bool = True  # divide them by their std; matters with max_step_size only [OpenAI Baselines]
    normalize_observations: bool = True  # by their running mean and std, limited to ±10 [arXiv 2006.05990, sec. 3.3]
    scale_rewards: bool = True  # learn from rewards over the running std of the discounted return [OpenAI Baselines]

    # the run
    run_dir: Path | None = None  # a directory without a saved run; by default runs/<env>__<script>__<seed>__<time>
    checkpoint_interval: int = 10  # iterations between checkpoints; one more at the end, on Ctrl-C and on SIGTERM
    resume: Path | None = None  # go on with this run, with its arguments except those given anew (lr follows the total)
    evaluate: Path | None = None  # only play the policy saved in this directory
    eval_episodes: int = 10  # episodes of the noise-free evaluation after training, or of --evaluate
    capture_video: bool = False  # record the first evaluation episode as an mp4 in the run directory's videos/


# ---------------------------------------------------------------------------- the algorithm
def train(args: Args) -> Path:
    """TRPO, the practical algorithm of the paper's section 6 and appendix C, in six steps.

    Returns the run directory. Raises RefusedError, before any work, for arguments that cannot work, FloatingPointError
    for a NaN or an infinity, and SystemExit after Ctrl-C or SIGTERM. Checkpoints already written stay good.
    """
    check_args(args)
    torch.manual_seed(args.seed)
    with ExitStack() as opened:  # whatever ends this block, what was opened in it is closed
        envs = make_envs(args, opened)
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
        optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        reward_scaler = RewardScaler(args.num_envs, args.gamma).to(args.device)
        run = Run(args, opened, agent=agent, optimizer=optimizer, reward_scaler=reward_scaler)
        obs, _ = envs.reset(seed=int(torch.randint(2**30, ())) + RANK * envs.num_envs)  # drawn: a resumed run's are new
        batch_size = args.num_envs * args.num_steps

        while run.global_step + batch_size <= args.total_timesteps and not run.stop_signal:
            # Step 1: collect trajectories with the policy π_old.
            rollout, obs, episodes = collect(envs, agent, obs, args.num_steps, run.global_step)
            if args.scale_rewards:
                rollout = rollout._replace(rewards=reward_scaler(rollout.rewards, rollout.dones))

            # Step 2: estimate the advantages of the actions taken.
            advantages, returns = estimate_advantages(agent, rollout, args)

            # Steps 3 to 6: gradient and curvature, conjugate gradient, full step, line search.
            metrics = update(agent, rollout, advantages, args)

            # Fit the critic to the returns, for the next advantages.
            progress = run.global_step / args.total_timesteps if args.anneal_lr else 0.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - progress)
            metrics |= fit_critic(agent, optimizer, rollout, returns, args)

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


def update(agent: Agent, rollout: Rollout, advantages: Tensor, args: Args) -> dict[str, float]:
    """Steps 3 to 6: the largest gain in the surrogate within the trust region, with advantages [num_steps * num_envs].

    Where there is no such step, the policy stays bit for bit as it was. Returns the scalars for the log.
    """
    obs = rollout.obs.flatten(0, 1)  # [num_steps * num_envs, obs_size]
    actions = rollout.actions.flatten(0, 1)
    parameters = agent.actor_parameters()
    theta_old = parameters_to_vector(parameters).detach()
    with torch.no_grad():
        old = agent.distribution(obs)  # π_old
        old_log_probs = old.log_prob(actions)

    # Step 3: the gradient g of the surrogate, and H, the Hessian of the mean KL, as products (H + damping I) v only.
    ratio = (agent.distribution(obs).log_prob(actions) - old_log_probs).exp()  # 1 everywhere, but its gradient is not 0
    surrogate_old = surrogate_advantage(ratio, advantages)
    g = flat_gradient(surrogate_old, parameters)
    damped = fisher_vector_product(agent.distribution(obs[:: args.fisher_subsample]), parameters, args.cg_damping)

    # Step 4: conjugate gradient for (H + damping I) x = g.
    x = conjugate_gradient(damped, g, args.cg_iterations, args.cg_residual_tolerance)
    damped_x = damped(x)
    hessian_x = damped_x - args.cg_damping * x

    # Step 5: the full step Δ, to the edge of the modelled trust region. It takes no log-std below its floor.
    step = full_step(x, hessian_x, args.max_kl, args.max_step_size)
    step = keep_log_std(step, agent, args.min_log_std)

    # Step 6: the line search; for NPG the full step as it is.
    @torch.no_grad()
    def evaluate_at(theta: Tensor) -> tuple[float, float]:
        vector_to_parameters(theta, parameters)  # to try it: what counts is set below
        new = agent.distribution(obs)
        ratio = (new.log_prob(actions) - old_log_probs).exp()
        return float(surrogate_advantage(ratio, advantages) - surrogate_old), float(mean_kl(old, new))

    result = Step(theta_old, accepted=False, tries=0, improvement=0.0, kl=0.0)
    if step.isfinite().all():  # not so where g is 0 or not finite, nor where xᵀHx is not positive
        if args.line_search:
            result = line_search(evaluate_at, theta_old, step, args.max_kl, args.backtrack_coef, args.max_backtracks)
        else:
            theta = theta_old + step
            improvement, kl = evaluate_at(theta)
            finite = bool(np.isfinite([improvement, kl]).all())
            result = Step(theta if finite else theta_old, finite, 1, improvement, kl)
    vector_to_parameters(result.theta, parameters)
    if not result.accepted:
        norm, curvature = float(g.norm()), float(x @ hessian_x)
        tqdm.write(f"policy update skipped after {result.tries} tries: |g| = {norm:.1e}, x'Hx = {curvature:.1e}")

    with torch.no_grad():
        distribution = agent.distribution(obs)
        log_ratio = distribution.log_prob(actions) - old_log_probs
        ratio = log_ratio.exp()
        taken = result.theta - theta_old
        metrics = {
            "losses/policy_loss": -surrogate_advantage(ratio, advantages),
            "losses/kl": result.kl if result.accepted else 0.0,
            "losses/surrogate_improvement": result.improvement if result.accepted else 0.0,
            "losses/expected_improvement": g @ taken if result.accepted else 0.0,  # by the linear model
            "losses/entropy": distribution.entropy().mean(),
            "losses/approx_kl": (ratio - 1.0 - log_ratio).mean(),  # from the actions taken; above kl: overfitting
            "losses/clipfrac": ((ratio - 1.0).abs() > 0.2).float().mean(),  # to compare with ppo_clip_continuous.py
            "charts/line_search_steps": result.tries,
            "charts/cg_residual": ((g - damped_x).norm() / (g.norm() + 1e-12)).nan_to_num(1.0, 1.0),  # relative
            "charts/step_norm": taken.norm(),
            "charts/skipped_updates": not result.accepted,
        }
    return {name: float(value) for name, value in metrics.items()}


def fit_critic(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, returns: Tensor, args: Args
) -> dict[str, float]:
    """critic_epochs passes of minibatch gradient steps towards returns [num_steps * num_envs].

    Returns the critic's scalars for the log.
    """
    obs = rollout.obs.flatten(0, 1)
    with torch.no_grad():
        explained_variance = 1.0 - (returns - agent.value(obs)).var() / (returns.var() + 1e-8)
    gradient = compiled(compute_gradient) if args.compile else compute_gradient

    for epoch in range(args.critic_epochs):
        if epoch > 0 and args.recompute_advantages:  # because the critic has learned in the meantime
            _, returns = estimate_advantages(agent, rollout, args)
        order = torch.randperm(len(obs), device=obs.device)
        for minibatch in zip(*(x[order].chunk(args.num_minibatches) for x in (obs, returns))):
            optimizer.zero_grad()
            gradient(agent, *minibatch)
            optimizer.step()

    with torch.no_grad():
        value_loss = ((agent.value(obs) - returns) ** 2).mean()
    return {
        "losses/value_loss": float(value_loss),
        "losses/explained_variance": float(explained_variance),  # before the first step
        "charts/learning_rate": optimizer.param_groups[0]["lr"],
    }


def compute_gradient(agent: Agent, obs: Tensor, returns: Tensor) -> None:
    """Put the gradient of E[(V - V_targ)²] over one minibatch, obs [batch, obs_size] and returns [batch], into the
    critic's `.grad`."""
    loss = ((agent.value(obs) - returns) ** 2).mean()
    loss.backward()


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


def surrogate_advantage(ratio: Tensor, advantages: Tensor) -> Tensor:
    """L(θ) = E[r Â], a scalar to be maximised; ratio r = π(a|s) / π_old(a|s), both [batch]. Eq. 14 has Q in place of
    the advantage; in expectation the two differ by V(s), which θ does not change."""
    return (ratio * advantages).mean()


def gaussian_kl(old: Distribution, new: Distribution) -> Tensor:
    """KL(π_old(·|s) ‖ π(·|s)) of each state, [batch], in nats, in closed form, for Gaussians with independent
    components, means and standard deviations [batch, action_size]."""
    variance_ratio = (old.stddev / new.stddev) ** 2
    distance = ((old.mean - new.mean) / new.stddev) ** 2
    return 0.5 * (variance_ratio - 1.0 - variance_ratio.log() + distance).sum(-1)


def mean_kl(old: Distribution, new: Distribution) -> Tensor:
    """E[KL(π_old(·|s) ‖ π(·|s))] over a batch of states (eq. 14), a scalar, in nats.

    From the old to the new policy. The other way round it has the same Hessian where the two agree, but not the same
    value at the end of a step, which the line search needs.
    """
    return gaussian_kl(old, new).mean()


def flat_gradient(outputs: Tensor, parameters: list[nn.Parameter], **options) -> Tensor:
    """Gradient of a scalar with respect to all the parameters, as one vector in their order, 0 for those that it
    does not use; of a tensor, with grad_outputs=u, the product Dᵀu with its Jacobian D."""
    gradients = torch.autograd.grad(outputs, parameters, materialize_grads=True, **options)
    return torch.cat([g.reshape(-1) for g in gradients])


def fisher_vector_product(
    policy: Distribution, parameters: list[nn.Parameter], damping: float
) -> Callable[[Tensor], Tensor]:
    """The function v -> (H + damping I) v, where H is the Hessian of the mean KL at θ_old, the Fisher matrix.

    H = Dᵀ M D (app. C.1): D is the Jacobian of what the network says, mean and standard deviation of each state's
    Gaussian, with respect to θ; M is the Hessian of the Gaussian KL in these two, which is diagonal and known. (The
    network's own second derivatives do not appear: at θ_old the slope of the KL, their factor, is 0.) Automatic
    differentiation gives products with Dᵀ; D v is the derivative of vᵀ(Dᵀu) with respect to u, which need not have any
    particular value. So no n x n matrix is ever formed. `policy` are the distributions of a batch of states, still
    attached to their graph; v and the product are [number of parameters].
    """
    outputs = torch.stack([policy.mean, policy.stddev])  # [2, batch, action_size]
    variance = policy.variance.detach()
    metric = torch.stack([1.0 / variance, 2.0 / variance]) / variance[..., 0].numel()  # M, and the mean over the batch
    u = torch.zeros_like(outputs, requires_grad=True)
    pullback = flat_gradient(outputs, parameters, grad_outputs=u, create_graph=True)  # Dᵀu, linear in u

    def product(v: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pullback, u, v, retain_graph=True)  # d(vᵀDᵀu)/du = D v
        return flat_gradient(outputs, parameters, grad_outputs=metric * pushed, retain_graph=True) + damping * v

    return product


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, max_iterations: int, residual_tolerance: float
) -> Tensor:
    """Solve A x = b for a symmetric positive definite A that is known by its products matvec(v) = A v only.

    Hestenes and Stiefel 1952. Starts from x = 0 and returns the x [n] reached after max_iterations, or as
    soon as ‖b - A x‖ <= residual_tolerance · min(1, ‖b‖). Where A turns out not to be positive definite
    (or not finite) along the next direction, returns the last good x; zeros for b = 0.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared = residual @ residual
    target = (residual_tolerance * squared.sqrt().clamp(max=1.0)) ** 2
    for _ in range(max_iterations):
        if squared <= target:  # solved; without residual there is no direction left, and 0 / 0 would follow
            break
        product = matvec(direction)
        curvature = direction @ product
        rounding = 10.0 * torch.finfo(b.dtype).eps * direction.norm() * product.norm()  # below it, no sign to rely on
        if not rounding < curvature < float("inf"):
            break
        step = squared / curvature
        x = x + step * direction
        residual = residual - step * product
        squared, previous = residual @ residual, squared
        direction = residual + (squared / previous) * direction
    return x


def full_step(x: Tensor, hessian_x: Tensor, max_kl: float, max_step_size: float | None = None) -> Tensor:
    """Δ = sqrt(2δ / xᵀHx) x, which reaches the edge of the quadratic model's trust region (app. C), or
    max_step_size · x where that is shorter (ACKTR, arXiv 1708.05144); not finite where xᵀHx is negative, nor where it
    is 0 without a max_step_size. H is the one without damping, which belongs to the direction x alone."""
    step_size = (2.0 * max_kl / (x @ hessian_x)).sqrt()
    if max_step_size is not None:
        step_size = step_size.clamp(max=max_step_size)
    return step_size * x


def keep_log_std(step: Tensor, agent: Agent, min_log_std: float) -> Tensor:
    """The step, cut off where it would take a log standard deviation below min_log_std (docs/notes.md). One that
    is below it already, as after a resume with a higher floor, is not pushed up."""
    floors = []
    for parameter in agent.actor_parameters():
        floor = min_log_std if parameter is agent.actor_log_std else -torch.inf
        floors.append((floor - parameter.detach()).clamp(max=0.0).flatten())
    return torch.maximum(step, torch.cat(floors))


class Step(NamedTuple):
    """What the line search decided, and how its last try measured up."""

    theta: Tensor  # the new parameters, or the old ones themselves
    accepted: bool
    tries: int
    improvement: float  # L(θ) - L(θ_old) and mean KL of the last try, accepted or not
    kl: float


def line_search(
    evaluate_at: Callable[[Tensor], tuple[float, float]],
    theta_old: Tensor,
    step: Tensor,
    max_kl: float,
    backtrack_coef: float,
    max_backtracks: int,
) -> Step:
    """θ = θ_old + α^j Δ with the first j = 0, 1, ... for which L(θ) - L(θ_old) > 0 and mean KL <= δ (app. C).

    evaluate_at(θ) gives (L(θ) - L(θ_old), mean KL). Where no j below max_backtracks (at least 1) will do, and where
    either is not finite (every comparison with NaN is false), the result holds theta_old itself.
    """
    for j in range(max_backtracks):
        theta = theta_old + backtrack_coef**j * step
        improvement, kl = evaluate_at(theta)
        if 0.0 < improvement < float("inf") and kl <= max_kl:
            return Step(theta, True, j + 1, improvement, kl)
    return Step(theta_old, False, max_backtracks, improvement, kl)


# ---------------------------------------------------------------------------- networks and running statistics
class Agent(nn.Module):
    """Actor and critic without shared parameters, and the statistics of what they observe.

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

    def actor_parameters(self) -> list[nn.Parameter]:
        """θ of the paper: the parameters of the policy alone, without those that are kept fixed."""
        return [p for p in (*self.actor_mean.parameters(), self.actor_log_std) if p.requires_grad]

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
        elif name in ("seed", "cg_damping", "cg_residual_tolerance"):
            check(name, 0 <= value <= 2**62, "0 or more, up to 2**62")
        elif name in ("init_log_std", "min_log_std"):
            check(name, -10 <= value <= 10, "between -10 and 10")
        elif type(value) in (int, float):
            check(name, 0 < value < np.inf, "positive and finite")
    check("backtrack_coef", args.backtrack_coef < 1, "less than 1")
    floor = np.inf if args.resume else args.init_log_std  # a saved policy may be below a new floor
    check("min_log_std", args.min_log_std <= floor, f"at most init_log_std, {floor}")
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
