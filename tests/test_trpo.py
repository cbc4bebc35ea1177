"""Conjugate gradient, Fisher-vector product, full step and line search, each beside its explicit counterpart."""

import copy
import math

import gymnasium as gym
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector

import trpo_continuous as trpo


def random_spd(n: int, generator: torch.Generator) -> torch.Tensor:
    """A symmetric positive definite matrix with eigenvalues from 1 to 10."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q @ torch.diag(torch.linspace(1.0, 10.0, n, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("n", [1, 2, 10, 50, 200])
def test_conjugate_gradient_solves_in_n_iterations(n):
    generator = torch.Generator().manual_seed(n)
    matrix, b = random_spd(n, generator), torch.randn(n, dtype=torch.float64, generator=generator)
    x = trpo.conjugate_gradient(lambda v: matrix @ v, b, n, 1e-12)
    expected = torch.linalg.solve(matrix, b)
    assert (x - expected).norm() <= 1e-8 * expected.norm()


def test_conjugate_gradient_stops_early_at_its_tolerance():
    generator = torch.Generator().manual_seed(0)
    matrix, b = random_spd(100, generator), torch.randn(100, dtype=torch.float64, generator=generator)
    products = []
    x = trpo.conjugate_gradient(lambda v: products.append(1) or matrix @ v, b, 100, 1e-3)
    assert 2 < len(products) < 40
    assert (b - matrix @ x).norm() <= 1e-3
    products.clear()
    assert trpo.conjugate_gradient(lambda v: products.append(1) or v, b, 100, 1e-10).equal(b)  # the identity, in one
    assert len(products) == 1


def test_conjugate_gradient_error_in_the_h_norm_falls_monotonically():
    generator = torch.Generator().manual_seed(1)
    matrix, b = random_spd(30, generator), torch.randn(30, dtype=torch.float64, generator=generator)
    expected, errors = torch.linalg.solve(matrix, b), []
    for k in range(21):
        e = trpo.conjugate_gradient(lambda v: matrix @ v, b, k, 0.0) - expected
        errors.append(float(e @ matrix @ e))
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))


@pytest.mark.parametrize("matrix", [torch.eye(3), -torch.eye(3), torch.zeros(3, 3), torch.full((3, 3), math.nan)])
def test_conjugate_gradient_never_returns_a_nan(matrix):
    assert trpo.conjugate_gradient(lambda v: matrix @ v, torch.zeros(3), 10, 1e-10).equal(torch.zeros(3))
    for b in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1e-30, 0.0, 0.0])):
        assert trpo.conjugate_gradient(lambda v: matrix @ v, b, 10, 1e-10).isfinite().all()
    assert trpo.conjugate_gradient(lambda v: matrix @ v, torch.full((3,), math.nan), 10, 1e-10).equal(torch.zeros(3))


@pytest.mark.parametrize("diagonal", [(1.0, 0.0, 2.0), (1.0, -1.0, 2.0), (3.0, 0.0, 0.0)])
def test_conjugate_gradient_stops_where_the_matrix_is_singular_or_indefinite(diagonal):
    """Rounding gives a direction without curvature a tiny one, by which x would grow beyond all bounds."""
    matrix = torch.tensor(diagonal)
    for seed in range(20):
        b = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        assert trpo.conjugate_gradient(lambda v: matrix * v, b, 10, 1e-10).norm() < 1e6


def small_policy(num_samples: int = 200):
    """A policy of 21 parameters in float64, observations for it, and its mean KL as a function of θ."""
    torch.manual_seed(3)
    agent = trpo.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (2,)), hidden_size=2).double()
    torch.nn.init.normal_(agent.actor_mean[-1].weight)
    obs = torch.randn(num_samples, 2, dtype=torch.float64)
    parameters = list(agent.actor_parameters())
    names = [f"actor_mean.{name}" for name, _ in agent.actor_mean.named_parameters()] + ["actor_log_std"]

    def kl_at(theta):
        pieces = theta.split([p.numel() for p in parameters])
        values = {name: piece.view_as(p) for name, piece, p in zip(names, pieces, parameters)}
        new_mean = torch.func.functional_call(
            agent.actor_mean,
            {n.removeprefix("actor_mean."): v for n, v in values.items() if n != "actor_log_std"},
            (agent.obs_stats.normalize(obs),),
        )
        old = agent.distribution(obs)
        new = torch.distributions.Normal(new_mean, values["actor_log_std"].exp())
        return (
            torch.distributions.kl_divergence(torch.distributions.Normal(old.mean.detach(), old.stddev.detach()), new)
            .sum(-1)
            .mean()
        )

    return agent, obs, parameters, kl_at


def test_fisher_vector_product_equals_the_explicit_hessian_and_is_symmetric_and_positive():
    agent, obs, parameters, kl_at = small_policy()
    theta = parameters_to_vector(parameters).detach()
    hessian = torch.autograd.functional.hessian(kl_at, theta)
    identity = torch.eye(len(theta), dtype=torch.float64)
    product = torch.stack([trpo.fisher_vector_product(agent.distribution(obs), parameters, 0.0)(v) for v in identity])
    torch.testing.assert_close(product, hessian, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(product, product.T)
    assert torch.linalg.eigvalsh(product).min() > -1e-10
    damped = trpo.fisher_vector_product(agent.distribution(obs), parameters, 0.5)(identity[0])
    torch.testing.assert_close(damped, hessian[0] + 0.5 * identity[0])
    pairs = agent.distribution(obs.unflatten(0, (2, -1)))  # the mean over all states, however they are laid out
    in_pairs = trpo.fisher_vector_product(pairs, parameters, 0.0)(identity[0])
    torch.testing.assert_close(in_pairs, hessian[0], rtol=1e-9, atol=1e-10)


def test_fisher_vector_product_is_the_expectation_of_the_scores_outer_product():
    """H = E[∇log π ∇log πᵀ] over actions of the policy itself, here over 300,000 of them."""
    agent, obs, parameters, _ = small_policy(num_samples=30)
    v = torch.randn(len(parameters_to_vector(parameters)), dtype=torch.float64)
    with torch.no_grad():
        old = agent.distribution(obs)
        actions = old.sample((10_000,))

    def log_probs(*values):
        call = torch.func.functional_call
        mean = call(agent.actor_mean, dict(zip(dict(agent.actor_mean.named_parameters()), values)), (obs,))
        return torch.distributions.Normal(mean, values[-1].exp()).log_prob(actions).sum(-1)

    pieces = tuple(x.view_as(p) for x, p in zip(v.split([p.numel() for p in parameters]), parameters))
    primals = tuple(p.detach() for p in parameters)
    _, scores_v = torch.func.jvp(log_probs, primals, pieces)  # ∇log π · v of every sample
    _, pullback = torch.func.vjp(log_probs, *primals)
    sampled = torch.cat([g.reshape(-1) for g in pullback(scores_v / scores_v.numel())])
    product = trpo.fisher_vector_product(agent.distribution(obs), parameters, 0.0)(v)
    assert (sampled - product).norm() < 0.02 * product.norm()


def test_full_step_reaches_the_edge_of_the_quadratic_trust_region():
    generator = torch.Generator().manual_seed(2)
    hessian, g = random_spd(6, generator), torch.randn(6, dtype=torch.float64, generator=generator)
    x = torch.linalg.solve(hessian, g)
    step = trpo.full_step(x, hessian @ x, 0.01)
    assert float(0.5 * step @ hessian @ step) == pytest.approx(0.01)
    torch.testing.assert_close(step / step.norm(), x / x.norm())


def test_full_step_is_bounded_where_the_trust_region_leaves_more_room():
    x, hessian = torch.tensor([3.0, 4.0]), 2.0 * torch.eye(2)  # xᵀHx = 50, so sqrt(2δ / xᵀHx) = 0.02 for δ = 0.01
    torch.testing.assert_close(trpo.full_step(x, hessian @ x, 0.01, max_step_size=0.005), 0.005 * x)
    torch.testing.assert_close(trpo.full_step(x, hessian @ x, 0.01, max_step_size=0.05), 0.02 * x)


# (improvement, KL) of each try in turn; index of the first that is acceptable at δ = 0.01, None for none
@pytest.mark.parametrize(
    "tries, accepted",
    [
        ([(1.0, 0.009)], 0),
        ([(1.0, 0.01)], 0),  # on the edge
        ([(9.0, 0.0101), (0.5, 0.005)], 1),  # a better surrogate outside the region is refused
        ([(-1.0, 0.005), (0.0, 0.004), (0.1, 0.003)], 2),  # neither worse nor equal will do
        ([(math.nan, 0.001), (math.inf, 0.001), (1.0, math.nan), (0.1, 0.003)], 3),
        ([(1.0, 0.02)] * 10, None),
        ([(-1.0, 0.001)] * 10, None),
    ],
)
def test_line_search_takes_the_first_acceptable_step_or_none(tries, accepted):
    theta_old, step = torch.randn(5), torch.randn(5)
    seen = []

    def evaluate_at(theta):
        seen.append(theta)
        return tries[len(seen) - 1]

    result = trpo.line_search(evaluate_at, theta_old, step, 0.01, 0.8, 10)
    if accepted is None:
        assert not result.accepted and len(seen) == 10 == result.tries and result.theta is theta_old
        assert (result.improvement, result.kl) == tries[-1]
    else:
        assert result.accepted and len(seen) == accepted + 1 == result.tries
        assert result.theta.equal(theta_old + 0.8**accepted * step)


def learnable_batch():
    torch.manual_seed(0)
    agent = trpo.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))
    obs = torch.randn(512, 3)
    with torch.no_grad():
        actions = agent.distribution(obs).sample()
    return agent, obs, actions, -((actions - 0.3) ** 2).sum(-1)


def theta_of(agent):
    return parameters_to_vector(agent.actor_parameters()).detach().clone()


def test_an_update_improves_within_the_trust_region():
    agent, obs, actions, advantages = learnable_batch()
    old, theta = agent.distribution(obs), theta_of(agent)
    metrics, skipped = trpo.update_policy(agent, obs, actions, advantages - advantages.mean(), trpo.Args())
    assert not skipped and not theta_of(agent).equal(theta)
    assert metrics["losses/surrogate_improvement"] > 0
    assert metrics["losses/kl"] == pytest.approx(float(trpo.mean_kl(old, agent.distribution(obs)).detach()), rel=1e-5)
    assert 0.005 < metrics["losses/kl"] <= 0.01


def test_without_line_search_the_parameters_move_by_exactly_the_full_step(monkeypatch):
    agent, obs, actions, advantages = learnable_batch()
    theta, steps, original = theta_of(agent), [], trpo.full_step
    monkeypatch.setattr(trpo, "full_step", lambda *x: steps.append(original(*x)) or steps[-1].clone())
    _, skipped = trpo.update_policy(agent, obs, actions, advantages, trpo.Args(line_search=False))
    assert not skipped and theta_of(agent).equal(theta + steps[0])


def test_a_step_that_leaves_the_trust_region_is_shortened_and_logged_as_it_was_taken(monkeypatch):
    agent, obs, actions, advantages = learnable_batch()
    theta, steps, original = theta_of(agent), [], trpo.full_step
    monkeypatch.setattr(trpo, "full_step", lambda *x: steps.append(4 * original(*x)) or steps[-1].clone())
    log_prob = agent.distribution(obs).log_prob(actions)
    advantages = advantages - advantages.mean()
    surrogate = trpo.surrogate_advantage((log_prob - log_prob.detach()).exp(), advantages)
    g = trpo.flat_gradient(surrogate, agent.actor_parameters())
    metrics, _ = trpo.update_policy(agent, obs, actions, advantages, trpo.Args(backtrack_coef=0.6))
    tries = metrics["charts/line_search_steps"]
    step = 0.6 ** (tries - 1) * steps[0]
    assert 3 <= tries < 10
    torch.testing.assert_close(theta_of(agent), theta + step)
    assert metrics["charts/step_norm"] == pytest.approx(float(step.norm()), rel=1e-4)
    assert metrics["losses/expected_improvement"] == pytest.approx(float(g @ step), rel=1e-3)


@pytest.mark.parametrize("line_search", [True, False])
def test_no_update_makes_the_policy_narrower_than_its_floor(line_search):
    """And the KL of an update is that of the policy which the floor leaves, not of the step that was cut."""
    agent, obs, actions, advantages = learnable_batch()
    args = trpo.Args(min_log_std=-0.52, line_search=line_search)
    with torch.no_grad():  # only a narrower policy is better than this one, in its second action alone
        advantages = -((actions - agent.distribution(obs).mean)[:, 1] ** 2)
    for _ in range(3):
        old = agent.distribution(obs)
        metrics, skipped = trpo.update_policy(agent, obs, actions, advantages - advantages.mean(), args)
        kl = float(trpo.mean_kl(old, agent.distribution(obs)))
        assert not skipped and metrics["losses/kl"] == pytest.approx(kl, rel=1e-4)
        assert metrics["charts/step_norm"] > 0
    first, second = agent.actor_log_std.tolist()
    assert second == pytest.approx(-0.52) and first > -0.52


@pytest.mark.parametrize("line_search", [True, False])
def test_a_policy_below_the_floor_learns_on_and_is_not_pushed_up(line_search):
    """A run resumed with a higher floor: a push of 0.3 would leave the trust region by itself."""
    agent, obs, actions, advantages = learnable_batch()
    floor = float(agent.actor_log_std.max()) + 0.3
    before = agent.actor_log_std.tolist()
    args = trpo.Args(min_log_std=floor, line_search=line_search)
    metrics, skipped = trpo.update_policy(agent, obs, actions, advantages - advantages.mean(), args)
    assert not skipped and metrics["losses/kl"] < 2 * args.max_kl
    assert all(new >= old for old, new in zip(before, agent.actor_log_std.tolist()))


def test_the_floor_is_for_the_log_std_alone():
    """Wherever it stands among the parameters: a bias below the floor moves as its gradient says."""
    agent, obs, actions, advantages = learnable_batch()
    with torch.no_grad():
        agent.actor_mean[-1].bias -= 5.0
        advantages = -(actions + 6.0).abs().sum(-1)
    agent.actor_log_std.requires_grad_(False)
    before = agent.actor_mean[-1].bias.detach().clone()
    _, skipped = trpo.update_policy(agent, obs, actions, advantages - advantages.mean(), trpo.Args())
    assert not skipped and (agent.actor_mean[-1].bias < before).all()


def test_a_run_is_resumed_with_a_higher_floor_than_it_began_at(tmp_path):
    size = "--num-envs 2 --num-steps 64 --num-minibatches 4 --eval-episodes 1 --env-id Pendulum-v1".split()
    trpo.main([*size, "--total-timesteps", "128", "--run-dir", str(tmp_path / "a")])
    log_std = trpo.load_checkpoint(tmp_path / "a")["agent"]["actor_log_std"]
    trpo.main(["--resume", str(tmp_path / "a"), "--min-log-std", "0", "--total-timesteps", "256"])
    assert (trpo.load_checkpoint(tmp_path / "a")["agent"]["actor_log_std"] >= log_std).all()


def zero_advantages(agent, obs, actions, advantages):
    advantages.zero_()


def nan_advantage(agent, obs, actions, advantages):
    advantages[3] = math.nan


def infinite_advantage(agent, obs, actions, advantages):
    advantages[3] = math.inf


def degenerate_policy(agent, obs, actions, advantages):
    agent.actor_log_std.data.fill_(math.log(1e-6))


def lying_hessian(agent, obs, actions, advantages):
    pass  # the curvature is patched below


@pytest.mark.parametrize("line_search", [True, False])
@pytest.mark.parametrize(
    "spoil, reason",
    [
        (zero_advantages, "gradient is zero"),
        (nan_advantage, "gradient is not finite"),
        (infinite_advantage, "gradient is not finite"),
        (degenerate_policy, "standard deviation"),
        (lying_hessian, "curvature"),
    ],
)
def test_an_impossible_update_is_skipped_with_its_reason_and_the_policy_stays_bit_for_bit(
    spoil, reason, line_search, monkeypatch
):
    agent, obs, actions, advantages = learnable_batch()
    if spoil is lying_hessian:
        monkeypatch.setattr(trpo, "fisher_vector_product", lambda *_: lambda v: -v)
    spoil(agent, obs, actions, advantages)
    theta = theta_of(agent)
    metrics, skipped = trpo.update_policy(agent, obs, actions, advantages, trpo.Args(line_search=line_search))
    assert reason in skipped and metrics["charts/skipped_updates"] == 1.0
    assert theta_of(agent).equal(theta)
    assert all(math.isfinite(value) for value in metrics.values() if spoil in (zero_advantages, lying_hessian))


def test_a_full_step_to_a_policy_that_is_not_finite_is_not_taken(monkeypatch):
    """Of natural policy gradient, which has no line search to reject it."""
    agent, obs, actions, advantages = learnable_batch()
    theta = theta_of(agent)
    monkeypatch.setattr(trpo, "full_step", lambda x, *_: torch.full_like(x, 1e30))
    _, skipped = trpo.update_policy(agent, obs, actions, advantages, trpo.Args(line_search=False))
    assert "not finite" in skipped and theta_of(agent).equal(theta)


def test_a_failed_line_search_leaves_the_policy_bit_for_bit():
    agent, obs, actions, advantages = learnable_batch()
    theta = theta_of(agent)
    args = trpo.Args(max_backtracks=1, max_kl=100.0)  # a full step so long that the surrogate falls
    metrics, skipped = trpo.update_policy(agent, obs, actions, advantages - advantages.mean(), args)
    assert "no step" in skipped and theta_of(agent).equal(theta)
    assert metrics["losses/kl"] == 0.0 and metrics["charts/skipped_updates"] == 1.0


def test_the_update_solves_for_the_damped_curvature_of_the_subsample(monkeypatch):
    calls = []
    agent, obs, actions, advantages = learnable_batch()
    old, original = copy.deepcopy(agent), trpo.full_step
    hessian = trpo.fisher_vector_product(old.distribution(obs[::4]), old.actor_parameters(), 0.5)
    monkeypatch.setattr(trpo, "full_step", lambda *x: calls.append(x) or original(*x))
    solver, limits = trpo.conjugate_gradient, []
    monkeypatch.setattr(trpo, "conjugate_gradient", lambda matvec, g, *x: limits.append(x) or solver(matvec, g, *x))
    options = {"cg_iterations": 7, "cg_residual_tolerance": 1e-3}
    args = trpo.Args(fisher_subsample=4, cg_damping=0.5, max_kl=0.02, max_step_size=0.3, **options)
    trpo.update_policy(agent, obs, actions, advantages - advantages.mean(), args)
    ((x, hessian_x, *bounds),) = calls
    torch.testing.assert_close(hessian_x, hessian(x))
    assert bounds == [0.02, 0.3] and limits == [(7, 1e-3)]


def test_the_improvement_is_that_over_the_old_policy():
    """Also where the advantages are not centred, so that the old surrogate is not 0."""
    agent, obs, actions, advantages = learnable_batch()
    old = copy.deepcopy(agent)
    metrics, skipped = trpo.update_policy(agent, obs, actions, advantages + 3.0, trpo.Args())
    ratio = (agent.distribution(obs).log_prob(actions) - old.distribution(obs).log_prob(actions)).exp()
    gain = ((ratio - 1.0) * (advantages + 3.0)).mean()
    assert not skipped and metrics["losses/surrogate_improvement"] == pytest.approx(float(gain.detach()), abs=1e-5)


def test_mean_kl_goes_from_the_old_to_the_new_policy():
    old, new = (Normal(torch.randn(50, 3).double(), torch.rand(3).double() + 0.1) for _ in range(2))
    torch.testing.assert_close(trpo.mean_kl(old, new), kl_divergence(old, new).sum(-1).mean())


def test_a_small_system_is_solved_as_well_as_a_large_one():
    generator = torch.Generator().manual_seed(0)
    matrix, b = random_spd(100, generator), torch.randn(100, dtype=torch.float64, generator=generator)
    b = b / b.norm()
    for scale in (1.0, 1e-6):
        x = trpo.conjugate_gradient(lambda v: matrix @ v, scale * b, 100, 1e-3)
        assert (scale * b - matrix @ x).norm() <= 1e-3 * scale
