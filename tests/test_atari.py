"""What only the Atari script has: lives and games told apart, raw scores, pixels, its network. The rest is tested with
the other scripts, in test_iteration.py and test_scripts.py."""

from contextlib import ExitStack

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from helpers import quick
from torch.nn import functional as F

import ppo_atari

SPACES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6)


def played(envs, actions):
    """(agent, first observation, rollout, last observation, finished games) of these actions, a row a step."""
    torch.manual_seed(0)
    agent, rows = ppo_atari.Agent(envs.single_observation_space, envs.single_action_space), iter(actions)
    both, (obs, _) = agent.both, envs.reset(seed=5)

    def scripted(obs):
        distribution, values = both(obs)
        distribution.sample = lambda: torch.as_tensor(next(rows))
        return distribution, values

    agent.both = scripted
    return agent, obs.copy(), *ppo_atari.collect(envs, agent, obs, len(actions), 0)


@pytest.fixture(scope="module")
def games():
    """Random actions of two games in which a reward is 100 points, and what `played` makes of them."""
    args, actions = ppo_atari.Args("ALE/RoadRunner-v5", num_envs=2), np.random.default_rng(0).integers(0, 18, (500, 2))
    with ExitStack() as opened:
        return actions, *played(ppo_atari.make_envs(args, opened), actions)


def test_lives_and_games_are_told_apart_and_scores_are_the_emulators_and_rewards_their_signs(games):
    """The same actions on the same seeds in an environment that knows full games only: its terminations are our
    finished games, the sum of its rewards our scores; our terminations besides are the lost lives."""
    script, _, _, rollout, _, episodes = games
    plain = AtariVectorEnv("road_runner", 2, autoreset_mode=AutoresetMode.SAME_STEP, reward_clipping=False)
    lives, expected, lives_lost, rewards = plain.reset(seed=5)[1]["lives"].copy(), [], 0, []
    score, length = np.zeros(2), np.zeros(2, dtype=int)
    for t, actions in enumerate(script):
        _, reward, terminated, truncated, infos = plain.step(actions)
        score, length = score + reward, length + 1
        rewards.append(reward)
        lives_lost += (infos["lives"] < lives).sum()
        for i in np.flatnonzero(terminated | truncated):
            expected.append((2 * t + i + 1, score[i], length[i]))  # each environment's own step
            assert rollout.terminations[t, i]
            score[i], length[i] = 0, 0
        lives = infos["lives"].copy()
    assert episodes == expected and len(expected) >= 2 and sum(score for _, score, _ in expected) >= 100
    np.testing.assert_array_equal(rollout.rewards, np.sign(rewards))
    assert int(rollout.terminations.sum()) == len(expected) + lives_lost and lives_lost >= 6


def test_the_rollout_holds_what_the_agent_saw_said_and_came_to(games):
    _, agent, first, rollout, last, episodes = games
    policy, values = agent.both(rollout.obs.flatten(0, 1))
    torch.testing.assert_close(rollout.values.flatten(), values, rtol=0, atol=1e-5)
    log_probs = policy.log_prob(rollout.actions.flatten())
    torch.testing.assert_close(rollout.log_probs.flatten(), log_probs, rtol=0, atol=1e-5)
    assert rollout.obs.dtype == torch.uint8 and rollout.obs[0].equal(torch.as_tensor(first))
    assert len({row.numpy().tobytes() for row in rollout.obs[:, 0]}) > 250  # each step its own frames
    ended = int(rollout.dones[:-1].sum())
    assert ended > 0 and len(rollout.last_obs) == ended + 2 == int(rollout.ends.sum())
    cut = zip(rollout.last_obs, rollout.dones[:-1].nonzero().tolist())  # where only a life is lost the game goes on
    assert sum(not row.equal(rollout.obs[t + 1, i]) for row, (t, i) in cut) == len(episodes) < ended
    going_on = ~rollout.dones[-1]
    assert rollout.last_obs[ended:][going_on].equal(torch.as_tensor(last)[going_on])


@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_come_from_the_true_successors_and_end_with_a_life(games, normalize):
    _, agent, _, rollout, _, _ = games
    args = quick(ppo_atari, None, center_advantages=normalize, normalize_advantages=normalize)
    next_values = torch.cat([rollout.values[1:], torch.zeros(1, 2)])
    next_values[rollout.ends] = agent.value(rollout.last_obs).detach()
    ends = rollout.terminations, rollout.dones
    right, targets = ppo_atari.compute_gae(rollout.rewards, rollout.values, next_values, *ends, 0.99, 0.95)
    right = (right - right.mean()) / right.std(correction=0) if normalize else right
    advantages, returns = ppo_atari.estimate_advantages(agent, rollout, args)
    torch.testing.assert_close(advantages, right.flatten(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returns, targets.flatten(), rtol=1e-4, atol=1e-5)


def test_a_time_limit_ends_a_game_but_not_its_value():
    """100 steps of 4 frames each, of which the last one's successor is the old game's, not the next one's."""
    options = {"life_loss_info": True, "autoreset_mode": AutoresetMode.SAME_STEP, "reward_clipping": False}
    vector = AtariVectorEnv("breakout", 2, max_num_frames_per_episode=400, **options)
    finals, step = [], vector.step
    vector.step = lambda actions: finals.append(step(actions)) or finals[-1]
    # Nothing is done: no ball, no life lost but perhaps the first.
    _, _, rollout, _, episodes = played(ppo_atari.FullGames(vector), np.zeros((150, 2), dtype=np.int64))
    (end,) = {(step - 1) // 2 for step, _, _ in episodes}
    assert len(episodes) == 2 and all(length == end + 1 for _, _, length in episodes)
    assert rollout.dones[end].all() and not rollout.terminations[end].any()
    successors = rollout.last_obs[rollout.dones[:end].sum() :][:2]
    assert successors.equal(torch.as_tensor(np.stack(finals[end][-1]["final_obs"])))


def test_an_evaluation_game_goes_on_after_a_lost_life_and_every_game_can_be_evaluated():
    with ExitStack() as opened:
        env = ppo_atari.make_env("ALE/Breakout-v5", opened)
        _, info = env.reset(seed=0)
        while info["lives"] == 5:  # FIRE at the start served the ball
            *_, terminated, truncated, info = env.step(0)
        assert info["lives"] == 4 and not terminated and not truncated
        without_noop = ppo_atari.make_env("ALE/Backgammon-v5", opened)
        assert without_noop.reset(seed=0)[0].shape == (4, 84, 84)


@pytest.mark.parametrize("game, rom", [("Breakout", "breakout"), ("MsPacman", "ms_pacman")])
def test_training_and_evaluation_see_the_same_pixels(game, rom):
    """From the first one on: FIRE starts the ball of Breakout, and Ms. Pac-Man has none."""
    with ExitStack() as opened:
        env = ppo_atari.make_env(f"ALE/{game}-v5", opened).env  # without the stack of four
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
def test_the_agent_keeps_its_contract_and_gradients_lie_in_memory_as_their_parameters_do(bfloat16):
    """PyTorch's fused Adam on CPUs walks through both in the order of memory (compiled ones: test_iteration.py)."""
    torch.manual_seed(0)
    agent = ppo_atari.Agent(*SPACES, bfloat16)
    obs = torch.randint(0, 256, (128, 4, 84, 84), dtype=torch.uint8)
    distribution = agent.distribution(obs)
    assert distribution.probs.shape == (128, 6) and agent.value(obs).shape == (128,)
    together, values = agent.both(obs)
    assert together.logits.equal(distribution.logits) and values.equal(agent.value(obs))
    assert agent.distribution(agent.pixels(obs)).logits.equal(distribution.logits)  # converted before or within
    actions = distribution.sample()
    of_32 = agent.distribution(obs[:32]).log_prob(actions[:32])  # a batch's size must not tell
    torch.testing.assert_close(of_32, distribution.log_prob(actions)[:32], rtol=0.0, atol=1e-6)
    ppo_atari.compute_gradient(agent, agent.pixels(obs[:16]), actions[:16], *torch.randn(3, 16), ppo_atari.Args())
    assert all(p.grad.stride() == p.stride() for p in agent.parameters())


def test_the_first_layer_on_blocks_of_pixels_is_the_convolution_of_the_paper():
    torch.manual_seed(0)
    agent, obs = ppo_atari.Agent(*SPACES), torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    layer, pixels = agent.trunk[0], agent.pixels(obs)
    assert F.pixel_shuffle(pixels, 4).equal(obs.float() / 255.0)
    assert agent.pixels(obs.contiguous(memory_format=torch.channels_last)).equal(pixels)
    assert layer.weight.shape == (32, 4, 8, 8)
    expected, actual = F.conv2d(obs.float() / 255.0, layer.weight, layer.bias, stride=4), layer(pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    (a,), (b,) = (torch.autograd.grad((weights * y).sum(), [layer.weight]) for y in (actual, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)  # sums of 3,200 products


def test_the_script_trains_evaluates_and_films_sticky_games_and_leaves_none_open(tmp_path, monkeypatch, capsys):
    asked, closed = [], []

    def watched(maker):
        def make(*arguments, **options):
            asked.append(options["repeat_action_probability"])
            env = maker(*arguments, **options)
            close = env.close
            env.close = lambda **kwargs: closed.append(env) or close(**kwargs)
            return env

        return make

    monkeypatch.setattr(gym, "make", watched(gym.make))
    monkeypatch.setattr(ppo_atari, "AtariVectorEnv", watched(ppo_atari.AtariVectorEnv))
    sizes = "--num-envs 2 --num-steps 16 --num-epochs 1 --eval-episodes 1 --total-timesteps 64".split()
    here = ["--num-threads", "1", "--device", "cpu"]
    ppo_atari.main(["--run-dir", str(tmp_path), "--repeat-action-probability", "0.25", *sizes, *here])
    ppo_atari.main(["--evaluate", str(tmp_path), "--capture-video", *here])
    assert asked[1:] == [0.25] * 3 and len({id(env) for env in closed}) == 4  # the first one only shows that it can be
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert video.read_bytes()[4:8] == b"ftyp" and capsys.readouterr().out.count("over 1 episodes") == 2


class Frames(gym.Env):
    """100 steps of reward 5 for action 1, always with the same four frames."""

    observation_space, action_space, t = SPACES[0], gym.spaces.Discrete(2), 0

    def reset(self, **kwargs):
        return np.zeros((4, 84, 84), np.uint8), {}

    def step(self, action):
        self.t += 1
        return self.reset()[0], 5.0 * action, self.t % 100 == 0, False, {}


def test_evaluation_samples_from_the_saved_policy_whatever_the_random_state(monkeypatch, tmp_path):
    agent, args = ppo_atari.Agent(SPACES[0], Frames.action_space), quick(ppo_atari, None, eval_episodes=2)
    agent.actor.bias.data[:] = torch.tensor([0.5, 0.0])  # with bytes of 0 nothing else speaks: 38% take action 1
    ppo_atari.save_checkpoint(tmp_path, args, 0, [], agent=agent)
    monkeypatch.setattr(ppo_atari, "make_env", lambda *_: Frames())
    scores = ppo_atari.evaluate(args, tmp_path)
    torch.manual_seed(7)
    assert 100 < scores[0] < 300 and scores[0] != scores[1] and (scores == ppo_atari.evaluate(args, tmp_path)).all()
