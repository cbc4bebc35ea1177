"""One iteration of the scripts, from what the environment returns to the gradient, beside a plain account of it."""

import copy
import os
import shutil
import sysconfig
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_scripts import quick

import ppo_atari
import ppo_clip_continuous
import ppo_kl_continuous
import trpo_continuous

SCRIPTS = [trpo_continuous, ppo_clip_continuous, ppo_kl_continuous]
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)


def counted(script):
    """(agent, rollout) of 20 steps in two environments whose observation counts the steps of an episode of 7."""
    args = script.Args(env_id="toy_envs:Counting-v0", num_envs=2)
    envs = script.make_envs(args)
    torch.manual_seed(0)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, init_log_std=1.0)
    obs, _ = envs.reset(seed=1)
    return agent, script.collect(envs, agent, obs, 20, 0)[0]


@each
def test_a_rollout_holds_the_true_successors_and_the_actions_as_sampled(script):
    _, rollout = counted(script)
    assert rollout.next_obs.equal(rollout.obs + 1.0) and rollout.dones.sum() > 3  # also where an episode ended
    assert (rollout.obs[1:][rollout.dones[:-1]] == 0.0).all()  # the next one's beginning
    assert rollout.rewards.equal(rollout.actions[..., 0].clamp(-1.0, 1.0)) and (rollout.actions.abs() > 1.0).any()


@each
@pytest.mark.parametrize("center, normalize", [(False, False), (True, False), (False, True), (True, True)])
def test_advantages_of_one_step_come_from_the_true_successors(script, center, normalize):
    agent, rollout = counted(script)
    agent.value = lambda obs: obs[..., 0] ** 2
    args = script.Args(gamma=0.5, gae_lambda=0.0, center_advantages=center, normalize_advantages=normalize)
    advantages, returns, values = script.estimate_advantages(agent, rollout, rollout.rewards, args)
    expected = (rollout.rewards + 0.5 * (rollout.obs[..., 0] + 1.0) ** 2).flatten()
    torch.testing.assert_close(returns, expected)
    raw = expected - rollout.obs.flatten() ** 2
    raw = (raw - raw.mean() * center) / (raw.std(correction=0) if normalize else 1.0)
    torch.testing.assert_close(advantages, raw)


@each
def test_no_reward_counts_across_the_end_of_an_episode(script):
    agent, rollout = counted(script)
    args, end = script.Args(center_advantages=False, normalize_advantages=False), int(rollout.dones[:, 0].nonzero()[0])
    later = rollout.rewards.clone()
    later[end + 1 :] += 1.0
    given = rollout.rewards, later
    before, after = (script.estimate_advantages(agent, rollout, x, args)[0].view_as(x) for x in given)
    assert before[: end + 1, 0].equal(after[: end + 1, 0]) and not before[end + 1, 0].equal(after[end + 1, 0])


@each
@pytest.mark.parametrize("normalize", [True, False])
def test_an_iteration_sees_the_statistics_of_the_ones_before_and_rewards_scaled_across_them(
    script, normalize, tmp_path, monkeypatch
):
    original, seen = script.update, []

    def spy(agent, optimizer, rollout, rewards, *rest):
        seen.append((int(agent.obs_stats.count), rollout, rewards))
        return original(agent, optimizer, rollout, rewards, *rest)

    monkeypatch.setattr(script, "update", spy)
    args = quick(script, tmp_path / "a", env_id="toy_envs:Counting-v0", normalize_observations=normalize)
    script.train(args)
    batch = args.num_envs * args.num_steps
    assert [count for count, *_ in seen] == ([0, batch] if normalize else [0, 0])
    scaler, running = script.RewardScaler(), torch.zeros(args.num_envs)
    for _, rollout, rewards in seen:
        assert rewards.equal(scaler(rollout.rewards, rollout.dones, args.gamma, running))


@each
def test_layers_start_orthogonal_and_the_policy_the_same_everywhere(script):
    agent = script.Agent(gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,)))
    for network, gain in (agent.actor_mean, 0.01), (agent.critic, 1.0):
        first, second, last = (layer for layer in network if hasattr(layer, "weight"))
        for weight, size in (first.weight.T, 3), (second.weight, 64), (last.weight, len(last.weight)):
            right = (gain**2 if weight is last.weight else 2.0) * torch.eye(size)
            torch.testing.assert_close(weight @ weight.T, right, rtol=0.0, atol=1e-5)
        assert not any(layer.bias.any() for layer in (first, second, last))


@each
def test_actor_and_critic_see_normalised_observations(script):
    agent = script.Agent(gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,)))
    obs = torch.randn(100, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 30.0, -2.0])
    agent.obs_stats.update(obs)
    expected = (obs - obs.mean(0)) / obs.std(0, correction=0)
    torch.testing.assert_close(agent.distribution(obs).mean, agent.actor_mean(expected), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(agent.value(obs), agent.critic(expected).squeeze(-1), atol=1e-4, rtol=1e-3)


CASES = [
    (ppo_clip_continuous, (gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))),
    (ppo_kl_continuous, (gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))),
    (ppo_atari, (gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6))),
]


@pytest.mark.parametrize("script, spaces", CASES, ids=["clip", "kl", "atari"])
def test_the_gradient_is_that_of_equation_9_and_its_norm_is_bounded(script, spaces):
    torch.manual_seed(0)
    atari = script is ppo_atari
    obs = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8) if atari else torch.randn(16, 3)
    agent = script.Agent(*spaces)
    with torch.no_grad():
        old = agent.distribution(obs)
        actions = old.sample()
        old_log_probs = old.log_prob(actions)
        for parameter in agent.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    advantages, returns, old_values = torch.randn(3, 16)
    options = {"value_coef": 0.7, "entropy_coef": 0.3, "value_clip": 0.1}
    new, ratio = agent.distribution(obs), (agent.distribution(obs).log_prob(actions) - old_log_probs).exp()
    minibatch = [obs, actions, old_log_probs, advantages, returns, old_values]
    if script is ppo_kl_continuous:
        agent.kl_coef.fill_(5.0)
        minibatch[3:3] = [old.mean, old.stddev]
        kl = torch.distributions.kl_divergence(old, new)
        objective = (ratio * advantages - 5.0 * kl).mean()
    else:
        options["clip_coef"] = 0.05
        assert ((ratio - 1.0).abs() > 0.05).any()
        objective = torch.min(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages).mean()
    values = agent.value(obs)
    clipped = torch.max(torch.min(values, old_values + 0.1), old_values - 0.1)
    value_loss = torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()
    loss = -objective + 0.7 * value_loss - 0.3 * new.entropy().mean()
    parameters = list(agent.parameters())
    expected = torch.autograd.grad(loss, parameters)
    free = script.loss_gradient(agent, parameters, minibatch, script.Args(max_grad_norm=1e9, **options))
    for a, b in zip(free, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    norm = torch.cat([x.flatten() for x in expected]).norm()
    bounded = script.loss_gradient(agent, parameters, minibatch, script.Args(max_grad_norm=0.01, **options))
    for a, b in zip(bounded, expected):
        torch.testing.assert_close(a, 0.01 / norm * b, rtol=1e-3, atol=1e-6)


@each
@pytest.mark.parametrize("recompute", [False, True])
def test_every_epoch_sees_each_sample_once_beside_its_own_old_policy(script, recompute, monkeypatch):
    torch.manual_seed(0)
    agent = script.Agent(gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(-1, 1, (2,)))
    obs, column = torch.arange(64.0).view(16, 4, 1) / 64, torch.randn(16, 4)
    none = torch.zeros(16, 4, dtype=torch.bool)
    rollout = script.Rollout(obs, torch.randn(16, 4, 2), column, obs + 1.0, none, none)
    args = script.Args(num_minibatches=4, recompute_advantages=recompute, center_advantages=True)
    setattr(args, "critic_epochs" if script is trpo_continuous else "num_epochs", 2)
    seen, given, old = [], [], copy.deepcopy(agent)
    if script is trpo_continuous:
        step = script.update_policy
        monkeypatch.setattr(script, "update_policy", lambda agent, *x: given.append(x) or step(agent, *x))

    def gradient(agent, parameters, minibatch, args):
        seen.append(minibatch)
        return [torch.ones_like(p) for p in parameters]

    advantages, returns, values = script.estimate_advantages(agent, rollout, column, args)
    with torch.no_grad():
        old_policy = old.distribution(obs.flatten(0, 1))
        old_log_probs = old_policy.log_prob(rollout.actions.flatten(0, 1))
    metrics = script.update(agent, torch.optim.SGD(agent.parameters(), lr=0.01), rollout, column, args, gradient)
    assert len(seen) == 8
    orders = [torch.cat([minibatch[0] for minibatch in seen[i : i + 4]]).flatten() for i in (0, 4)]
    assert not orders[0].equal(obs.flatten()) and not orders[0].equal(orders[1])  # shuffled, each time anew
    learner = "critic" if script is trpo_continuous else "actor_mean"  # a step a minibatch, each of 0.01
    for new, parameter in zip(getattr(agent, learner).parameters(), getattr(old, learner).parameters()):
        torch.testing.assert_close(new, parameter - 0.08)
    first, second = ([torch.cat(x) for x in zip(*seen[i : i + 4])] for i in (0, 4))
    first, second = ([x[epoch[0][:, 0].argsort()] for x in epoch] for epoch in (first, second))
    assert first[0].equal(obs.flatten(0, 1)) and second[0].equal(first[0])
    if script is trpo_continuous:
        torch.testing.assert_close(first[1], returns)
        ((*batch, from_the_old_critic, _),) = given  # what the policy's one step is taken by
        assert batch[0].equal(obs.flatten(0, 1)) and batch[1].equal(rollout.actions.flatten(0, 1))
        assert from_the_old_critic.equal(advantages)
    else:
        assert first[1].equal(rollout.actions.flatten(0, 1)) and first[2].equal(old_log_probs)
        torch.testing.assert_close(first[-3], advantages)
        torch.testing.assert_close(first[-2], returns)
    if script is ppo_kl_continuous:
        assert first[3].equal(old_policy.mean) and first[4].equal(old_policy.stddev)
        moved = torch.distributions.kl_divergence(old_policy, agent.distribution(obs.flatten(0, 1))).mean()
        assert metrics["losses/kl"] == pytest.approx(float(moved.detach()), rel=1e-3) and moved > 1e-4
    newest = {-1} if script is trpo_continuous else {-3, -2}  # what the newest critic says anew
    for k in range(-len(first), 0):
        assert first[k].equal(second[k]) != (recompute and k in newest)
    metrics = metrics[0] if script is trpo_continuous else metrics
    new = agent.distribution(obs.flatten(0, 1))
    log_ratio = new.log_prob(rollout.actions.flatten(0, 1)) - old_log_probs
    logged = {
        "entropy": new.entropy().mean(),
        "approx_kl": (log_ratio.exp() - 1.0 - log_ratio).mean(),
        "clipfrac": ((log_ratio.exp() - 1.0).abs() > 0.2).float().mean(),
        "explained_variance": 1.0 - (returns - values).var() / (returns.var() + 1e-8),
        "value_loss": ((agent.value(obs.flatten(0, 1)) - second[-1 if script is trpo_continuous else -2]) ** 2).mean(),
    }
    for name, value in logged.items():
        assert metrics[f"losses/{name}"] == pytest.approx(float(value.detach()), rel=1e-3, abs=1e-6), name


@each
def test_an_evaluation_leaves_the_agent_and_the_random_state(script):
    env = script.make_env("toy_envs:Counting-v0")
    agent = script.Agent(env.observation_space, env.action_space)
    before, random = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
    mean = script.evaluate(agent, "toy_envs:Counting-v0", num_episodes=2, seed=1)
    assert torch.get_rng_state().equal(random)
    assert all(value.equal(before[name]) for name, value in agent.state_dict().items())
    obs = torch.arange(7.0)[:, None]
    assert mean == pytest.approx([float(agent.distribution(obs).mean.sum())] * 2)  # the reward is the action


@each
def test_a_resumed_run_plays_other_episodes(script, tmp_path, monkeypatch):
    seeds = []
    original = script.make_envs

    def make_envs(args):
        envs = original(args)
        reset = envs.reset
        envs.reset = lambda **kwargs: seeds.append(kwargs["seed"]) or reset(**kwargs)
        return envs

    monkeypatch.setattr(script, "make_envs", make_envs)
    args = quick(script, tmp_path / "a")
    script.train(args)
    script.train(quick(script, None, resume=tmp_path / "a", total_timesteps=2 * args.total_timesteps))
    assert len(set(seeds)) == 2


def test_approximate_kl_of_known_ratios():
    agent = ppo_clip_continuous.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))
    obs, actions, log_ratio = torch.randn(9, 3), torch.randn(9, 2), torch.linspace(-1.0, 2.0, 9)
    old_log_probs = agent.distribution(obs).log_prob(actions).detach() - log_ratio
    expected = (log_ratio.exp() - 1.0 - log_ratio).mean()
    torch.testing.assert_close(ppo_clip_continuous.approximate_kl(agent, obs, actions, old_log_probs), expected)


@pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="no C++ compiler, or Python's headers are missing",
)
@each
def test_compiled_gradients_are_the_eager_ones_also_when_statistics_and_penalty_have_changed(
    script, tmp_path, monkeypatch
):
    """Nothing that changes between iterations may be compiled in as a constant."""
    compiler, seen = torch.compile, []

    def beside_eager(function):
        compiled = compiler(function)

        def both(agent, parameters, minibatch, args):
            gradients = compiled(agent, parameters, minibatch, args)
            for a, b in zip(gradients, function(agent, parameters, minibatch, args), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            seen.append((int(agent.obs_stats.count), float(getattr(agent, "kl_coef", 0.0))))
            return gradients

        return both

    monkeypatch.setattr(torch, "compile", beside_eager)
    changes = {"critic_epochs": 1} if script is trpo_continuous else {"target_kl": 1e-6}  # so that beta changes
    script.train(quick(script, tmp_path / "run", compile=True, num_minibatches=4, **changes))
    assert len(seen) == 8 and len(set(seen)) == 2
    assert seen[0][1] != seen[-1][1] or script is not ppo_kl_continuous
