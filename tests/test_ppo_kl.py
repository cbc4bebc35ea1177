"""The penalised surrogate beside autograd, and the rule for its coefficient."""

import gymnasium as gym
import pytest
import torch
from test_scripts import quick, scalars
from torch.distributions import kl_divergence

import ppo_kl_continuous as ppo


@pytest.mark.parametrize(
    "kl, factor",
    [
        (0.0, 0.5),
        (0.01 / 1.5 * 0.999, 0.5),
        (0.01 / 1.5, 1.0),
        (0.01 / 1.5 * 1.001, 1.0),
        (0.01, 1.0),
        (0.015 * 0.999, 1.0),
        (0.015, 1.0),
        (0.015 * 1.001, 2.0),
        (1.0, 2.0),
    ],
)
def test_the_coefficient_doubles_above_and_halves_below_its_thresholds(kl, factor):
    assert ppo.adapt_kl_coef(3.0, kl, 0.01) == 3.0 * factor


def test_the_coefficient_comes_back_from_either_bound():
    for kl, back, bound in ((0.0, 1.0, 1e-4), (1.0, 0.0, 1e4)):
        kl_coef = 1.0
        for _ in range(2000):
            kl_coef = ppo.adapt_kl_coef(kl_coef, kl, 0.01)
        assert kl_coef == bound
        for _ in range(20):
            kl_coef = ppo.adapt_kl_coef(kl_coef, back, 0.01)
        assert kl_coef > 1.0 if back else kl_coef < 1.0


def test_penalized_surrogate_is_the_surrogate_less_the_price_of_the_kl():
    ratio, advantages, kl = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]), torch.tensor([0.0, 0.5])
    result = ppo.kl_penalized_surrogate(ratio, advantages, kl, 4.0)
    assert result.tolist() == [3.0, -4.0]
    assert ppo.kl_penalized_surrogate(ratio, advantages, kl, 0.0).tolist() == [3.0, -2.0]


def test_at_the_old_policy_the_penalty_has_no_gradient_and_its_hessian_is_the_coefficient_times_the_fisher_matrix():
    torch.manual_seed(0)
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (2,)), hidden_size=2).double()
    torch.nn.init.normal_(agent.actor_mean[-1].weight)
    obs = torch.randn(50, 2, dtype=torch.float64)
    with torch.no_grad():
        old = agent.distribution(obs)
        actions, advantages = old.sample(), torch.randn(50, dtype=torch.float64)
    named = {n: p for n, p in agent.named_parameters() if n.startswith("actor")}
    sizes = [p.numel() for p in named.values()]

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.agent = agent

        def forward(self):
            return agent.distribution(obs)

    def policy_at(theta):
        values = {f"agent.{n}": x.view_as(p) for (n, p), x in zip(named.items(), theta.split(sizes))}
        return torch.func.functional_call(Policy(), values, ())

    def objective(theta, kl_coef):
        new = policy_at(theta)
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        return ppo.kl_penalized_surrogate(ratio, advantages, ppo.gaussian_kl(old, new), kl_coef).mean()

    theta = torch.cat([p.detach().flatten() for p in named.values()]).requires_grad_()
    plain, penalised = (torch.autograd.grad(objective(theta, c), theta)[0] for c in (0.0, 5.0))
    assert plain.norm() > 0.1
    torch.testing.assert_close(penalised, plain, rtol=1e-12, atol=1e-12)
    hessian = torch.autograd.functional.hessian
    fisher = hessian(lambda x: kl_divergence(old, policy_at(x)).mean(), theta.detach())
    difference = hessian(lambda x: objective(x, 0.0) - objective(x, 5.0), theta.detach())
    assert fisher.norm() > 0.1
    torch.testing.assert_close(difference, 5.0 * fisher, rtol=1e-9, atol=1e-9)


def test_a_fixed_coefficient_stays_and_may_be_0(tmp_path):
    ppo.train(quick(ppo, tmp_path / "a", kl_coef=0.0, adapt_kl_coef=False))
    assert float(ppo.load_checkpoint(tmp_path / "a")["agent"]["kl_coef"]) == 0.0
    ppo.main(["--resume", str(tmp_path / "a"), "--total-timesteps", "8192", "--kl-coef", "10"])
    assert float(ppo.load_checkpoint(tmp_path / "a")["agent"]["kl_coef"]) == 10.0


def test_the_coefficient_follows_the_exact_kl_once_an_iteration_and_across_a_resume(tmp_path, monkeypatch):
    asked = []
    original = ppo.adapt_kl_coef
    monkeypatch.setattr(ppo, "adapt_kl_coef", lambda *x: asked.append(x) or original(*x))
    args = quick(ppo, tmp_path / "a", num_epochs=2, kl_coef=3.0)
    ppo.train(args)
    longer = {"num_epochs": 2, "kl_coef": 3.0, "total_timesteps": 2 * args.total_timesteps}
    ppo.train(quick(ppo, None, resume=tmp_path / "a", **longer))
    logged = scalars(tmp_path / "a")
    assert [kl for _, kl, _ in asked] == pytest.approx([value for _, value in logged["losses/kl"]])
    expected = 3.0
    for kl_coef, kl, target_kl in asked:
        assert kl_coef == expected and target_kl == args.target_kl
        expected = original(kl_coef, kl, target_kl)
    assert expected != 3.0 and len(asked) == 4
    assert float(ppo.load_checkpoint(tmp_path / "a")["agent"]["kl_coef"]) == expected
    assert [value for _, value in logged["charts/kl_coef"]] == [kl_coef for kl_coef, _, _ in asked]
