"""The formulas that scripts share or PPO adds, against closed forms, brute force and autograd. What has one name is one
text in all scripts (test_contract.py), so one script stands for all."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import agent_of, each
from torch.distributions import Normal, kl_divergence

import ppo_clip_continuous as clip
import ppo_kl_continuous as kl_penalty


def brute_force_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """GAE eq. 16 as it stands: for each step the discounted sum of the TD residuals up to its episode's end."""
    num_steps, num_envs = rewards.shape
    advantages = torch.zeros_like(rewards)
    for n in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                bootstrap = 0.0 if terminations[k, n] else gamma * next_values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + bootstrap - values[k, n])
                if dones[k, n]:
                    break
    return advantages


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sum_over_each_episode(gamma, gae_lambda):
    generator = torch.Generator().manual_seed(7)
    rewards, values, next_values = torch.randn(3, 40, 5, dtype=torch.float64, generator=generator)
    ends = torch.rand(40, 5, generator=generator)
    terminations, dones = ends < 0.1, ends < 0.2  # terminations and truncations in one batch
    assert terminations.any() and (dones & ~terminations).any()
    arguments = (rewards, values, next_values, terminations, dones, gamma, gae_lambda)
    advantages, returns = clip.compute_gae(*arguments)
    torch.testing.assert_close(advantages, brute_force_gae(*arguments), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values)
    as_floats = clip.compute_gae(rewards, values, next_values, terminations.double(), dones.double(), gamma, gae_lambda)
    torch.testing.assert_close(as_floats[0], advantages)
    unread = next_values.masked_fill(terminations, float("nan"))  # nothing follows, so it may be anything
    assert clip.compute_gae(rewards, values, unread, terminations, dones, gamma, gae_lambda)[0].equal(advantages)


def test_time_limit_does_not_shorten_the_value_of_an_endless_task():
    """Reward 1 for ever is worth 1 / (1 - γ): with that value given, a time limit leaves no advantage over it,
    where a termination takes everything after it away."""
    gamma, num_steps = 0.9, 12
    rewards, values = torch.ones(num_steps, 1), torch.full((num_steps, 1), 10.0)
    dones = torch.zeros(num_steps, 1, dtype=torch.bool)
    dones[5] = dones[11] = True
    _, returns = clip.compute_gae(rewards, values, values, torch.zeros_like(dones), dones, gamma, 0.95)
    torch.testing.assert_close(returns, values)
    _, returns = clip.compute_gae(rewards, values, values, dones, dones, gamma, 1.0)
    torch.testing.assert_close(returns[:6, 0], torch.tensor([(1 - gamma**k) / (1 - gamma) for k in range(6, 0, -1)]))


@pytest.mark.parametrize("batch_sizes", [[1000], [1, 999], [400, 1, 599], [100] * 10])
def test_observation_statistics_equal_numpys_however_batched(batch_sizes):
    data = torch.as_tensor(np.random.default_rng(3).normal([5.0, -300.0, 0.0], [1e-3, 20.0, 1.0], (1000, 3)))
    stats = clip.RunningMeanStd((3,))
    for batch in data.split(batch_sizes):
        stats.update(batch)
    np.testing.assert_allclose(stats.mean, data.numpy().mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(stats.var, data.numpy().var(0), rtol=1e-7)
    assert stats.count == 1000


@each
def test_networks_see_normalised_observations_of_which_a_small_signal_on_a_large_offset_survives(script):
    """Of 0.1 on 6e6, as of a clock or a position: float32 counts in halves there. ±10 is the limit."""
    agent, scales = agent_of(script), torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)
    obs = scales * torch.randn(100, 3) + torch.tensor([0.0, 30.0, 6e6], dtype=torch.float64)
    agent.obs_stats.update(obs)
    seen = ((obs - obs.mean(0)) / obs.std(0, correction=0)).float()
    torch.testing.assert_close(agent.normalize(obs), seen, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(agent.distribution(obs).mean, agent.actor_mean(seen), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(agent.value(obs), agent.critic(seen).squeeze(-1), atol=1e-4, rtol=1e-3)
    far = torch.full((1, 3), 1e8)
    assert agent.normalize(far).eq(10.0).all()
    assert agent_of(script, normalize_observations=False).normalize(far).equal(far)


def test_reward_scaling_carries_the_discounted_return_across_rollouts_but_not_across_episodes():
    rng = np.random.default_rng(5)
    rewards, dones = rng.normal(size=(30, 2)), rng.random((30, 2)) < 0.1
    expected, total = [], np.zeros(2)
    for reward, done in zip(rewards, dones):
        total = 0.9 * total + reward
        expected.append(total)
        total = np.where(done, 0.0, total)
    scaler = clip.RewardScaler(2, 0.9)
    for part in (slice(0, 11), slice(11, 30)):
        scaled = scaler(torch.as_tensor(rewards[part]), torch.as_tensor(dones[part]))
    assert float(scaler.stats.var) == pytest.approx(np.var(expected))
    np.testing.assert_allclose(scaled, rewards[11:] / np.std(expected), rtol=1e-6)


def test_the_unit_of_the_rewards_does_not_matter_and_constant_returns_stay_finite():
    rewards, dones = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(200, 2).bool()
    scaled = [clip.RewardScaler(2, 0.99)(scale * rewards, dones) for scale in (1.0, 1e-8, 1e8)]
    assert 0.01 < scaled[0].std() < 1.0
    torch.testing.assert_close(scaled[1:], scaled[:1] * 2, rtol=1e-3, atol=0.0)
    for constant in (0.0, 1e-8, 1.0, -1e8):  # in episodes of one step
        same = clip.RewardScaler(2, 0.99)(torch.full((200, 2), constant), ~dones)
        assert same.isfinite().all() and same.abs().max() < 1e5


@each
def test_the_agent_keeps_its_contract_and_starts_with_orthogonal_layers(script):
    agent = script.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-2, 2, (2,)))
    distribution = agent.distribution(torch.randn(7, 3))
    assert isinstance(distribution, torch.distributions.Distribution)
    assert distribution.sample().shape == (7, 2) and distribution.log_prob(torch.zeros(7, 2)).shape == (7,)
    assert agent.value(torch.randn(7, 3)).shape == (7,)
    assert {"obs_stats.mean", "obs_stats.var"} <= agent.state_dict().keys()
    for network, gain in (agent.actor_mean, 0.01), (agent.critic, 1.0):
        first, second, last = (layer for layer in network if hasattr(layer, "weight"))
        for weight, size in (first.weight.T, 3), (second.weight, 64), (last.weight, len(last.weight)):
            right = (gain**2 if weight is last.weight else 2.0) * torch.eye(size)
            torch.testing.assert_close(weight @ weight.T, right, rtol=0.0, atol=1e-5)
        assert not any(layer.bias.any() for layer in (first, second, last))


def test_clipped_surrogate_in_the_six_cases_of_figure_1():
    """A > 0: below the interval 1 ± 0.2 pulled back up, inside, above nothing more to gain; A < 0: the mirror image."""
    ratio = torch.tensor([0.5, 1.1, 1.5, 0.5, 0.9, 1.5], requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    result = clip.clipped_surrogate(ratio, advantages, 0.2)
    torch.testing.assert_close(result, torch.tensor([1.0, 2.2, 2.4, -1.6, -1.8, -3.0]))
    result.sum().backward()
    assert ratio.grad.tolist() == [2.0, 2.0, 0.0, 0.0, -2.0, -2.0]


def test_the_coefficient_doubles_above_and_halves_below_its_thresholds_and_comes_back_from_its_bounds():
    for kl, factor in (0.0, 0.5), (0.00666, 0.5), (0.01 / 1.5, 1.0), (0.01, 1.0), (0.015, 1.0), (0.01501, 2.0):
        assert kl_penalty.adapt_kl_coef(3.0, kl, 0.01) == 3.0 * factor
    for kl, back, bound in (0.0, 1.0, 1e-4), (1.0, 0.0, 1e4):
        kl_coef = 1.0
        for _ in range(2000):
            kl_coef = kl_penalty.adapt_kl_coef(kl_coef, kl, 0.01)
        assert kl_coef == bound
        for _ in range(20):
            kl_coef = kl_penalty.adapt_kl_coef(kl_coef, back, 0.01)
        assert kl_coef > 1.0 if back else kl_coef < 1.0


def test_the_learning_rate_falls_above_and_rises_below_the_thresholds_and_stays_above_its_bound():
    for kl, factor in (0.0, 1.5), (0.00666, 1.5), (0.01 / 1.5, 1.0), (0.01, 1.0), (0.015, 1.0), (0.01501, 1 / 1.5):
        assert clip.adapt_learning_rate(3e-4, kl, 0.01) == pytest.approx(3e-4 * factor, rel=1e-12)
    assert clip.adapt_learning_rate(1.2e-5, 1.0, 0.01) == 1e-5


def test_at_the_old_policy_the_penalty_has_no_gradient_and_its_hessian_is_the_coefficient_times_the_fisher_matrix():
    torch.manual_seed(0)
    obs, advantages, theta = torch.randn(50, 2).double(), torch.randn(50).double(), torch.randn(6).double()
    policy_at = lambda theta: Normal(obs @ theta[:4].view(2, 2), theta[4:].exp())  # noqa: E731
    old = policy_at(theta)
    actions = old.sample()

    def objective(theta, kl_coef):
        new = policy_at(theta)
        ratio, kl = (new.log_prob(actions) - old.log_prob(actions)).sum(-1).exp(), kl_penalty.gaussian_kl(old, new)
        return kl_penalty.kl_penalized_surrogate(ratio, advantages, kl, kl_coef).mean()

    plain, penalised = (torch.func.grad(objective)(theta, kl_coef) for kl_coef in (0.0, 5.0))
    assert plain.norm() > 0.1
    torch.testing.assert_close(penalised, plain, rtol=1e-12, atol=1e-12)
    hessian = torch.autograd.functional.hessian
    fisher = hessian(lambda x: kl_divergence(old, policy_at(x)).sum(-1).mean(), theta)
    difference = hessian(lambda x: objective(x, 0.0) - objective(x, 5.0), theta)
    assert fisher.norm() > 0.1
    torch.testing.assert_close(difference, 5.0 * fisher, rtol=1e-9, atol=1e-9)
