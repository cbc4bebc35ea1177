"""One iteration of the scripts, from what the environment returns to the gradient, beside a plain account of it."""

import copy
import os
import shutil
import sysconfig
from contextlib import ExitStack
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import SCRIPTS, agent_of, each, each_of_four, quick, scalars

import ppo_atari as atari
import ppo_clip_continuous as clip
import ppo_kl_continuous as kl_penalty
import trpo_continuous as trpo

PIXELS = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6)
COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()


def collected(env_id, num_envs, num_steps):
    """(agent, rollout, finished episodes) of a wide policy; `collect` is one text in the continuous scripts."""
    torch.manual_seed(0)
    with ExitStack() as opened:
        envs = clip.make_envs(clip.Args(env_id=f"toy_envs:{env_id}-v0", num_envs=num_envs), opened)
        args = clip.Args(init_log_std=1.0)
        agent = clip.Agent(envs.single_observation_space, envs.single_action_space, args)
        rollout, _, episodes = clip.collect(envs, agent, envs.reset(seed=1)[0], num_steps, 0)
    return agent, rollout, episodes


def test_a_rollout_holds_the_true_successors_and_the_actions_as_sampled():
    """From observations that count the steps of episodes of 7."""
    _, rollout, _ = collected("Counting", 2, 20)
    assert rollout.next_obs.equal(rollout.obs + 1.0) and rollout.dones.sum() > 3  # also where an episode ended
    assert (rollout.obs[1:][rollout.dones[:-1]] == 0.0).all()  # the next one's beginning
    assert rollout.rewards.equal(rollout.actions[..., 0].clamp(-1.0, 1.0)) and (rollout.actions.abs() > 1.0).any()


def test_environments_that_never_fail_are_spread_over_their_episodes():
    """Of 4 environments with episodes of 20 steps, three cut one at 5, 10 and 15, which is not reported."""
    _, rollout, episodes = collected("Endless", 4, 60)
    ends = [(column.nonzero().flatten() + 1).tolist() for column in rollout.dones.T]
    assert ends == [[20, 40, 60], [5, 25, 45], [10, 30, 50], [15, 35, 55]]
    assert not rollout.terminations.any()  # a cut is bootstrapped, as a time limit is
    assert len(episodes) == 9 and all(episodic_return == length == 20 for _, episodic_return, length in episodes)
    env = clip.Staggered(gym.make("toy_envs:Endless-v0"), 20)  # which would cut an episode where it ends anyway
    env.reset()
    *_, truncated, info = [env.step(np.zeros(1, np.float32)) for _ in range(20)][-1]
    assert truncated and info == {"cut_short": False, "return": 20.0, "length": 20}


@pytest.mark.parametrize("center, normalize", [(False, False), (True, False), (False, True), (True, True)])
def test_advantages_come_from_the_true_successors_within_each_episode(center, normalize):
    agent, rollout, _ = collected("Counting", 2, 20)
    agent.value = lambda obs: obs[..., 0] ** 2
    args = clip.Args(center_advantages=center, normalize_advantages=normalize)
    values, next_values, ends = agent.value(rollout.obs), agent.value(rollout.next_obs), rollout[-2:]
    raw, targets = clip.compute_gae(rollout.rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
    advantages, returns = clip.estimate_advantages(agent, rollout, args)
    torch.testing.assert_close(returns, targets.flatten())
    raw = (raw - raw.mean() * center) / (raw.std(correction=0) if normalize else 1.0)
    torch.testing.assert_close(advantages, raw.flatten())


@each
@pytest.mark.parametrize("processed", [True, False])
def test_iterations_go_on_where_the_last_ended_with_statistics_of_those_before(
    script, processed, tmp_path, monkeypatch
):
    """Rewards are scaled across iterations where that is asked for, and checkpoints saved at step 0 and when due."""
    iterations, saved, names = [], [], ("collect", "estimate_advantages", "save_checkpoint")
    collect, estimate, save = (getattr(script, name) for name in names)

    def spy_on_collect(envs, agent, obs, num_steps, step):
        rollout, last_obs, episodes = collect(envs, agent, obs, num_steps, step)
        iterations.append([step, obs, last_obs, rollout, int(agent.obs_stats.count)])
        return rollout, last_obs, episodes

    def spy_on_estimate(agent, rollout, args):
        iterations[-1].append(rollout.rewards)
        return estimate(agent, rollout, args)

    monkeypatch.setattr(script, "collect", spy_on_collect)
    monkeypatch.setattr(script, "estimate_advantages", spy_on_estimate)
    monkeypatch.setattr(script, "save_checkpoint", lambda *x, **parts: saved.append(x[2]) or save(*x, **parts))
    switches = {"normalize_observations": processed, "scale_rewards": processed}
    script.train(quick(script, tmp_path / "a", 5, checkpoint_interval=2, **switches))
    assert saved == [0, 256, 512, 640]
    scaler, last = script.RewardScaler(2, 0.99), iterations[0][1]
    for i, (step, obs, last_obs, rollout, count, rewards, *_) in enumerate(iterations):
        assert step == 128 * i and count == step * processed and np.array_equal(obs, last)
        assert rewards.equal(scaler(rollout.rewards, rollout.dones) if processed else rollout.rewards)
        last = last_obs
    seen = torch.cat([rollout.obs.flatten(0, 1) for _, _, _, rollout, *_ in iterations])
    statistics = script.load_checkpoint(tmp_path / "a")["agent"]  # of what the policy has seen, and of nothing else
    right = (seen.mean(0), seen.var(0, correction=0)) if processed else (torch.zeros(3), torch.ones(3))
    for name, expected in zip(("mean", "var"), right):
        torch.testing.assert_close(statistics[f"obs_stats.{name}"].float(), expected, rtol=1e-4, atol=1e-5)


def learning(script):
    """(agent, rollout of 16 steps in 2 environments with observations in a known order, optimizer of what learns)."""
    torch.manual_seed(0)
    none, column = torch.zeros(16, 2, dtype=torch.bool), torch.randn(16, 2)
    if script is atari:
        agent, obs = atari.Agent(*PIXELS), torch.arange(32, dtype=torch.uint8).view(16, 2, 1, 1, 1)
        obs, actions = obs.expand(16, 2, 4, 84, 84), torch.arange(32).view(16, 2) % 6
        rollout = atari.Rollout(obs, actions, column, *torch.randn(2, 16, 2), none, none, obs[-1])
    else:
        agent, obs = agent_of(script, 1), torch.arange(32.0).view(16, 2, 1) / 32
        rollout = script.Rollout(obs, torch.randn(16, 2, 2), column, obs + 1.0, none, none)
    learner = agent.critic if script is trpo else agent
    return agent, rollout, torch.optim.SGD(learner.parameters(), lr=1e-3)


@each_of_four
@pytest.mark.parametrize("recompute", [False, True])
def test_every_epoch_sees_each_sample_once_beside_its_own_old_policy(script, recompute, monkeypatch):
    agent, rollout, optimizer = learning(script)
    epochs = "critic_epochs" if script is trpo else "num_epochs"
    args = script.Args(num_minibatches=4, recompute_advantages=recompute, gamma=0.5, **{epochs: 2})
    parameters, obs = optimizer.param_groups[0]["params"], rollout.obs.flatten(0, 1)
    before, seen, estimates = [p.detach().clone() for p in parameters], [], []

    def gradient(agent, *minibatch):
        if len(seen) in (0, 4):  # what the critic of this epoch's beginning says
            values = {"values": agent.value(obs).view(16, 2)} if script is atari and seen else {}
            estimates.append(script.estimate_advantages(agent, rollout._replace(**values), args))
        seen.append(minibatch if script is trpo else minibatch[:-1])
        for p in parameters:
            p.grad = torch.ones_like(p) + (0.0 if p.grad is None else p.grad)

    monkeypatch.setattr(script, "compute_gradient", gradient)
    with torch.no_grad():
        old = copy.deepcopy(agent).distribution(obs)
        old_log_probs = rollout.log_probs.flatten() if script is atari else old.log_prob(rollout.actions.flatten(0, 1))
    advantages, returns = script.estimate_advantages(agent, rollout, args)
    if script is trpo:
        metrics = trpo.fit_critic(agent, optimizer, rollout, returns, args)
    else:
        metrics = script.update(agent, optimizer, rollout, advantages, returns, args)
    assert len(seen) == 8
    for new, p in zip(parameters, before):  # a step a minibatch, each by a gradient of its own
        torch.testing.assert_close(new, p - 8e-3, rtol=0.0, atol=1e-6)
    orders = []
    for epoch, estimate in zip((seen[:4], seen[4:]), estimates if recompute else [(advantages, returns)] * 2):
        columns = [torch.cat(x) for x in zip(*epoch)]
        orders.append(columns[0].flatten(1)[:, 0])
        expected = [estimate[1]] if script is trpo else [rollout.actions.flatten(0, 1), old_log_probs, *estimate]
        if script is kl_penalty:
            expected[2:2] = [old.mean, old.stddev]
        for column, right in zip(columns[1:], expected, strict=True):
            torch.testing.assert_close(column[orders[-1].argsort()], right, rtol=0.0, atol=1e-4)
    assert orders[0].sort()[0].equal(orders[1].sort()[0]) and len(orders[0].unique()) == 32
    assert not orders[0].equal(orders[0].sort()[0]) and not orders[0].equal(orders[1])  # shuffled, each time anew
    assert not recompute or not estimates[0][1].allclose(estimates[1][1], rtol=0.0, atol=1e-3)
    if script in (clip, kl_penalty):  # what is logged describes the whole batch after the last step
        new = agent.distribution(obs)
        log_ratio = new.log_prob(rollout.actions.flatten(0, 1)) - old_log_probs
        logged = {"entropy": new.entropy(), "approx_kl": log_ratio.exp() - 1.0 - log_ratio}
        logged["clipfrac"] = ((log_ratio.exp() - 1.0).abs() > 0.2).float()
        if script is kl_penalty:
            logged["kl"] = torch.distributions.kl_divergence(old, new)
        for name, value in logged.items():
            assert metrics[f"losses/{name}"] == pytest.approx(float(value.mean().detach()), rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("kl, epochs", [(0.02, 1), (0.01, 3)])
def test_target_kl_ends_the_iteration_after_an_epoch_that_went_too_far(kl, epochs, monkeypatch):
    agent, rollout, optimizer = learning(atari)
    calls, args = [], atari.Args(target_kl=0.015, num_epochs=3, num_minibatches=4)
    monkeypatch.setattr(atari, "approximate_kl", lambda *_: kl)
    monkeypatch.setattr(atari, "compute_gradient", lambda *_: calls.append(1))
    atari.update(agent, optimizer, rollout, *atari.estimate_advantages(agent, rollout, args), args)
    assert len(calls) == 4 * epochs


@pytest.mark.parametrize("script, adapt_lr", [(clip, True), (kl_penalty, True), (clip, False)])
def test_the_learning_rate_follows_the_kl_below_its_decay_and_across_a_resume(script, adapt_lr, tmp_path):
    options = {"learning_rate": 3e-3, "adapt_lr": adapt_lr}
    script.train(quick(script, tmp_path, 4, **options))
    script.train(quick(script, None, 8, resume=tmp_path, **options))
    logged, adapted = scalars(tmp_path), np.inf
    for i, ((_, kl), (_, lr)) in enumerate(zip(logged["losses/approx_kl"], logged["charts/learning_rate"])):
        ceiling = 3e-3 * (1 - i / (4 if i < 4 else 8))
        assert lr == pytest.approx(min(adapted, ceiling) if adapt_lr else ceiling)
        adapted = script.adapt_learning_rate(lr, kl, script.Args.target_kl * (1.5 if script is kl_penalty else 1.0))
    assert i == 7 and lr < 1e-3


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=["clip", "kl", "atari"])
def test_the_gradient_is_that_of_equation_9_and_its_norm_is_bounded(script):
    torch.manual_seed(0)
    obs = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8) if script is atari else torch.randn(16, 3)
    agent = atari.Agent(*PIXELS) if script is atari else agent_of(script)
    with torch.no_grad():
        old = agent.distribution(obs)
        actions = old.sample()
        old_log_probs = old.log_prob(actions)
        for parameter in agent.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    advantages, returns = torch.randn(2, 16)
    options = {"value_coef": 0.7, "entropy_coef": 0.3}
    new, ratio = agent.distribution(obs), (agent.distribution(obs).log_prob(actions) - old_log_probs).exp()
    minibatch = [obs, actions, old_log_probs, advantages, returns]
    if script is kl_penalty:
        agent.kl_coef.fill_(5.0)
        minibatch[3:3] = [old.mean, old.stddev]
        objective = (ratio * advantages - 5.0 * torch.distributions.kl_divergence(old, new)).mean()
    else:
        options["clip_coef"] = 0.05
        assert ((ratio - 1.0).abs() > 0.05).any()
        objective = torch.min(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages).mean()
    loss = -objective + 0.7 * ((agent.value(obs) - returns) ** 2).mean() - 0.3 * new.entropy().mean()
    expected = torch.autograd.grad(loss, list(agent.parameters()))
    norm = torch.cat([x.flatten() for x in expected]).norm()
    for bound, scale in (1e9, 1.0), (0.01, 0.01 / norm):
        agent.zero_grad()
        script.compute_gradient(agent, *minibatch, script.Args(max_grad_norm=bound, **options))
        for parameter, right in zip(agent.parameters(), expected):
            torch.testing.assert_close(parameter.grad, scale * right, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler, or Python's headers are missing")
@each_of_four
def test_compiled_gradients_are_the_eager_ones_also_when_statistics_and_penalty_have_changed(
    script, tmp_path, monkeypatch
):
    """Nothing that changes between iterations may be compiled in as a constant. And gradients lie in memory as their
    parameters do: PyTorch's fused Adam on CPUs goes through both in that order, and would mix weights up."""
    compiler, seen = torch.compile, []

    def beside_eager(function):
        compiled = compiler(function)

        def both(agent, *minibatch):
            compiled(agent, *minibatch)
            learner = list((agent.critic if script is trpo else agent).parameters())
            gradients = [p.grad.clone() for p in learner]
            agent.zero_grad()
            function(agent, *minibatch)
            for p, gradient in zip(learner, gradients):
                assert p.stride() == p.grad.stride() == gradient.stride()
                torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
            count = 0 if script is atari else int(agent.obs_stats.count)
            seen.append((count, float(getattr(agent, "kl_coef", 0.0))))

        return both

    monkeypatch.setattr(torch, "compile", beside_eager)
    script.compiled.cache_clear()
    changes = {trpo: {"critic_epochs": 1}, clip: {"num_epochs": 1}, atari: {"bfloat16": False}}
    changes[kl_penalty] = {"num_epochs": 1, "target_kl": 1e-6}  # so that beta changes
    script.train(quick(script, tmp_path / "run", compile=True, **changes[script]))
    script.compiled.cache_clear()
    assert len(seen) == 8 and (len(set(seen)) == 2 or script is atari)
    assert seen[0][1] != seen[-1][1] or script is not kl_penalty


def test_a_fixed_coefficient_stays_and_may_be_0(tmp_path):
    for kl_coef, where in (0.0, {"run_dir": tmp_path}), (10.0, {"run_dir": None, "resume": tmp_path, "iterations": 4}):
        kl_penalty.train(quick(kl_penalty, kl_coef=kl_coef, adapt_kl_coef=False, **where))
        assert float(kl_penalty.load_checkpoint(tmp_path)["agent"]["kl_coef"]) == kl_coef


def test_the_coefficient_follows_the_exact_kl_once_an_iteration_and_across_a_resume(tmp_path):
    kl_penalty.train(quick(kl_penalty, tmp_path, kl_coef=3.0))
    kl_penalty.train(quick(kl_penalty, None, 4, kl_coef=3.0, resume=tmp_path))
    logged, expected = scalars(tmp_path), 3.0
    for (_, kl), (_, kl_coef) in zip(logged["losses/kl"], logged["charts/kl_coef"]):
        assert kl_coef == expected
        expected = kl_penalty.adapt_kl_coef(kl_coef, kl, kl_penalty.Args.target_kl)
    assert expected != 3.0 and float(kl_penalty.load_checkpoint(tmp_path)["agent"]["kl_coef"]) == expected


@pytest.mark.parametrize("script", [trpo, clip], ids=["trpo", "clip"])
def test_the_critic_learns_the_value_of_an_endless_task_through_its_time_limit(script, tmp_path):
    """Reward 1 for ever at γ = 0.9 is worth 10. Taking the time limit for an end would give at most 8.8, and less
    on average: 5.6."""
    options = {"num_envs": 8, "num_steps": 64, "num_minibatches": 8, "learning_rate": 3e-3}
    run_dir = script.train(quick(script, tmp_path, 10, env_id="toy_envs:Endless-v0", gamma=0.9, **options))
    agent, scaler = agent_of(script, 1, 1), script.RewardScaler(8, 0.9)
    script.load_checkpoint(run_dir, agent=agent, reward_scaler=scaler)
    one = float(scaler(torch.ones(1, 8), torch.ones(1, 8).bool())[0, 0])
    assert float(agent.value(torch.zeros(1, 1))) / one == pytest.approx(10.0, rel=0.05)
