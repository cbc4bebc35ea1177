"""The README's figures, drawn by the scripts' own functions.

    python figures/draw.py            # all of them, a few minutes: four short training runs are among them
    python figures/draw.py --only clipped_objective natural_gradient
    python figures/draw.py --film RUN_DIR

Every function below that returns a dictionary computes one figure's data; the one with `draw_` before its name
draws it. Each figure is written twice, for light and for dark pages. Needs matplotlib (benchmark/requirements.txt).
"""

import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.utils import parameters_to_vector, vector_to_parameters

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import ppo_clip_continuous as clip  # noqa: E402
import ppo_kl_continuous as kl  # noqa: E402
import trpo_continuous as trpo  # noqa: E402

COLORS = {"TRPO": "#009E73", "NPG": "#CC79A7", "PPO, clipped": "#0072B2", "PPO, adaptive KL": "#E69F00"}
FIGURES = (
    "minorise_maximise", "clipped_objective", "natural_gradient", "line_search", "conjugate_gradient", "kl_per_update",
    "steered_rate",
)  # fmt: skip


@dataclass
class Args:
    only: list[str] = field(default_factory=lambda: list(FIGURES))
    """Which of FIGURES."""
    env_id: str = "Hopper-v5"
    """The task of the figures that come from real training."""
    total_timesteps: int = 200_000
    """Steps of each of these training runs."""
    hidden_size: int = 64
    """Width of the networks in these runs."""
    folder: Path = FOLDER
    """Where the pictures go."""
    film: Path | None = None
    """Instead: cheetah.gif, of the policy that ppo_clip_continuous.py has saved in this run directory."""


# ---------------------------------------------------------------------------- minorise and maximise


def small_task(theta: float, gamma: float) -> tuple[float, np.ndarray, np.ndarray]:
    """(J, discounted number of visits of each state, advantage [state, left or right]), all exact, of a policy with one
    parameter: a Gaussian with mean theta and std 1 in both states, of which an action above 0 is "right".

    Right pays 1 to the rested (state 0), costs the tired 2 (state 1), and leaves one tired. Left pays nothing and
    leaves one rested. It begins rested. So J falls where the policy is so often tired that right costs more than it
    pays; the surrogate, which counts the old policy's states, does not see that."""
    right = float(Normal(0.0, 1.0).cdf(torch.tensor(theta, dtype=torch.float64)))
    probabilities = np.array([1.0 - right, right])
    rewards, follow, start = np.array([[0.0, 1.0], [0.0, -2.0]]), np.tile(probabilities, (2, 1)), np.array([1.0, 0.0])
    values = np.linalg.solve(np.eye(2) - gamma * follow, rewards @ probabilities)
    visits = np.linalg.solve(np.eye(2) - gamma * follow.T, start)
    return float(start @ values), visits, rewards + gamma * values - values[:, None]


def lower_bound(theta_old: float, thetas: np.ndarray, gamma: float) -> dict:
    """The surrogate L (TRPO eq. 3) of the small task at each of thetas, and what it loses to become a bound, C max KL
    (theorem 1 and eq. 9)."""
    j_old, visits, advantage = small_task(theta_old, gamma)
    mean = torch.full((10_001, 1), theta_old, dtype=torch.float64)
    old = Independent(Normal(mean, 1.0), 1)
    actions = old.base_dist.icdf((torch.arange(len(mean)).double()[:, None] + 0.5) / len(mean))  # evenly, not drawn
    advantages = torch.tensor(visits @ advantage)[(actions[:, 0] > 0).long()]
    c = 4.0 * np.abs(advantage).max() * gamma / (1.0 - gamma) ** 2
    surrogate, price = [], []
    for theta in thetas:
        new = Independent(Normal(torch.full_like(mean, theta), 1.0), 1)
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        surrogate.append(j_old + float(trpo.surrogate_advantage(ratio, advantages)))
        price.append(c * float(trpo.mean_kl(old, new)))  # the same KL in both states, so its mean is its maximum
    return {"surrogate": np.array(surrogate), "bound": np.array(surrogate) - price, "c": c}


def minorise_maximise(args: Args) -> dict:
    """Return, surrogate and bound over the policy's one parameter, for a short and a long horizon; what steps they
    allow, and TRPO's for δ = 0.01."""
    data = {}
    for gamma, start, low, high in ((0.2, -1.0, -1.5, 0.2), (0.9, -1.8, -2.6, 0.0)):
        thetas = np.linspace(low, high, 86)
        path = [start]
        for _ in range(3):
            fine = path[-1] + 0.2 * np.linspace(0.0, 1.0, 301) ** 2
            path.append(float(fine[lower_bound(path[-1], fine, gamma)["bound"].argmax()]))
        returns = np.array([small_task(theta, gamma)[0] for theta in thetas])
        bounds = [lower_bound(theta, thetas, gamma) for theta in path]
        natural = torch.ones(1)  # the gradient's sign: with one parameter there is no other direction, and H is 1
        step = float(trpo.full_step(natural, natural, trpo.Args.max_kl))
        data[gamma] = {
            "thetas": thetas, "return": returns, "bounds": bounds, "path": np.array(path), "trpo": start + step,
            "at": {theta: small_task(theta, gamma)[0] for theta in [*path, start + step]},
        }  # fmt: skip
    return data


def draw_minorise_maximise(data: dict, plt, ink: str):
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.5))
    for axis, (gamma, of_gamma) in zip(axes, data.items()):
        thetas, path, at = of_gamma["thetas"], of_gamma["path"], of_gamma["at"]
        first, *later = of_gamma["bounds"]
        axis.plot(thetas, of_gamma["return"], color=ink, linewidth=2, label="return $J$")
        axis.plot(thetas, first["surrogate"], "--", color=COLORS["PPO, clipped"], label="surrogate $L$")
        axis.plot(thetas, first["bound"], color=COLORS["TRPO"], linewidth=2, label="lower bound $L - C\\,\\max$ KL")
        if gamma == 0.2:
            for other in later[:-1]:
                axis.plot(thetas, other["bound"], color=COLORS["TRPO"], linewidth=1, alpha=0.5)
            axis.plot(path[1:], [at[theta] for theta in path[1:]], "o", color=COLORS["TRPO"], markersize=5)
        axis.plot(path[0], at[path[0]], "o", color="#D55E00", label="old policy")
        if gamma == 0.9:
            to = of_gamma["trpo"]
            axis.plot(to, at[to], "s", color="#E69F00", label="TRPO's step, δ = 0.01")
        low, high = of_gamma["return"].min(), of_gamma["return"].max()
        axis.set_ylim(low - 0.35 * (high - low), high + 0.35 * (high - low))
        step = path[1] - path[0]
        beside = f", TRPO's {of_gamma['trpo'] - path[0]:.2g}" if gamma == 0.9 else ""
        axis.set_title(f"γ = {gamma}: C = {first['c']:,.1f}, the bound's step is {step:.1g}{beside}", fontsize=9)
        axis.set(xlabel="the policy's parameter θ", yticks=[])
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=5, frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------------------- the clipped objective


def clipped_objective(args: Args) -> dict:
    """L^CLIP of one sample over the ratio, for an advantage of +1 and of -1 (the PPO paper's figure 1)."""
    ratio = torch.linspace(0.0, 2.0, 401)
    data = {"ratio": ratio.numpy()}
    for sign in (1.0, -1.0):
        advantages = torch.full_like(ratio, sign)
        data[f"plain {sign:+.0f}"] = (ratio * advantages).numpy()
        data[f"clipped {sign:+.0f}"] = clip.clipped_surrogate(ratio, advantages, 0.2).numpy()
    return data


def draw_clipped_objective(data: dict, plt, ink: str):
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.9))
    for axis, sign, title in zip(axes, ("+1", "-1"), ("advantage > 0", "advantage < 0")):
        axis.plot(data["ratio"], data[f"plain {sign}"], "--", color=ink, linewidth=1, label="surrogate  $r\\,\\hat A$")
        axis.plot(
            data["ratio"], data[f"clipped {sign}"], color=COLORS["PPO, clipped"], linewidth=2.5, label="$L^{CLIP}$"
        )
        for edge in (0.8, 1.2):
            axis.axvline(edge, color=ink, linewidth=0.6, alpha=0.5)
        axis.plot(1, float(sign), "o", color="#D55E00", label="start of the optimisation, $r = 1$")
        flat, slope = ((1.6, 1.06), (0.28, 0.66)) if sign == "+1" else ((0.4, -0.94), (1.72, -1.34))
        axis.text(*flat, "flat: no gradient", color=ink, fontsize=8, ha="center")
        axis.text(*slope, "still pulled back", color=ink, fontsize=8, ha="center")
        axis.set(title=title, xlabel="ratio $r$", xticks=[0, 0.8, 1, 1.2, 2])
    axes[0].legend(frameon=False, loc="upper left", fontsize=8)
    return figure


# ---------------------------------------------------------------------------- directions and iterates


class TwoParameters(nn.Module):
    """A Gaussian over one action that does not look at its observation: its mean and its log-std are the parameters."""

    def __init__(self, mean: float, log_std: float):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean]))
        self.actor_log_std = nn.Parameter(torch.tensor([log_std]))
        self.register_buffer("kl_coef", torch.tensor(1.0))

    def actor_parameters(self):
        return [self.mean, self.actor_log_std]

    def distribution(self, obs):
        mean = self.mean.repeat(len(obs), 1)
        return Independent(Normal(mean, self.actor_log_std.exp(), validate_args=False), 1, validate_args=False)

    def value(self, obs):
        return torch.zeros(len(obs))


def experience(agent: TwoParameters, batch: int) -> tuple[torch.Tensor, ...]:
    """(obs, actions, normalised advantages) of a task with one step, whose reward is -(a - 1)²."""
    obs = torch.zeros(batch, 1)
    with torch.no_grad():
        actions = agent.distribution(obs).sample()
    rewards = -((actions - 1.0) ** 2).squeeze(-1)
    return obs, actions, (rewards - rewards.mean()) / rewards.std()


def directions(agent: TwoParameters) -> tuple[np.ndarray, np.ndarray]:
    """(vanilla, natural) gradient of the surrogate at the agent's parameters, each of length 1."""
    obs, actions, advantages = experience(agent, 20_000)
    parameters, policy = agent.actor_parameters(), agent.distribution(obs)
    log_probs = policy.log_prob(actions)
    ratio = (log_probs - log_probs.detach()).exp()
    g = trpo.flat_gradient(trpo.surrogate_advantage(ratio, advantages), parameters)
    product = trpo.fisher_vector_product(agent.distribution(obs), parameters, damping=0.0)
    x = trpo.conjugate_gradient(product, g, 2, 1e-10)
    return (g / g.norm()).numpy(), (x / x.norm()).numpy()


def iterate(algorithm: str, start: tuple[float, float], iterations: int, delta: float, batch: int) -> np.ndarray:
    """The (mean, log-std) that each iteration of an algorithm reaches, [iterations + 1, 2]."""
    agent = TwoParameters(*start)
    parameters = agent.actor_parameters()
    optimizer = torch.optim.Adam(parameters, lr=3e-3, eps=1e-5)
    script = {"TRPO": trpo, "PPO, clipped": clip, "PPO, adaptive KL": kl}[algorithm]
    options = {"max_kl": delta} if script is trpo else {"target_kl": delta} if script is kl else {}
    args, path = script.Args(**options), [start]
    for _ in range(iterations):
        obs, actions, advantages = experience(agent, batch)
        with torch.no_grad():
            old = agent.distribution(obs)
            old_log_probs = old.log_prob(actions)
        if script is trpo:
            nothing = torch.zeros(batch, 1, dtype=torch.bool)
            rollout = trpo.Rollout(obs[:, None], actions[:, None], nothing.float(), obs[:, None], nothing, nothing)
            trpo.update(agent, rollout, advantages, args)
        else:
            zeros = torch.zeros(len(obs))  # no critic here: returns
            about_old = [old.mean, old.stddev] if script is kl else []
            samples = (obs, actions, old_log_probs, *about_old, advantages, zeros)
            for _ in range(args.num_epochs):
                for rows in torch.randperm(len(obs)).split(64):
                    optimizer.zero_grad()
                    script.compute_gradient(agent, *(x[rows] for x in samples), args)
                    optimizer.step()
        if script is kl:
            with torch.no_grad():
                distance = float(trpo.mean_kl(old, agent.distribution(obs)))
            agent.kl_coef.fill_(kl.adapt_kl_coef(float(agent.kl_coef), distance, args.target_kl))
        path.append((agent.mean.item(), agent.actor_log_std.item()))
    return np.array(path)


def natural_gradient(args: Args, iterations: int = 30, batch: int = 2048) -> dict:
    torch.manual_seed(0)
    grid = [(mean, log_std) for mean in np.linspace(-1.0, 0.9, 8) for log_std in np.linspace(-1.9, 0.4, 7)]
    fields = [directions(TwoParameters(*point)) for point in grid]
    start, delta = (-0.8, 0.0), 0.03
    paths = {
        name: iterate(name, start, iterations, delta, batch) for name in ("TRPO", "PPO, clipped", "PPO, adaptive KL")
    }
    means, log_stds = np.meshgrid(np.linspace(-1.5, 1.5, 301), np.linspace(-2.5, 1.0, 301))
    one = torch.ones(means.size, 1)
    new = Normal(torch.tensor(means.reshape(-1, 1)), torch.tensor(log_stds.reshape(-1, 1)).exp())
    circles = []  # KL(centre ‖ ·) over the plane, for some centres on TRPO's way
    for mean, log_std in paths["TRPO"][::4]:
        distance = trpo.gaussian_kl(Normal(one * mean, one * np.exp(log_std)), new)
        circles.append(distance.reshape(means.shape).numpy())
    vanilla, natural = map(np.array, zip(*fields))
    return {"grid": np.array(grid), "vanilla": vanilla, "natural": natural, "paths": paths,
            "means": means, "log_stds": log_stds, "circles": circles, "delta": delta}  # fmt: skip


def draw_natural_gradient(data: dict, plt, ink: str):
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.9), sharey=True)
    look = {"angles": "xy", "scale": 14, "width": 0.006}
    axes[0].quiver(*data["grid"].T, *data["vanilla"].T, color="#999999", label="gradient $g$", **look)
    axes[0].quiver(
        *data["grid"].T, *data["natural"].T, color=COLORS["TRPO"], label="natural gradient $H^{-1}g$", **look
    )
    axes[0].set(title="directions", xlabel="mean of the policy", ylabel="log-std of the policy")
    for circle in data["circles"]:
        axes[1].contour(data["means"], data["log_stds"], circle, [data["delta"]], colors=[ink], linewidths=0.7)
    for (name, path), marker in zip(data["paths"].items(), "os^"):
        axes[1].plot(*path.T, marker=marker, markersize=3.5, linewidth=1, color=COLORS[name], label=name)
    axes[1].set(title=f"iterates, and the circles KL = δ = {data['delta']}", xlabel="mean of the policy")
    axes[1].set(xlim=(-1.3, 1.2), ylim=(-2.1, 0.6))
    for axis in axes:
        axis.axvline(1.0, color=ink, linewidth=0.6, linestyle=":")
    handles, labels = map(sum, zip(*(axis.get_legend_handles_labels() for axis in axes)), ([], []))
    figure.legend(handles, labels, loc="outside lower center", ncol=5, frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------------------- a real batch


def real_batch(args: Args, iterations: int) -> tuple:
    """(agent, obs, actions, advantages) after some iterations of TRPO, before the next step of the policy."""
    torch.manual_seed(1)
    options = trpo.Args(env_id=args.env_id, hidden_size=args.hidden_size)
    with ExitStack() as opened:
        envs = trpo.make_envs(options, opened)
        agent = trpo.Agent(envs.single_observation_space, envs.single_action_space, options)
        optimizer = torch.optim.Adam(agent.critic.parameters(), lr=options.learning_rate, eps=1e-5)
        scaler = trpo.RewardScaler(options.num_envs, options.gamma)
        obs, _ = envs.reset(seed=1)
        for i in range(iterations + 1):
            rollout, obs, _ = trpo.collect(envs, agent, obs, options.num_steps, 0)
            rollout = rollout._replace(rewards=scaler(rollout.rewards, rollout.dones))
            advantages, returns = trpo.estimate_advantages(agent, rollout, options)
            if i < iterations:
                trpo.update(agent, rollout, advantages, options)
                trpo.fit_critic(agent, optimizer, rollout, returns, options)
                agent.obs_stats.update(rollout.obs.flatten(0, 1))
    return agent, rollout.obs.flatten(0, 1), rollout.actions.flatten(0, 1), advantages


def line_search(args: Args) -> dict:
    """Surrogate and KL along the step of a real batch, their models, and the tries of the line search."""
    agent, obs, actions, advantages = real_batch(args, max(1, args.total_timesteps // 10_000))
    delta, damping = trpo.Args.max_kl, trpo.Args.cg_damping
    parameters, old = agent.actor_parameters(), agent.distribution(obs)
    theta_old = parameters_to_vector(parameters).detach()
    old_log_probs = old.log_prob(actions).detach()
    ratio = (agent.distribution(obs).log_prob(actions) - old_log_probs).exp()
    surrogate_old = trpo.surrogate_advantage(ratio, advantages)
    g = trpo.flat_gradient(surrogate_old, parameters)
    product = trpo.fisher_vector_product(agent.distribution(obs), parameters, damping)
    x = trpo.conjugate_gradient(product, g, trpo.Args.cg_iterations, trpo.Args.cg_residual_tolerance)
    step = trpo.full_step(x, product(x) - damping * x, delta)

    @torch.no_grad()
    def evaluate_at(theta):
        vector_to_parameters(theta, parameters)
        new = agent.distribution(obs)
        ratio = (new.log_prob(actions) - old_log_probs).exp()
        return float(trpo.surrogate_advantage(ratio, advantages) - surrogate_old), float(trpo.mean_kl(old, new))

    lengths = np.linspace(0.0, 1.6, 81)
    surrogate, divergence = zip(*(evaluate_at(theta_old + length * step) for length in lengths))
    result = trpo.line_search(evaluate_at, theta_old, step, delta, 0.8, 10)
    curvature = float(step @ (product(step) - damping * step))
    return {"lengths": lengths, "surrogate": np.array(surrogate), "kl": np.array(divergence),
            "linear": lengths * float(g @ step), "quadratic": 0.5 * lengths**2 * curvature,
            "tries": 0.8 ** np.arange(result.tries), "accepted": result.accepted, "delta": delta}  # fmt: skip


def draw_line_search(data: dict, plt, ink: str):
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, measured, model, title in (
        (axes[0], "surrogate", "linear", "surrogate, gain over the old policy"),
        (axes[1], "kl", "quadratic", "mean KL(old ‖ new)"),
    ):
        axis.plot(data["lengths"], data[measured], color=COLORS["TRPO"], linewidth=2, label="measured on the batch")
        axis.plot(data["lengths"], data[model], "--", color=ink, linewidth=1, label=f"{model} model")
        at = np.interp(data["tries"], data["lengths"], data[measured])
        axis.plot(data["tries"][:-1], at[:-1], "x", color="#D55E00", label="try, rejected")
        last = {"marker": "o", "label": "try, accepted"} if data["accepted"] else {"marker": "x"}
        axis.plot(data["tries"][-1:], at[-1:], linestyle="", color="#D55E00", **last)
        axis.set(title=title, xlabel="length, in full steps")
    axes[1].axhline(data["delta"], color=ink, linewidth=0.8, linestyle=":")
    axes[1].text(1.35, data["delta"] * 0.9, f"δ = {data['delta']}", color=ink, va="top")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def conjugate_gradient(args: Args) -> dict:
    """Error of conjugate gradient over its iterations, ‖x_k - x‖_H / ‖x‖_H, on the Fisher matrix of a real batch."""
    small = Args(
        env_id=args.env_id, hidden_size=min(args.hidden_size, 16)
    )  # H is written down here, so it must be small
    agent, obs, actions, advantages = real_batch(small, 5)
    agent.double()
    parameters, obs, actions = agent.actor_parameters(), obs.double(), actions.double()
    log_probs = agent.distribution(obs).log_prob(actions)
    ratio = (log_probs - log_probs.detach()).exp()
    g = trpo.flat_gradient(trpo.surrogate_advantage(ratio, advantages.double()), parameters)
    product = trpo.fisher_vector_product(agent.distribution(obs), parameters, damping=0.0)
    fisher = torch.stack([product(row) for row in torch.eye(len(g), dtype=torch.float64)])
    iterations, errors = np.arange(0, 41), {}
    for damping in (trpo.Args.cg_damping, 0.1, 0.01):
        h = fisher + damping * torch.eye(len(g), dtype=torch.float64)
        exact = torch.linalg.solve(h, g)
        error = [trpo.conjugate_gradient(lambda v: h @ v, g, int(k), 0.0) - exact for k in iterations]  # noqa: B023
        errors[damping] = np.array([float((e @ h @ e).sqrt() / (exact @ h @ exact).sqrt()) for e in error])
    return {"iterations": iterations, "errors": errors, "parameters": len(g)}


def draw_conjugate_gradient(data: dict, plt, ink: str):
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for (damping, error), color, style in zip(
        data["errors"].items(), ("#009E73", "#0072B2", "#E69F00"), ("-", "--", "-.")
    ):
        axis.semilogy(data["iterations"], error, style, color=color, linewidth=2, label=f"damping {damping}")
    axis.axvline(trpo.Args.cg_iterations, color=ink, linewidth=0.8, linestyle=":")
    axis.text(trpo.Args.cg_iterations + 0.5, axis.get_ylim()[0] * 3, "the script's default", color=ink, fontsize=8)
    axis.set(xlabel="iterations of conjugate gradient", ylabel="error in the H-norm, relative")
    axis.set(title=f"a policy with {data['parameters']} parameters")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


# ---------------------------------------------------------------------------- real runs


def kl_per_update(args: Args, env_id: str = "InvertedPendulum-v5") -> dict:
    """The mean KL of each update of a real training run of each algorithm, as the scripts log it, on a task where the
    full step of NPG leaves the trust region now and then; how many steps TRPO shortened."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bare = {"adapt_lr": False}  # what the objective does, without the learning rate that follows the KL
    runs = {"TRPO": (trpo, {}, "losses/kl"), "NPG": (trpo, {"line_search": False}, "losses/kl"),
            "PPO, clipped": (clip, bare, "losses/approx_kl"), "PPO, adaptive KL": (kl, bare, "losses/kl")}  # fmt: skip
    data = {"delta": trpo.Args.max_kl, "target": kl.Args.target_kl}
    for name, (script, own, tag) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            common = {"env_id": env_id, "total_timesteps": args.total_timesteps, "hidden_size": args.hidden_size}
            script.train(script.Args(**common, **own, run_dir=Path(folder)))
            events = EventAccumulator(folder, size_guidance={"scalars": 0})
            events.Reload()
            data[name] = np.array([(event.step, event.value) for event in events.Scalars(tag)])
            if name == "TRPO":
                data["shortened"] = sum(event.value > 1 for event in events.Scalars("charts/line_search_steps"))
    return data


def draw_kl_per_update(data: dict, plt, ink: str):
    figure, axes = plt.subplots(1, 4, figsize=(8.4, 3.0), sharey=True)
    beyond = {name: int((data[name][:, 1] > data["delta"]).sum()) for name in COLORS}
    updates = {name: len(data[name]) for name in COLORS}
    notes = {
        "TRPO": f"{beyond['TRPO']} of {updates['TRPO']} beyond δ\n({data['shortened']} steps shortened)",
        "NPG": f"{beyond['NPG']} of {updates['NPG']} beyond δ\n(no line search)",
        "PPO, clipped": "no δ, no target\n(KL estimated)",
        "PPO, adaptive KL": f"target {data['target']}\n(dashed)",
    }
    for axis, (name, color) in zip(axes, COLORS.items()):
        steps, divergence = data[name].T
        axis.semilogy(steps / 1e3, divergence, ".", markersize=3, color=color)
        if name in ("TRPO", "NPG"):
            outside = divergence > data["delta"]
            axis.plot(steps[outside] / 1e3, divergence[outside], "x", markersize=5, color="#D55E00")
        axis.axhline(data["delta"], color=ink, linewidth=0.8, linestyle=":")
        axis.set_title(f"{name}\n{notes[name]}", fontsize=9)
        axis.set_xlabel("thousand steps")
    axes[3].axhline(data["target"], color=ink, linewidth=0.8, linestyle="--")
    everything = np.concatenate([data[name][:, 1] for name in COLORS])
    axes[0].set_ylim(max(everything.min(), 1e-4) / 1.5, everything.max() * 1.5)
    axes[0].set_ylabel(f"KL of an update; dotted: δ = {data['delta']}")
    return figure


def steered_rate(args: Args, env_ids: tuple[str, ...] = ("HalfCheetah-v5", "Humanoid-v5")) -> dict:
    """Learning rate and KL of every iteration of the clipped script, with the rate on its straight line and steered."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = {}
    for env_id in env_ids:
        for steered in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                common = {"env_id": env_id, "total_timesteps": args.total_timesteps, "hidden_size": args.hidden_size}
                clip.train(clip.Args(**common, adapt_lr=steered, run_dir=Path(folder)))
                events = EventAccumulator(folder, size_guidance={"scalars": 0})
                events.Reload()
                tags = ("charts/learning_rate", "losses/approx_kl")
                series = [[(event.step, event.value) for event in events.Scalars(tag)] for tag in tags]
                data[env_id, steered] = dict(zip(tags, np.array(series)))
    return data


def draw_steered_rate(data: dict, plt, ink: str):
    env_ids = list(dict.fromkeys(env_id for env_id, _ in data))
    figure, axes = plt.subplots(2, len(env_ids), figsize=(8, 4.2), sharex=True, sharey="row")
    for column, env_id in zip(axes.T, env_ids):
        for steered, color, label in ((False, "#D55E00", "on its line"), (True, COLORS["PPO, clipped"], "steered")):
            for axis, (tag, scale) in zip(column, (("charts/learning_rate", 1e4), ("losses/approx_kl", 1.0))):
                steps, values = data[env_id, steered][tag].T
                axis.plot(steps / 1e3, scale * values, color=color, linewidth=1.5, label=label)
        column[1].axhspan(clip.Args.target_kl / 1.5, clip.Args.target_kl * 1.5, color=ink, alpha=0.15, linewidth=0)
        column[0].set_title(env_id, fontsize=10)
        column[1].set(yscale="log", xlabel="thousand steps")
    axes[0, 0].set_ylabel("learning rate, $10^{-4}$")
    axes[1, 0].set_ylabel("KL of an iteration\n(band: left as it is)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def cheetah(args: Args) -> None:
    """Three seconds of the saved policy, from its first evaluation episode."""
    from moviepy import VideoFileClip

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(shutil.copytree(args.film, Path(folder, "run"), ignore=shutil.ignore_patterns("videos")))
        options = clip.parse_args(["--evaluate", str(run_dir), "--capture-video", "--eval-episodes", "1"])
        clip.evaluate(options, run_dir)
        (video,) = (run_dir / "videos").glob("*.mp4")
        with VideoFileClip(str(video)) as film:
            film = film.subclipped(2, 5).cropped(y1=200).resized(width=240)
            film.write_gif(str(args.folder / "cheetah.gif"), fps=12, logger=None)


def main(args: Args) -> None:
    if args.film:
        return cheetah(args)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        data = globals()[name](args)
        for style, ink, paper in (("light", "#24292f", "#ffffff"), ("dark", "#d0d7de", "#0d1117")):
            keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
            look = {**dict.fromkeys(keys, ink), "figure.facecolor": paper, "axes.facecolor": paper}
            look |= {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
            with plt.rc_context(look):
                figure = globals()[f"draw_{name}"](data, plt, ink)
                figure.savefig(args.folder / f"{name}-{style}.png", dpi=130)
                plt.close(figure)
        print(args.folder / f"{name}-light.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
