"""The formulas that the scripts share, against closed forms and brute force."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_atari
import ppo_clip_continuous
import ppo_kl_continuous
import trpo_continuous

SCRIPTS = [trpo_continuous, ppo_clip_continuous, ppo_kl_continuous]


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


@pytest.mark.parametrize("script", [*SCRIPTS, ppo_atari])
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sum_over_each_episode(script, gamma, gae_lambda):
    generator = torch.Generator().manual_seed(7)
    rewards, values, next_values = torch.randn(3, 40, 5, dtype=torch.float64, generator=generator)
    ends = torch.rand(40, 5, generator=generator)
    terminations, dones = ends < 0.1, ends < 0.2  # terminations and truncations in one batch
    assert terminations.any() and (dones & ~terminations).any()
    arguments = (rewards, values, next_values, terminations, dones, gamma, gae_lambda)
    advantages, returns = script.compute_gae(*arguments)
    torch.testing.assert_close(advantages, brute_force_gae(*arguments), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values)
    as_floats = script.compute_gae(
        rewards, values, next_values, terminations.double(), dones.double(), gamma, gae_lambda
    )
    torch.testing.assert_close(as_floats[0], advantages)
    unread = next_values.masked_fill(terminations, float("nan"))  # nothing follows, so it may be anything
    assert script.compute_gae(rewards, values, unread, terminations, dones, gamma, gae_lambda)[0].equal(advantages)


def test_time_limit_does_not_shorten_the_value_of_an_endless_task():
    """Reward 1 for ever is worth 1 / (1 - γ): with that value given, a time limit leaves no advantage over it,
    where a termination takes everything after it away."""
    gamma, num_steps = 0.9, 12
    rewards, values = torch.ones(num_steps, 1), torch.full((num_steps, 1), 10.0)
    dones = torch.zeros(num_steps, 1, dtype=torch.bool)
    dones[5] = dones[11] = True
    never = torch.zeros_like(dones)
    _, returns = ppo_clip_continuous.compute_gae(rewards, values, values, never, dones, gamma, 0.95)
    torch.testing.assert_close(returns, values)
    _, returns = ppo_clip_continuous.compute_gae(rewards, values, values, dones, dones, gamma, 1.0)
    torch.testing.assert_close(returns[:6, 0], torch.tensor([(1 - gamma**k) / (1 - gamma) for k in range(6, 0, -1)]))


@pytest.mark.parametrize("batch_sizes", [[1000], [1, 999], [400, 1, 599], [100] * 10])
def test_observation_statistics_equal_numpys_however_batched(batch_sizes):
    data = torch.as_tensor(np.random.default_rng(3).normal([5.0, -300.0, 0.0], [1e-3, 20.0, 1.0], (1000, 3)))
    stats = ppo_clip_continuous.RunningMeanStd((3,))
    for batch in data.split(batch_sizes):
        stats.update(batch)
    np.testing.assert_allclose(stats.mean, data.numpy().mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(stats.var, data.numpy().var(0), rtol=1e-7)
    assert stats.count == 1000


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])  # of dones, where the scaler is copied
def test_reward_scaling_carries_the_discounted_return_across_rollouts_but_not_across_episodes(dtype):
    rng = np.random.default_rng(5)
    rewards, dones = rng.normal(size=(30, 2)), rng.random((30, 2)) < 0.1
    expected, total = [], np.zeros(2)
    for reward, done in zip(rewards, dones):
        total = 0.9 * total + reward
        expected.append(total)
        total = np.where(done, 0.0, total)
    scaler, running = ppo_clip_continuous.RewardScaler(), torch.zeros(2, dtype=torch.float64)
    for part in (slice(0, 11), slice(11, 30)):
        scaled = scaler(torch.as_tensor(rewards[part]), torch.as_tensor(dones[part]).to(dtype), 0.9, running)
    assert float(scaler.var) == pytest.approx(np.var(expected))
    np.testing.assert_allclose(scaled, rewards[11:] / np.std(expected), rtol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_agent_keeps_its_contract(script):
    obs_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Box(-2, 2, (3,))
    agent, obs = script.Agent(obs_space, action_space), torch.randn(7, 4)
    distribution = agent.distribution(obs)
    assert isinstance(distribution, torch.distributions.Distribution)
    assert distribution.sample().shape == (7, 3) and distribution.log_prob(torch.zeros(7, 3)).shape == (7,)
    assert agent.value(obs).shape == (7,)
    assert {"obs_stats.mean", "obs_stats.var"} <= agent.state_dict().keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_observations_are_cut_off_only_where_they_are_normalised(script):
    spaces, obs = (gym.spaces.Box(-np.inf, np.inf, (1,)), gym.spaces.Box(-1, 1, (1,))), torch.tensor([[10.0], [255.0]])
    same, raw = script.Agent(*spaces), script.Agent(*spaces, normalize_observations=False)
    assert same.obs_stats.normalize(obs).tolist() == [[10.0], [10.0]] and raw.obs_stats.normalize(obs).equal(obs)


@pytest.mark.parametrize("script", [trpo_continuous, ppo_kl_continuous])
def test_gaussian_kl_equals_the_library_and_is_zero_only_for_equal_policies(script):
    torch.manual_seed(0)
    make = lambda: torch.distributions.Normal(torch.randn(50, 3).double(), torch.rand(3).double() + 0.1)  # noqa: E731
    old, new = make(), make()
    library = torch.distributions.kl_divergence(old, new).sum(-1)
    torch.testing.assert_close(script.gaussian_kl(old, new), library)
    assert (script.gaussian_kl(old, new) > 0).all()
    assert (script.gaussian_kl(old, old) == 0).all()
