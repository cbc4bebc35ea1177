"""The Atari script: lives and games told apart, raw scores, the same pixels in training and evaluation, a run of it."""

import os
import signal
import sys
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from test_scripts import scalars
from torch.nn import functional as F

import ppo_atari

SPACES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6)


def small(**changes):
    """Arguments for a run of two iterations of 2 x 16 steps."""
    defaults = {"num_envs": 2, "num_steps": 16, "total_timesteps": 64, "num_epochs": 1, "eval_episodes": 1}
    return ppo_atari.Args(**{**defaults, **changes})


class Scripted(ppo_atari.Agent):
    """An agent that plays a given sequence of actions, one row a step."""

    def __init__(self, envs, script):
        super().__init__(envs.single_observation_space, envs.single_action_space)
        self.script = iter(script)

    def both(self, obs):
        distribution, values = super().both(obs)
        distribution.sample = lambda: torch.as_tensor(next(self.script))
        return distribution, values


def test_lives_and_games_are_told_apart_and_the_score_is_the_emulators():
    """The same actions on the same seeds in an environment that knows full games only: its terminations are our
    finished games, the sum of its rewards our scores; our terminations besides are the lost lives."""
    steps, args = 400, small(env_id="ALE/Breakout-v5")
    script = np.random.default_rng(0).integers(0, 4, (steps, args.num_envs))
    envs = ppo_atari.make_envs(args)
    obs, infos = envs.reset(seed=5)
    assert (infos["lives"] == 5).all()
    rollout, _, episodes = ppo_atari.collect(envs, Scripted(envs, script), obs, steps, 0)

    plain = AtariVectorEnv(
        "breakout", args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP, reward_clipping=False
    )  # the emulator's own count
    plain.reset(seed=5)
    expected, game_ends, lives_lost, rewards = [], [], np.zeros(args.num_envs, dtype=int), []
    score, length, lives = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=int), np.full(args.num_envs, 5)
    for t, actions in enumerate(script):
        _, reward, terminated, truncated, infos = plain.step(actions)
        score, length = score + reward, length + 1
        rewards.append(reward)
        lives_lost += infos["lives"] < lives
        for i in np.flatnonzero(terminated | truncated):
            expected.append((t * args.num_envs + i + 1, score[i], length[i]))  # each environment's own step
            game_ends.append((t, i))
            score[i], length[i] = 0, 0
        lives = infos["lives"].copy()
    assert len(expected) >= 2 and sum(score for _, score, _ in expected) > 0
    assert episodes == expected
    np.testing.assert_array_equal(rollout.rewards, np.sign(rewards))
    assert all(rollout.terminations[t, i] for t, i in game_ends)
    assert int(rollout.terminations.sum()) == len(game_ends) + lives_lost.sum() and lives_lost.sum() >= 8


def test_a_lost_life_cuts_the_advantage_recursion_and_the_game_goes_on():
    steps, args = 60, small(env_id="ALE/Breakout-v5")
    script = np.ones((steps, args.num_envs), dtype=np.int64)  # FIRE for ever: the ball is lost again and again
    envs = ppo_atari.make_envs(args)
    obs, _ = envs.reset(seed=5)
    rollout, _, episodes = ppo_atari.collect(envs, Scripted(envs, script), obs, steps, 0)
    lost = int(rollout.terminations[:, 0].nonzero()[0])
    assert not episodes and lost < steps - 10  # no game has ended
    agent = ppo_atari.Agent(envs.single_observation_space, envs.single_action_space)
    args.center_advantages = args.normalize_advantages = False
    later = rollout.rewards.clone()
    later[lost + 1 :] += 1.0
    given = rollout, rollout._replace(rewards=later)
    before, after = (ppo_atari.estimate_advantages(agent, x, x.values.flatten(), args)[0].view_as(later) for x in given)
    assert before[: lost + 1, 0].equal(after[: lost + 1, 0]) and not before[lost + 1 :, 0].equal(after[lost + 1 :, 0])


def test_the_rollout_holds_the_true_successors_and_no_shared_buffers():
    steps, args = 200, small(env_id="ALE/Breakout-v5")
    script = np.random.default_rng(1).integers(0, 4, (steps, args.num_envs))
    envs = ppo_atari.make_envs(args)
    obs, _ = envs.reset(seed=5)
    first, agent = obs.copy(), Scripted(envs, script)
    rollout, last, episodes = ppo_atari.collect(envs, agent, obs, steps, 0)
    policy = agent.distribution(rollout.obs.flatten(0, 1))
    torch.testing.assert_close(rollout.values.flatten(), agent.value(rollout.obs.flatten(0, 1)), rtol=0, atol=1e-5)
    log_probs = policy.log_prob(rollout.actions.flatten())
    torch.testing.assert_close(rollout.log_probs.flatten(), log_probs, rtol=0, atol=1e-5)
    assert rollout.obs.dtype == torch.uint8 and rollout.obs[0].equal(torch.as_tensor(first))
    ended = int(rollout.dones[:-1].sum())
    assert ended > 0 and len(rollout.last_obs) == ended + args.num_envs == int(rollout.ends.sum())
    cut = zip(rollout.last_obs, rollout.dones[:-1].nonzero().tolist())  # where only a life is lost the game goes on
    assert sum(not row.equal(rollout.obs[t + 1, i]) for row, (t, i) in cut) == len(episodes) < ended
    going_on = ~rollout.dones[-1]
    assert rollout.last_obs[ended:][going_on].equal(torch.as_tensor(last)[going_on])
    assert len({row.numpy().tobytes() for row in rollout.obs[:, 0]}) > steps / 2  # each step its own frames


def test_a_time_limit_ends_a_game_but_not_its_value():
    """100 steps of 4 frames each, of which the last one's successor is the old game's, not the next one's."""
    options = {"life_loss_info": True, "autoreset_mode": AutoresetMode.SAME_STEP, "reward_clipping": False}
    vector = AtariVectorEnv("breakout", 2, max_num_frames_per_episode=400, **options)
    finals, step = [], vector.step
    vector.step = lambda actions: finals.append(step(actions)) or finals[-1]
    envs = ppo_atari.FullGames(vector)
    obs, _ = envs.reset(seed=5)
    script = np.zeros((150, 2), dtype=np.int64)  # nothing is done: no ball, no life lost but perhaps the first
    rollout, _, episodes = ppo_atari.collect(envs, Scripted(envs, script), obs, 150, 0)
    (end,) = {(step - 1) // 2 for step, _, _ in episodes}
    assert len(episodes) == 2 and all(length == end + 1 for _, _, length in episodes)
    assert rollout.dones[end].all() and not rollout.terminations[end].any()
    successors = rollout.last_obs[rollout.dones[:end].sum() :][:2]
    assert successors.equal(torch.as_tensor(np.stack(finals[end][-1]["final_obs"])))


def test_an_evaluation_game_goes_on_after_a_lost_life():
    env = ppo_atari.make_env("ALE/Breakout-v5")
    _, info = env.reset(seed=0)
    terminated = truncated = False
    while info["lives"] == 5:  # FIRE at the start served the ball
        *_, terminated, truncated, info = env.step(0)
    assert info["lives"] == 4 and not terminated and not truncated


def test_target_kl_ends_the_iteration_after_an_epoch_that_went_too_far(monkeypatch):
    agent, calls = ppo_atari.Agent(*SPACES), []
    obs, none = torch.zeros(16, 2, 4, 84, 84, dtype=torch.uint8), torch.zeros(16, 2, dtype=torch.bool)
    rollout = ppo_atari.Rollout(obs, none.long(), *torch.zeros(3, 16, 2), none, none, obs[-1])
    optimizer = torch.optim.SGD(agent.parameters(), lr=1e-3)
    for far, epochs in ((0.02, 1), (0.01, 4)):
        monkeypatch.setattr(ppo_atari, "approximate_kl", lambda *_, far=far: far)
        gradient = lambda agent, parameters, *_: calls.append(0) or [torch.zeros_like(p) for p in parameters]  # noqa: E731
        ppo_atari.update(agent, optimizer, rollout, ppo_atari.Args(target_kl=0.015), gradient)
        assert len(calls) == 4 * epochs
        calls.clear()


def test_next_values_come_from_the_true_successors():
    """With advantages of one step (lambda 0) every target is r + gamma V(successor), game over or not."""
    args = small(env_id="ALE/Breakout-v5", gae_lambda=0.0, center_advantages=False, normalize_advantages=False)
    steps, envs = 400, ppo_atari.make_envs(args)
    script = np.random.default_rng(0).integers(0, 4, (steps, args.num_envs))
    obs, _ = envs.reset(seed=5)
    agent = Scripted(envs, script)
    rollout, _, episodes = ppo_atari.collect(envs, agent, obs, steps, 0)
    _, returns = ppo_atari.estimate_advantages(agent, rollout, rollout.values.flatten(), args)
    next_values = torch.cat([rollout.values[1:], agent.value(rollout.last_obs[-args.num_envs :])[None]])
    expected = rollout.rewards + args.gamma * next_values * ~rollout.terminations
    assert episodes and rollout.terminations.any()
    torch.testing.assert_close(returns.view_as(expected), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("game, rom", [("Breakout", "breakout"), ("Pong", "pong"), ("MsPacman", "ms_pacman")])
def test_training_and_evaluation_see_the_same_pixels(game, rom):
    """From the first one on: FIRE starts the ball of Breakout, and Ms. Pac-Man has none."""
    env = ppo_atari.make_env(f"ALE/{game}-v5")
    while not isinstance(env, gym.wrappers.AtariPreprocessing):
        env = env.env
    env.noop_max = 0
    vector = AtariVectorEnv(rom, 1, noop_max=0, reward_clipping=False)
    single, _ = env.reset(seed=3)
    batch, _ = vector.reset(seed=3)
    np.testing.assert_array_equal(single, batch[0, -1])
    for action in np.random.default_rng(0).integers(0, env.action_space.n, 100):
        single, reward, *_ = env.step(action)
        batch, rewards, *_ = vector.step(np.array([action]))
        np.testing.assert_array_equal(single, batch[0, -1])
        assert reward == rewards[0]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_agent_keeps_its_contract_and_ratios_start_at_1(bfloat16):
    torch.manual_seed(0)
    agent = ppo_atari.Agent(*SPACES, bfloat16)
    obs = torch.randint(0, 256, (128, 4, 84, 84), dtype=torch.uint8)
    distribution = agent.distribution(obs)
    assert distribution.probs.shape == (128, 6) and agent.value(obs).shape == (128,)
    together, values = agent.both(obs)
    assert together.logits.equal(distribution.logits) and values.equal(agent.value(obs))
    assert agent.distribution(agent.pixels(obs)).logits.equal(distribution.logits)  # converted before or within
    actions, rows = distribution.sample(), torch.randperm(128)[:32]
    minibatch = agent.distribution(obs[rows]).log_prob(actions[rows])
    # On some processors a smaller batch goes through another matrix kernel, which sums in another order.
    torch.testing.assert_close(minibatch, distribution.log_prob(actions)[rows], rtol=0.0, atol=1e-6)


def test_an_evaluation_on_the_cpu_leaves_the_gpu_alone(monkeypatch):
    """Asking for its random state would open a context on every device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", mock.Mock(side_effect=RuntimeError("devices are busy")))
    agent, before = ppo_atari.Agent(*SPACES), torch.get_rng_state()
    ppo_atari.evaluate(agent, "ALE/Pong-v5", num_episodes=0, seed=1)
    assert torch.get_rng_state().equal(before)


def test_the_script_trains_resumes_evaluates_and_films(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    steps = ["--num-envs", "2", "--num-steps", "16", "--num-epochs", "1", "--eval-episodes", "1", "--num-threads", "1"]
    ppo_atari.main(["--env-id", "ALE/Breakout-v5", "--total-timesteps", "64", *steps])
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("ALE-Breakout-v5__ppo_atari__1__")
    assert ppo_atari.load_checkpoint(run_dir)["global_step"] == 64
    ppo_atari.main(["--resume", str(run_dir), "--total-timesteps", "128"])
    assert ppo_atari.load_checkpoint(run_dir)["global_step"] == 128
    rates = [value for _, value in scalars(run_dir)["charts/learning_rate"]]  # down to 0 at 64 steps, then at 128
    assert rates == pytest.approx([2.5e-4, 1.25e-4, 1.25e-4, 0.625e-4])
    capsys.readouterr()
    played, report = [], ppo_atari.report_evaluation
    monkeypatch.setattr(ppo_atari, "report_evaluation", lambda agent, *x: played.append(agent) or report(agent, *x))
    ppo_atari.main(["--evaluate", str(run_dir), "--capture-video"])
    saved = ppo_atari.load_checkpoint(run_dir)["agent"]
    assert all(value.equal(saved[name]) for name, value in played[0].state_dict().items())
    assert "over 1 episodes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ppo_atari.main(["--evaluate", str(run_dir), "--env-id", "ALE/Pong-v5"])
    assert "has 'ALE/Breakout-v5', which stays" in capsys.readouterr().err
    (video,) = (run_dir / "videos").glob("*.mp4")
    assert video.read_bytes()[4:8] == b"ftyp"


def test_the_same_seed_gives_the_same_run_and_iterations_follow_each_other(tmp_path, monkeypatch):
    calls, collect = [], ppo_atari.collect

    def spy(envs, agent, obs, num_steps, global_step):
        result = collect(envs, agent, obs, num_steps, global_step)
        calls.append((obs, global_step, result[1]))
        return result

    monkeypatch.setattr(ppo_atari, "collect", spy)
    monkeypatch.setattr(ppo_atari, "report_evaluation", lambda *_: None)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo_atari.train(small(env_id="ALE/Breakout-v5", num_threads=1, seed=seed, run_dir=tmp_path / name))
    agents = [ppo_atari.load_checkpoint(tmp_path / name)["agent"]["trunk.0.weight"] for name in "abc"]
    assert agents[0].equal(agents[1]) and not agents[0].equal(agents[2])
    assert [step for _, step, _ in calls] == [0, 32] * 3
    assert all(np.array_equal(then, obs) for (*_, then), (obs, *_) in zip(calls[::2], calls[1::2]))


def test_a_signal_ends_the_run_after_its_iteration(tmp_path, monkeypatch, capsys):
    update = ppo_atari.update
    monkeypatch.setattr(ppo_atari, "update", lambda *x: os.kill(os.getpid(), signal.SIGTERM) or update(*x))
    monkeypatch.setattr(ppo_atari, "report_evaluation", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        ppo_atari.train(small(env_id="ALE/Breakout-v5", run_dir=tmp_path / "a"))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert ppo_atari.load_checkpoint(tmp_path / "a")["global_step"] == 32


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("HalfCheetah-v5", "ppo_clip_continuous.py"),
        ("CartPole-v1", "is not an Atari game"),
        ("ALE/NoSuchGame-v5", "does not exist"),
        ("PongNoFrameskip-v4", "give ALE/Pong-v5"),
        ("MsPacmanNoFrameskip-v4", "give ALE/MsPacman-v5"),
    ],
)
def test_what_is_no_game_is_refused_with_what_would_fit(env_id, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ppo_atari.main(["--env-id", env_id])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_evaluation_lacks_is_refused_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)  # the training itself does without it
    with pytest.raises(SystemExit) as stopped:
        ppo_atari.main([])
    assert stopped.value.code == 2 and "opencv" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_game_without_an_action_that_does_nothing_can_be_evaluated():
    env = ppo_atari.make_env("ALE/Backgammon-v5")
    assert env.reset(seed=0)[0].shape == (4, 84, 84)


def test_pixels_are_in_0_to_1_and_in_blocks():
    agent = ppo_atari.Agent(*SPACES)
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    assert F.pixel_shuffle(agent.pixels(obs), 4).equal(obs.float() / 255.0)
    channels_last = obs.contiguous(memory_format=torch.channels_last)
    assert agent.pixels(channels_last).equal(agent.pixels(obs))


def test_the_first_layer_on_blocks_is_the_convolution_of_the_paper():
    torch.manual_seed(0)
    agent, obs = ppo_atari.Agent(*SPACES), torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    layer = agent.trunk[0]
    assert layer.weight.shape == (32, 4, 8, 8)
    expected = F.conv2d(obs.float() / 255.0, layer.weight, layer.bias, stride=4)
    actual = layer(agent.pixels(obs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    (a,), (b,) = (torch.autograd.grad((weights * y).sum(), [layer.weight]) for y in (actual, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)  # sums of 3,200 products


@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_lie_in_memory_as_their_parameters_do(bfloat16):
    """PyTorch's fused Adam walks through both in the order of memory: another one would silently mix weights up."""
    torch.manual_seed(0)
    agent = ppo_atari.Agent(*SPACES, bfloat16)
    obs = agent.pixels(torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8))
    minibatch = (obs, torch.randint(0, 6, (16,)), *torch.randn(4, 16))
    parameters = list(agent.parameters())
    gradients = ppo_atari.loss_gradient(agent, parameters, minibatch, small())
    assert [x.stride() for x in gradients] == [x.stride() for x in parameters]


class Frames(gym.Env):
    """100 steps of reward 5 for action 1, always with the same four frames."""

    observation_space, action_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(2)
    stack = np.arange(4, dtype=np.uint8).repeat(84 * 84).reshape(4, 84, 84)

    def reset(self, **kwargs):
        self.t = 0
        return self.stack, {}

    def step(self, action):
        self.t += 1
        return self.stack, 5.0 * action, self.t == 100, False, {}


def test_evaluation_samples_from_what_it_sees_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(ppo_atari, "make_env", lambda *_: Frames())
    env = Frames()
    agent = ppo_atari.Agent(env.observation_space, env.action_space)

    def distribution(obs):
        assert obs[0].numpy().tobytes() == Frames.stack.tobytes()
        return torch.distributions.Categorical(logits=torch.tensor([[0.5, 0.0]]))

    agent.distribution = distribution
    random = torch.get_rng_state()
    scores = ppo_atari.evaluate(agent, "", num_episodes=2, seed=1)
    assert torch.get_rng_state().equal(random)
    assert 150 < scores[0] < 350 and scores[0] != scores[1] and (scores == ppo_atari.evaluate(agent, "", 2, 1)).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_every_epoch_sees_each_sample_once_beside_its_own_old_policy(recompute):
    torch.manual_seed(0)
    agent = ppo_atari.Agent(*SPACES)
    obs = torch.arange(32, dtype=torch.uint8).view(16, 2, 1, 1, 1).expand(16, 2, 4, 84, 84)
    none, seen = torch.zeros(16, 2, dtype=torch.bool), []
    log_probs, values, rewards = torch.randn(3, 16, 2)
    rollout = ppo_atari.Rollout(obs, torch.arange(32).view(16, 2) % 6, log_probs, values, rewards, none, none, obs[-1])
    args = ppo_atari.Args(num_epochs=2, gamma=0.5, recompute_advantages=recompute)
    advantages, returns = ppo_atari.estimate_advantages(agent, rollout, values.flatten(), args)

    def gradient(agent, parameters, minibatch, args):
        seen.append(minibatch)
        return [torch.ones_like(p) for p in parameters]

    before = [p.detach().clone() for p in agent.parameters()]
    ppo_atari.update(agent, torch.optim.SGD(agent.parameters(), lr=1e-3), rollout, args, gradient)
    assert len(seen) == 8
    orders = [torch.cat([minibatch[0][:, 0, 0, 0] for minibatch in seen[i : i + 4]]) for i in (0, 4)]
    assert not orders[0].equal(orders[0].sort()[0]) and not orders[0].equal(orders[1])  # shuffled, each time anew
    for new, old in zip(agent.parameters(), before):  # a step a minibatch
        torch.testing.assert_close(new, old - 8e-3, rtol=0.0, atol=1e-6)
    first = second = (rollout.actions, log_probs, advantages, returns, values)
    if recompute:  # what the critic says that the first epoch's four steps have left
        for p, old in zip(agent.parameters(), before):
            p.data.copy_(old - 4e-3)
        newest = agent.value(agent.pixels(obs.flatten(0, 1))).detach()
        anew = ppo_atari.estimate_advantages(agent, rollout, newest, args)
        assert not anew[0].allclose(advantages, rtol=0.0, atol=0.01)
        second = (rollout.actions, log_probs, *anew, values)
    for epoch, expected in ((seen[:4], first), (seen[4:], second)):
        columns = [torch.cat(x) for x in zip(*epoch)]
        order = (columns[0][:, 0, 0, 0] * 255).argsort()
        for column, right in zip(columns[1:], expected):
            torch.testing.assert_close(column[order], right.flatten(), rtol=0.0, atol=1e-4)


def test_parameters_kept_fixed_and_those_that_the_loss_does_not_use_stay_and_the_others_learn():
    """As of a trunk that was trained on another game, or a layer for later."""
    torch.manual_seed(0)
    agent = ppo_atari.Agent(*SPACES)
    agent.unused = torch.nn.Linear(1, 1)
    stay = [*agent.unused.parameters(), next(agent.parameters()).requires_grad_(False)]
    before = [p.detach().clone() for p in agent.parameters()]
    obs = torch.randint(0, 256, (16, 2, 4, 84, 84), dtype=torch.uint8)
    none, (values, rewards) = torch.zeros(16, 2, dtype=torch.bool), torch.randn(2, 16, 2)
    actions, log_probs = torch.arange(32).view(16, 2) % 6, torch.full((16, 2), -1.8)
    rollout = ppo_atari.Rollout(obs, actions, log_probs, values, rewards, none, none, obs[-1])
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)
    ppo_atari.update(agent, optimizer, rollout, ppo_atari.Args(), ppo_atari.loss_gradient)
    assert all(p.equal(old) == any(p is s for s in stay) for p, old in zip(agent.parameters(), before))


def test_normalisation_leaves_the_critics_targets():
    agent = ppo_atari.Agent(*SPACES)
    obs = torch.zeros(16, 2, 4, 84, 84, dtype=torch.uint8)
    none = torch.zeros(16, 2, dtype=torch.bool)
    values, rewards = torch.randn(2, 16, 2)
    rollout = ppo_atari.Rollout(obs, none, none, values, rewards, none, none, obs[-1])
    args = ppo_atari.Args(gamma=0.0)
    advantages, returns = ppo_atari.estimate_advantages(agent, rollout, values.flatten(), args)
    assert torch.allclose(returns, rewards.flatten())
    raw = (rewards - values).flatten()
    torch.testing.assert_close(advantages, (raw - raw.mean()) / raw.std(correction=0))


class Pills(gym.vector.VectorEnv):
    """Games of 3 steps, each worth 10 points and the second one -5."""

    num_envs, t = 1, 0

    def reset(self, **kwargs):
        return np.zeros(1), {"episode_frame_number": np.zeros(1, dtype=int)}

    def step(self, actions):
        self.t = (self.t + 1) % 3
        none, reward = np.zeros(1, dtype=bool), np.array([-5.0 if self.t == 2 else 10.0])
        return np.zeros(1), reward, none, none, {"episode_frame_number": np.array([4 * self.t])}


def test_scores_are_raw_and_rewards_their_signs():
    games = ppo_atari.FullGames(Pills())
    games.reset()
    steps = [games.step(None) for _ in range(6)]
    assert [float(reward[0]) for _, reward, *_ in steps] == [1, -1, 1] * 2
    assert [bool(info["game_over"][0]) for *_, info in steps] == [False, False, True] * 2
    assert [float(info["score"][0]) for *_, info in steps] == [10, 5, 15] * 2
    assert [int(info["length"][0]) for *_, info in steps] == [1, 2, 3] * 2


def test_sticky_actions_reach_the_emulator_in_training_and_evaluation(monkeypatch, tmp_path):
    args, asked = small(env_id="ALE/Pong-v5", repeat_action_probability=0.25), []
    vector_env, make_env = ppo_atari.AtariVectorEnv, ppo_atari.make_env
    monkeypatch.setattr(
        ppo_atari, "AtariVectorEnv", lambda *x, **kwargs: asked.append(kwargs) or vector_env(*x, **kwargs)
    )
    ppo_atari.make_envs(args)
    assert asked.pop()["repeat_action_probability"] == 0.25
    monkeypatch.setattr(ppo_atari, "make_env", lambda *x: asked.append(make_env(*x)) or Frames())
    ppo_atari.report_evaluation(ppo_atari.Agent(Frames.observation_space, Frames.action_space), args, tmp_path)
    assert asked.pop().unwrapped.ale.getFloat("repeat_action_probability") == 0.25
