"""Conjugate gradient, Fisher-vector product, full step and line search, each beside its explicit counterpart, and the
update that they make."""

import math

import pytest
import torch
from helpers import agent_of
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


def test_conjugate_gradient_stops_early_at_its_tolerance_of_small_systems_too():
    generator = torch.Generator().manual_seed(0)
    matrix, b = random_spd(100, generator), torch.randn(100, dtype=torch.float64, generator=generator)
    products, b = [], b / b.norm()
    for scale in (1.0, 1e-6):
        x = trpo.conjugate_gradient(lambda v: products.append(1) or matrix @ v, scale * b, 100, 1e-3)
        assert (scale * b - matrix @ x).norm() <= 1e-3 * scale
        assert 2 < len(products) < 40
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


@pytest.mark.parametrize("diagonal", [(1, 1, 1), (-1, -1, -1), (0, 0, 0), (math.nan, 1, 1), (1, 0, 2), (1, -1, 2)])
def test_conjugate_gradient_returns_neither_a_nan_nor_what_rounding_blew_up(diagonal):
    """Where a matrix is singular, rounding gives a direction without curvature a tiny one, along which x would grow."""
    matrix, generator = torch.tensor(diagonal).float(), torch.Generator().manual_seed(0)
    solve = lambda b: trpo.conjugate_gradient(lambda v: matrix * v, b, 10, 1e-10)  # noqa: E731
    assert solve(torch.zeros(3)).equal(torch.zeros(3)) and solve(torch.full((3,), math.nan)).equal(torch.zeros(3))
    for b in (torch.tensor([1e-30, 0.0, 0.0]), *torch.randn(20, 3, generator=generator)):
        assert solve(b).norm() < 1e6


def small_policy(num_samples: int = 200):
    """(agent with 20 policy parameters in float64, observations, these parameters, the policy as a function of them)"""
    torch.manual_seed(3)
    agent = agent_of(trpo, 2, hidden_size=2).double()
    torch.nn.init.normal_(agent.actor_mean[-1].weight)
    obs, names = torch.randn(num_samples, 2, dtype=torch.float64), list(dict(agent.actor_mean.named_parameters()))

    def policy_at(*parameters):
        mean = torch.func.functional_call(agent.actor_mean, dict(zip(names, parameters)), (obs,))
        return Normal(mean, parameters[-1].exp())

    return agent, obs, agent.actor_parameters(), policy_at


def test_fisher_vector_product_equals_the_explicit_hessian_and_is_symmetric_and_positive():
    agent, obs, parameters, policy_at = small_policy()
    theta, old = parameters_to_vector(parameters).detach(), policy_at(*(p.detach() for p in parameters))

    def kl_at(theta):
        pieces = theta.split([p.numel() for p in parameters])
        return kl_divergence(old, policy_at(*(x.view_as(p) for x, p in zip(pieces, parameters)))).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(kl_at, theta)
    identity = torch.eye(len(theta), dtype=torch.float64)
    product = torch.stack([trpo.fisher_vector_product(agent.distribution(obs), parameters, 0.0)(v) for v in identity])
    torch.testing.assert_close(product, hessian, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(product, product.T)
    assert torch.linalg.eigvalsh(product).min() > -1e-10
    damped = trpo.fisher_vector_product(agent.distribution(obs), parameters, 0.5)(identity[0])
    torch.testing.assert_close(damped, hessian[0] + 0.5 * identity[0])


def test_fisher_vector_product_is_the_expectation_of_the_scores_outer_product():
    """H = E[∇log π ∇log πᵀ] over actions of the policy itself, here over 300,000 of them."""
    agent, obs, parameters, policy_at = small_policy(num_samples=30)
    v = torch.randn(len(parameters_to_vector(parameters)), dtype=torch.float64)
    with torch.no_grad():
        actions = agent.distribution(obs).sample((10_000,))

    def log_probs(*values):
        return policy_at(*values).log_prob(actions).sum(-1)

    pieces = tuple(x.view_as(p) for x, p in zip(v.split([p.numel() for p in parameters]), parameters))
    primals = tuple(p.detach() for p in parameters)
    _, scores_v = torch.func.jvp(log_probs, primals, pieces)  # ∇log π · v of every sample
    _, pullback = torch.func.vjp(log_probs, *primals)
    sampled = torch.cat([g.reshape(-1) for g in pullback(scores_v / scores_v.numel())])
    product = trpo.fisher_vector_product(agent.distribution(obs), parameters, 0.0)(v)
    assert (sampled - product).norm() < 0.02 * product.norm()


def test_full_step_reaches_the_edge_of_the_quadratic_trust_region_unless_it_is_bounded():
    generator = torch.Generator().manual_seed(2)
    hessian, g = random_spd(6, generator), torch.randn(6, dtype=torch.float64, generator=generator)
    x = torch.linalg.solve(hessian, g)
    step = trpo.full_step(x, hessian @ x, 0.01)
    assert float(0.5 * step @ hessian @ step) == pytest.approx(0.01)
    torch.testing.assert_close(step / step.norm(), x / x.norm())
    size = float(step.norm() / x.norm())
    torch.testing.assert_close(trpo.full_step(x, hessian @ x, 0.01, max_step_size=0.5 * size), 0.5 * step)
    torch.testing.assert_close(trpo.full_step(x, hessian @ x, 0.01, max_step_size=2.0 * size), step)


# (improvement, KL) of each try in turn; index of the first that is acceptable at δ = 0.01, None for none
@pytest.mark.parametrize(
    "tries, accepted",
    [
        ([(1.0, 0.01)], 0),  # on the edge
        ([(9.0, 0.0101), (0.5, 0.005)], 1),  # a better surrogate outside the region is refused
        ([(-1.0, 0.005), (0.0, 0.004), (0.1, 0.003)], 2),  # neither worse nor equal will do
        ([(math.nan, 0.001), (math.inf, 0.001), (1.0, math.nan), (0.1, 0.003)], 3),
        ([(1.0, 0.02)] * 5 + [(-1.0, 0.001)] * 5, None),
    ],
)
def test_line_search_takes_the_first_acceptable_step_or_none(tries, accepted):
    (theta_old, step), left = torch.randn(2, 5), list(tries)
    result = trpo.line_search(lambda theta: left.pop(0), theta_old, step, 0.01, 0.8, 10)
    assert not left and result.tries == len(tries) and (result.improvement, result.kl) == tries[-1]
    if accepted is None:
        assert not result.accepted and result.theta is theta_old
    else:
        assert result.accepted and result.theta.equal(theta_old + 0.8**accepted * step)


def learnable_batch():
    """(agent, a rollout of it, its centred advantages): the nearer an action is to 0.3, the better."""
    torch.manual_seed(0)
    agent, obs = agent_of(trpo), torch.randn(256, 2, 3)
    with torch.no_grad():
        actions = agent.distribution(obs).sample()
    advantages = -((actions - 0.3) ** 2).sum(-1).flatten()
    return agent, trpo.Rollout(obs, actions, None, None, None, None), advantages - advantages.mean()


def theta_of(agent):
    return parameters_to_vector(agent.actor_parameters()).detach().clone()


def old_policy(agent, rollout):
    """(distribution, log-probability of the actions) before an update."""
    with torch.no_grad():
        distribution = agent.distribution(rollout.obs.flatten(0, 1))
        return distribution, distribution.log_prob(rollout.actions.flatten(0, 1))


@pytest.mark.parametrize("offset", [0.0, 3.0])  # also where the advantages are not centred: the old surrogate is not 0
def test_an_update_improves_within_the_trust_region_and_says_by_how_much(offset):
    agent, rollout, advantages = learnable_batch()
    (old, old_log_probs), theta = old_policy(agent, rollout), theta_of(agent)
    metrics = trpo.update(agent, rollout, advantages + offset, trpo.Args())
    new, log_probs = old_policy(agent, rollout)
    gain = (((log_probs - old_log_probs).exp() - 1.0) * (advantages + offset)).mean()
    assert metrics["charts/skipped_updates"] == 0.0 and not theta_of(agent).equal(theta)
    assert metrics["charts/step_norm"] == pytest.approx(float((theta_of(agent) - theta).norm()), rel=1e-4)
    assert metrics["losses/surrogate_improvement"] == pytest.approx(float(gain), abs=1e-5) and gain > 0.0
    assert metrics["losses/kl"] == pytest.approx(float(kl_divergence(old, new).mean()), rel=1e-4)
    assert 0.004 < metrics["losses/kl"] <= 0.01


def test_without_line_search_the_parameters_move_by_exactly_the_full_step(monkeypatch):
    agent, rollout, advantages = learnable_batch()
    theta, steps, original = theta_of(agent), [], trpo.full_step
    monkeypatch.setattr(trpo, "full_step", lambda *x: steps.append(original(*x)) or steps[-1].clone())
    metrics = trpo.update(agent, rollout, advantages, trpo.Args(line_search=False))
    assert metrics["charts/skipped_updates"] == 0.0 and theta_of(agent).equal(theta + steps[0])


def test_the_update_solves_with_the_damped_curvature_of_the_subsample_and_measures_with_it_undamped(monkeypatch):
    (agent, rollout, advantages), calls, solved = learnable_batch(), [], []
    old, _, _ = learnable_batch()
    full_step, solver = trpo.full_step, trpo.conjugate_gradient
    subsample = old.distribution(rollout.obs.flatten(0, 1)[::4])
    hessian = trpo.fisher_vector_product(subsample, old.actor_parameters(), 0.0)
    monkeypatch.setattr(trpo, "full_step", lambda *x: calls.append(x) or full_step(*x))
    monkeypatch.setattr(trpo, "conjugate_gradient", lambda *x: solved.append(x) or solver(*x))
    options = {"cg_iterations": 7, "cg_residual_tolerance": 1e-3, "max_kl": 0.02, "max_step_size": 0.3}
    trpo.update(agent, rollout, advantages, trpo.Args(fisher_subsample=4, cg_damping=0.5, **options))
    ((x, hessian_x, *bounds),) = calls
    ((matvec, _, *limits),) = solved
    torch.testing.assert_close(hessian_x, hessian(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(matvec(x), hessian(x) + 0.5 * x)
    assert bounds == [0.02, 0.3] and limits == [7, 1e-3]


@pytest.mark.parametrize("line_search", [True, False])
def test_no_update_makes_the_policy_narrower_than_its_floor(line_search):
    """And the KL of an update is that of the policy which the floor leaves, not of the step that was cut."""
    agent, rollout, _ = learnable_batch()
    args = trpo.Args(min_log_std=-0.52, line_search=line_search)
    with torch.no_grad():  # only a narrower policy is better than this one, in its second action alone
        advantages = -((rollout.actions - agent.distribution(rollout.obs).mean)[..., 1] ** 2).flatten()
    for _ in range(3):
        old, _ = old_policy(agent, rollout)
        metrics = trpo.update(agent, rollout, advantages - advantages.mean(), args)
        kl = float(trpo.mean_kl(old, old_policy(agent, rollout)[0]))
        assert metrics["charts/skipped_updates"] == 0.0 and metrics["losses/kl"] == pytest.approx(kl, rel=1e-4)
        assert metrics["charts/step_norm"] > 0
    first, second = agent.actor_log_std.tolist()
    assert second == pytest.approx(-0.52) and first > -0.52


def test_the_floor_cuts_the_step_of_the_log_std_alone_and_pushes_nothing_up():
    agent = agent_of(trpo)  # with a log-std of -0.5, its last two parameters
    step = torch.full((len(theta_of(agent)),), -100.0)
    step[-1] = 0.1
    for floor, down in (-0.52, -0.02), (0.0, 0.0):  # a run may be resumed with a floor above its policy
        kept = trpo.keep_log_std(step, agent, floor)
        assert kept[:-2].equal(step[:-2]) and kept[-2:].tolist() == pytest.approx([down, 0.1])


@pytest.mark.parametrize("line_search", [True, False])
@pytest.mark.parametrize("spoil", ["zero advantages", "a nan", "an infinity", "negative curvature", "an endless step"])
def test_an_impossible_update_is_skipped_and_the_policy_stays_bit_for_bit(spoil, line_search, monkeypatch, capsys):
    agent, rollout, advantages = learnable_batch()
    if spoil == "zero advantages":
        advantages.zero_()
    elif spoil in ("a nan", "an infinity"):
        advantages[3] = math.nan if spoil == "a nan" else math.inf
    elif spoil == "negative curvature":
        monkeypatch.setattr(trpo, "fisher_vector_product", lambda *_: lambda v: -v)
    else:
        monkeypatch.setattr(trpo, "full_step", lambda x, *_: torch.full_like(x, 1e30))
    theta = theta_of(agent)
    metrics = trpo.update(agent, rollout, advantages, trpo.Args(line_search=line_search))
    assert metrics["charts/skipped_updates"] == 1.0 and "policy update skipped" in capsys.readouterr().out
    assert theta_of(agent).equal(theta) and metrics["losses/kl"] == metrics["charts/step_norm"] == 0.0
    assert spoil in ("a nan", "an infinity") or all(math.isfinite(value) for value in metrics.values())
