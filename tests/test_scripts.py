"""The scripts as their users run them: train, stop, resume, evaluate, refuse."""

import ctypes.util
import errno
import json
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal

import ppo_clip_continuous
import ppo_kl_continuous
import trpo_continuous

ROOT = Path(__file__).parent.parent
SCRIPTS = {"trpo": trpo_continuous, "ppo_clip": ppo_clip_continuous, "ppo_kl": ppo_kl_continuous}
COMMON_SCALARS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/SPS",
    "charts/learning_rate",
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
}
OWN_SCALARS = {
    "ppo_clip": set(),
    "ppo_kl": {"losses/kl", "charts/kl_coef"},
    "trpo": {
        "losses/kl",
        "losses/surrogate_improvement",
        "losses/expected_improvement",
        "charts/line_search_steps",
        "charts/cg_residual",
        "charts/step_norm",
        "charts/skipped_updates",
    },
}


@pytest.fixture(params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture
def script(name):
    return SCRIPTS[name]


@pytest.fixture
def batch(script):
    """Environment steps of one iteration at the script's default settings."""
    return script.Args.num_envs * script.Args.num_steps


def start(name, *arguments, cwd):
    command = [sys.executable, str(ROOT / f"{name}_continuous.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, **pipes)


def run(name, *arguments, cwd, status=0):
    process = start(name, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out + err


def scalars(run_dir):
    """{tag: [(step, value), ...]} of a run's TensorBoard events."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def quick(script, run_dir, **changes):
    """Arguments for a run of two iterations on Pendulum."""
    defaults = {
        "env_id": "Pendulum-v1",
        "total_timesteps": 2 * script.Args.num_envs * script.Args.num_steps,
        "eval_episodes": 1,
        "run_dir": run_dir,
    }
    if "num_epochs" in vars(script.Args()):
        defaults["num_epochs"] = 1
    return script.Args(**{**defaults, **changes})


def test_train_resume_and_evaluate_as_a_user_would(name, script, tmp_path, capsys):
    batch, sizes = 4 * 256, ["--num-envs", 4, "--num-steps", 256, "--total-timesteps", 2 * 4 * 256]
    out = run(name, "--env-id", "Pendulum-v1", *sizes, "--eval-episodes", 2, cwd=tmp_path)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"Pendulum-v1__{name}_continuous__1__\d{{8}}-\d{{6}}", run_dir.name)
    assert json.loads((run_dir / "args.json").read_text())["env_id"] == "Pendulum-v1"
    assert f"run directory: runs/{run_dir.name}" in out and re.search(
        r"evaluation: -\d+\.\d ± \d+\.\d over 2 episodes", out
    )

    trained = run(name, "--resume", run_dir, "--total-timesteps", 4 * batch, "--eval-episodes", 3, cwd=tmp_path)
    logged = scalars(run_dir)
    assert COMMON_SCALARS | OWN_SCALARS[name] == logged.keys()
    assert [step for step, _ in logged["losses/value_loss"]] == [batch, 2 * batch, 3 * batch, 4 * batch]
    assert script.load_checkpoint(run_dir)["global_step"] == 4 * batch
    texts = EventAccumulator(str(run_dir)).Reload().Tensors("args/text_summary")  # both parts' arguments are kept
    kept = [json.loads(text.tensor_proto.string_val[0].decode().strip("`\n")) for text in texts]
    assert [(text.step, args["total_timesteps"]) for text, args in zip(texts, kept)] == [
        (0, 2 * batch),
        (2 * batch, 4 * batch),
    ]
    # Environment i cuts an episode at 50 i steps and then plays 200 at a time, anew after the resume.
    whole = sum((2 * 256 - 50 * i) // 200 for i in range(4))
    assert len(logged["charts/episodic_return"]) == 2 * whole
    ends = sorted(4 * t - 3 + i for i in range(4) for t in range(50 * i + 200, 513, 200))
    assert [step for step, _ in logged["charts/episodic_return"]] == ends + [2 * batch + end for end in ends]
    assert all(value < 0.0 for _, value in logged["charts/episodic_return"])
    assert all(value == 200 for _, value in logged["charts/episodic_length"])

    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    script.main(["--evaluate", str(run_dir), "--eval-episodes", "3"])
    out = capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    evaluation = re.compile(r"evaluation: .* over 3 episodes")
    assert evaluation.search(out)[0] == evaluation.search(trained)[0]  # the saved agent, and the same episodes


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL to render with")
def test_video_without_a_display(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    size = {"num_envs": 2, "num_steps": 32, "total_timesteps": 64}
    ppo_clip_continuous.train(quick(ppo_clip_continuous, tmp_path / "a", env_id="Reacher-v5", **size))
    run("ppo_clip", "--evaluate", "a", "--capture-video", "--eval-episodes", 1, cwd=tmp_path)
    (video,) = (tmp_path / "a" / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000 and video.read_bytes()[4:8] == b"ftyp"


def test_a_machine_without_egl_imports_the_script_all_the_same(name, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    runpy.run_path(str(ROOT / f"{name}_continuous.py"))
    assert "MUJOCO_GL" not in os.environ  # MuJoCo could not even be imported with egl


@pytest.mark.skipif(not (ctypes.util.find_library("EGL") or "DISPLAY" in os.environ), reason="nothing to render with")
def test_the_camera_follows_what_runs_away(script):
    env = script.make_env("HalfCheetah-v5", render_mode="rgb_array")
    first = env.render()
    for _ in range(40):
        env.unwrapped.data.qpos[0] += 1.0  # 40 m ahead, where a camera that stands still sees the floor alone
        env.step(env.action_space.sample() * 0)
    last = env.render()
    reddish = lambda frame: (frame[..., 0] > frame[..., 2] + 40).mean()  # noqa: E731  the cheetah's colour
    assert reddish(last) > 0.5 * reddish(first) > 0.005
    env.close()


def test_the_same_seed_gives_the_same_scalars_and_another_seed_others(script, tmp_path):
    for directory, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.train(quick(script, tmp_path / directory, seed=seed))
    a, b, c = (scalars(tmp_path / directory) for directory in "abc")
    for logged in (a, b, c):
        del logged["charts/SPS"]
    assert a == b and a != c


class Ensemble(torch.nn.Module):
    """Mean of five linear critics, written so that the gradient of w comes transposed in memory."""

    def __init__(self, observations):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(5, observations))

    def forward(self, obs):
        return torch.einsum("...o,eo->...e", obs, self.w).tanh().mean(-1, keepdim=True)


def test_a_gradient_that_lies_otherwise_in_memory_than_its_parameter_updates_the_right_weights(
    script, tmp_path, monkeypatch
):
    """PyTorch's fused Adam for CPUs goes by the order of memory: a transposed gradient would reach other weights."""

    class Agent(script.Agent):
        def __init__(self, observation_space, action_space, *options):
            super().__init__(observation_space, action_space, *options)
            self.critic = Ensemble(observation_space.shape[0])

    monkeypatch.setattr(script, "Agent", Agent)
    adam, critics = torch.optim.Adam, []
    for fused in (True, False):
        monkeypatch.setattr(torch.optim, "Adam", lambda *x, fused, on=fused, **options: adam(*x, fused=on, **options))
        run_dir = script.train(quick(script, tmp_path / str(fused), num_steps=16, total_timesteps=128))
        critics.append(script.load_checkpoint(run_dir)["agent"]["critic.w"])
    torch.testing.assert_close(*critics, rtol=1e-4, atol=1e-5)


def test_parameters_kept_fixed_stay_and_the_others_learn(script, tmp_path, monkeypatch):
    """As of a network that is trained on in part, or a policy with a standard deviation of its own choice."""
    fixed, before = ("actor_log_std", "actor_mean.0.weight", "critic.0.bias"), {}

    class Agent(script.Agent):
        def __init__(self, *spaces_and_options):
            super().__init__(*spaces_and_options)
            for name in fixed:
                self.get_parameter(name).requires_grad_(False)
            before.update({name: p.detach().clone() for name, p in self.named_parameters()})

    monkeypatch.setattr(script, "Agent", Agent)
    run_dir = script.train(quick(script, tmp_path, num_steps=16, total_timesteps=128))
    after = script.load_checkpoint(run_dir)["agent"]
    assert {name for name in before if after[name].equal(before[name])} == set(fixed)


def test_parameters_that_the_loss_does_not_use_stay_and_stop_nothing(script, tmp_path, monkeypatch):
    """As the log-std beside a standard deviation that a network of one's own gives, or a layer for later."""
    before = []

    class Agent(script.Agent):
        def __init__(self, *spaces_and_options):
            super().__init__(*spaces_and_options)
            self.critic.append(torch.nn.Linear(1, 1))
            before.append(self.critic[-1].bias.detach().clone())

        def value(self, obs):
            return self.critic[:-1](self.obs_stats.normalize(obs)).squeeze(-1)

        def distribution(self, obs):
            mean = self.actor_mean(self.obs_stats.normalize(obs))
            return Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1, validate_args=False)

    monkeypatch.setattr(script, "Agent", Agent)
    run_dir = script.train(quick(script, tmp_path, num_steps=16, total_timesteps=128))
    after = script.load_checkpoint(run_dir)["agent"]
    assert (after["actor_log_std"] == -0.5).all() and (after["critic.5.bias"] == before[-1]).all()
    assert not (after["actor_mean.0.bias"] == 0.0).any() and not (after["critic.0.bias"] == 0.0).any()


def test_processes_collect_what_a_loop_collects(script):
    """The same seeds give the same rollout, bit for bit, whichever way the environments are stepped."""
    rollouts = []
    for vectorization in ("sync", "async"):
        args = script.Args(env_id="Hopper-v5", num_envs=2, vectorization=vectorization)
        envs = script.make_envs(args)
        torch.manual_seed(3)
        agent = script.Agent(envs.single_observation_space, envs.single_action_space)
        obs, _ = envs.reset(seed=4)
        rollouts.append(script.collect(envs, agent, obs, 60, 0))
        envs.close()
    (loop, loop_obs, loop_episodes), (processes, processes_obs, processes_episodes) = rollouts
    assert all(x.equal(y) for x, y in zip(loop, processes)) and (loop_obs == processes_obs).all()
    assert loop_episodes == processes_episodes and len(loop_episodes) > 2


def collected(script, vectorization, env_id, num_steps):
    """(rollout, episodes) of num_steps in 4 environments."""
    envs = script.make_envs(script.Args(env_id=env_id, num_envs=4, vectorization=vectorization))
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    obs, _ = envs.reset(seed=1)
    rollout, _, episodes = script.collect(envs, agent, obs, num_steps, 0)
    envs.close()
    return rollout, episodes


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_environments_that_never_fail_are_spread_over_their_episodes(script, vectorization):
    """Of 4 environments with episodes of 20 steps, three cut one at 5, 10 and 15, which is not reported."""
    rollout, episodes = collected(script, vectorization, "toy_envs:Endless-v0", 60)
    ends = [(column.nonzero().flatten() + 1).tolist() for column in rollout.dones.T]
    assert ends == [[20, 40, 60], [5, 25, 45], [10, 30, 50], [15, 35, 55]]
    assert not rollout.terminations.any()  # a cut is bootstrapped, as a time limit is
    assert len(episodes) == 9 and all(episodic_return == length == 20 for _, episodic_return, length in episodes)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_episode_that_ends_where_it_would_be_cut_is_a_whole_one(script, vectorization):
    """And infos that no vector environment could merge are not handed to it."""
    rollout, episodes = collected(script, vectorization, "toy_envs:Five-v0", 20)
    assert rollout.terminations.sum() == len(episodes) == 16
    assert all(episodic_return == length == 5 for _, episodic_return, length in episodes)


@pytest.mark.parametrize(
    "signal_number, vectorization", [(signal.SIGKILL, "sync"), (signal.SIGTERM, "async"), (signal.SIGINT, "async")]
)  # fmt: skip
def test_a_stopped_run_resumes(signal_number, vectorization, tmp_path):
    batch = 256
    size = ["--num-envs", 2, "--num-steps", 128, "--num-minibatches", 4, "--vectorization", vectorization]
    process = start(
        "ppo_clip", "--env-id", "Pendulum-v1", "--run-dir", "a", "--checkpoint-interval", 2, *size, cwd=tmp_path
    )
    events = lambda: [path for path in (tmp_path / "a").glob("events*") if path.stat().st_size > 5000]  # noqa: E731
    deadline = time.monotonic() + 60
    while not events() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal_number)  # as Ctrl-C, `timeout` and schedulers do: to all processes of the group
    out, err = process.communicate(timeout=60)
    step = ppo_clip_continuous.load_checkpoint(tmp_path / "a")["global_step"]
    assert step > 0 and step % batch == 0
    if signal_number == signal.SIGKILL:
        assert process.returncode == -signal_number
    else:
        assert process.returncode == 128 + signal_number
        assert f"stopped at step {step}; go on with --resume a" in out
    goal = step + 2 * batch
    ppo_clip_continuous.main(["--resume", str(tmp_path / "a"), "--total-timesteps", str(goal), "--eval-episodes", "1"])
    steps = [step for step, _ in scalars(tmp_path / "a")["losses/value_loss"]]
    assert steps == list(range(batch, goal + 1, batch))  # none lost, none twice


def test_training_runs_outside_the_main_thread(script, tmp_path):
    """As under Ray Tune; Python refuses signal handlers there."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(script.train, quick(script, tmp_path / "a")).result() == tmp_path / "a"


def test_a_restored_run_is_the_saved_one(script, batch, tmp_path, monkeypatch):
    """Networks, statistics, optimizer, random state, counters: saving right after resuming gives the same."""
    script.train(quick(script, tmp_path / "a"))
    saved = script.load_checkpoint(tmp_path / "a")
    args = quick(script, None, total_timesteps=4 * batch, resume=tmp_path / "a")
    stop = RuntimeError("stopped before the first iteration")

    def interrupt(*_):
        raise stop

    monkeypatch.setattr(script, "collect", interrupt)
    monkeypatch.setattr(torch, "randint", lambda *_: 5)  # the seed of the new episodes is drawn after restoring
    torch.manual_seed(99)
    with pytest.raises(RuntimeError, match=str(stop)):
        script.train(args)
    resumed = script.load_checkpoint(tmp_path / "a")
    assert saved.pop("args") != resumed.pop("args")  # the raised total_timesteps

    def compare(a, b, path):
        assert type(a) is type(b), path
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for key in a:
                compare(a[key], b[key], f"{path}/{key}")
        elif isinstance(a, torch.Tensor):
            assert a.equal(b), path
        else:
            assert a == b, path

    compare(saved, resumed, "")


def test_the_critic_learns_the_value_of_an_endless_task_through_its_time_limit(script, tmp_path):
    """Reward 1 for ever at γ = 0.9 is worth 10. Taking the time limit for an end would give at most 8.8, and less
    on average: 5.6."""
    options = {"total_timesteps": 24_576, "num_minibatches": 8, "learning_rate": 1e-3, "eval_episodes": 1}
    args = script.Args(env_id="toy_envs:Endless-v0", gamma=0.9, run_dir=tmp_path / "a", **options)
    script.train(args)
    checkpoint = script.load_checkpoint(tmp_path / "a")
    agent = script.Agent(*(env := script.make_env(args.env_id)) and (env.observation_space, env.action_space))
    agent.load_state_dict(checkpoint["agent"])
    value = float(agent.value(torch.zeros(1, 1))) / float(checkpoint["reward_scaler"]["scale"])
    assert value == pytest.approx(10.0, rel=0.05)


def test_the_evaluation_of_a_task_that_nothing_ends_comes_to_an_end(script):
    env = script.make_env("toy_envs:Limitless-v0")
    agent = script.Agent(env.observation_space, env.action_space)
    assert script.evaluate(agent, "toy_envs:Limitless-v0", num_episodes=1, seed=1).tolist() == [10_000.0]


def test_a_resumed_run_takes_the_step_size_that_it_is_given(script, batch, tmp_path):
    where = str(tmp_path / "a")  # from Python a string is a path too
    script.train(quick(script, where, anneal_lr=True, learning_rate=1e-3))
    changes = {"anneal_lr": False, "learning_rate": 2e-3, "total_timesteps": 4 * batch}
    script.train(quick(script, None, resume=where, **changes))
    assert [x for _, x in scalars(tmp_path / "a")["charts/learning_rate"]] == pytest.approx([1e-3, 5e-4, 2e-3, 2e-3])


def test_runs_of_the_same_second_have_directories_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20261121-120000")
    names = [script.free_run_dir(script.Args(env_id="ALE/x:y-v0")).name for _ in range(3)]
    first = f"ALE-x-y-v0__{script.SCRIPT}__1__20261121-120000"
    assert names == [first, f"{first}-2", f"{first}-3"]


def test_a_directory_for_runs_that_leads_nowhere_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("not mounted")
    with pytest.raises(script.RefusedError, match="run_dir: runs/.* cannot be written"):
        script.train(quick(script, None))


def test_ctrl_c_during_an_evaluation_ends_without_a_traceback(script, tmp_path, monkeypatch, capsys):
    script.train(quick(script, tmp_path / "a"))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "evaluate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--evaluate", str(tmp_path / "a")])
    assert stopped.value.code == 130 and "stopped" in capsys.readouterr().err


def test_flattened_observations_and_shaped_actions(script, tmp_path):
    script.train(quick(script, tmp_path / "a", env_id="toy_envs:Odd-v0"))
    assert script.load_checkpoint(tmp_path / "a")["agent"]["obs_stats.mean"].tolist() == [7.0] * 6 + [0.0, 1.0, 0.0]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("what", ["NanReward", "InfiniteObservation", "HugeObservation"])
def test_a_nan_stops_the_run_with_its_step_and_leaves_the_checkpoint(script, what, tmp_path, capsys):
    size = "--num-envs 1 --num-steps 128 --total-timesteps 512 --checkpoint-interval 1".split()
    with pytest.raises(SystemExit) as stopped:
        script.main(["--env-id", f"toy_envs:{what}-v0", *size, "--run-dir", str(tmp_path / "a")])
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and "stopped: the environment returned" in err
    assert ("a reward" if what == "NanReward" else "an observation") in err and "at step 300" in err
    assert script.load_checkpoint(tmp_path / "a")["global_step"] == 256


def test_a_full_disk_stops_the_run_in_one_sentence_and_leaves_the_checkpoint(script, tmp_path, capsys):
    resource = pytest.importorskip("resource")  # stands in for the disk: no file may grow past a limit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = "--num-envs 2 --num-steps 64 --num-minibatches 4 --total-timesteps 512 --checkpoint-interval 1".split()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # the optimizer's state does not fit in any more
        with pytest.raises(SystemExit) as stopped:
            script.main(["--env-id", "Pendulum-v1", *size, "--run-dir", str(tmp_path / "a")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = f"stopped: [Errno {errno.EFBIG}] File too large; the last checkpoint is untouched\n"
    assert stopped.value.code == 1 and capsys.readouterr().err.endswith(message)
    assert script.load_checkpoint(tmp_path / "a")["global_step"] == 0


def test_a_last_checkpoint_that_cannot_be_written_gives_the_signals_back(script, batch, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(script, "save_checkpoint", mock.Mock(side_effect=[None, OSError(errno.ENOSPC, "disk full")]))
    with pytest.raises(OSError, match="disk full"):
        script.train(quick(script, tmp_path / "a", total_timesteps=batch))
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_error_of_the_system_that_is_no_full_disk_keeps_its_traceback(script, monkeypatch):
    monkeypatch.setattr(script, "train", mock.Mock(side_effect=ConnectionResetError(errno.ECONNRESET, "a dead worker")))
    with pytest.raises(ConnectionResetError, match="a dead worker"):
        script.main([])


def test_an_infinity_that_an_episode_starts_from_never_reaches_the_statistics(script, tmp_path):
    with pytest.raises(FloatingPointError, match="an observation that is NaN or infinite at step 0"):
        script.train(quick(script, tmp_path / "a", env_id="toy_envs:InfiniteStart-v0", checkpoint_interval=1))
    assert all(x.isfinite().all() for x in script.load_checkpoint(tmp_path / "a")["agent"].values())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("what", ["NanReward", "InfiniteObservation"])
def test_a_nan_in_the_evaluation_is_no_result(script, what):
    env_id = f"toy_envs:{what}-v0"  # at step 300 of its life: in the 15th episode of 20 steps
    env = script.make_env(env_id)
    agent = script.Agent(env.observation_space, env.action_space)
    assert len(script.evaluate(agent, env_id, 14, seed=1)) == 14
    with pytest.raises(FloatingPointError, match="a NaN or an infinity in evaluation episode 15"):
        script.evaluate(agent, env_id, 20, seed=1)
    with pytest.raises(FloatingPointError, match="a NaN or an infinity in evaluation episode 1"):
        script.evaluate(agent, "toy_envs:InfiniteStart-v0", 1, seed=1)


def test_the_agent_takes_observations_as_environments_return_them(script):
    env = script.make_env("InvertedPendulum-v5")
    agent, obs = script.Agent(env.observation_space, env.action_space), env.reset(seed=1)[0]
    obs = torch.as_tensor(obs)[None]
    assert obs.dtype == torch.float64 and agent.value(obs).equal(agent.value(obs.float()))
    assert agent.distribution(obs).mean.equal(agent.distribution(obs.float()).mean)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(script, batch, tmp_path, monkeypatch):
    original = script.estimate_advantages
    calls = []

    def spoiled(*arguments):
        calls.append(1)
        return tuple(x * np.nan if len(calls) > 1 else x for x in original(*arguments))

    monkeypatch.setattr(script, "estimate_advantages", spoiled)
    with pytest.raises(FloatingPointError, match=f"losses/.* is nan after the update at step {2 * batch}"):
        script.train(quick(script, tmp_path / "a", checkpoint_interval=1))
    checkpoint = script.load_checkpoint(tmp_path / "a")
    assert checkpoint["global_step"] == batch
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


REFUSALS = [
    (["--env-id", "CartPole-v1"], "env_id: CartPole-v1 has the action space Discrete(2)"),
    (["--env-id", "ALE/Pong-v5"], "ppo_atari.py"),
    (["--env-id", "NoSuchTask-v0"], "env_id: 'NoSuchTask-v0' cannot be made"),
    (["--env-id", "no_such_module:Task-v0"], "env_id: 'no_such_module:Task-v0' cannot be made"),
    (["--env-id", "a:b:c"], "env_id: 'a:b:c' cannot be made"),
    (["--env-id", "toy_envs:Broken-v0"], "env_id: 'toy_envs:Broken-v0' cannot be made (ValueError: no such file)"),
    (["--env-id", "toy_envs:Whole-v0"], "env_id: toy_envs:Whole-v0 has the action space Box(0, 10, (2,), int64)"),
    (["--env-id", "toy_envs:Unbounded-v0"], "env_id: toy_envs:Unbounded-v0 has observations of no fixed size"),
    (["--env-id", "toy_envs:Endless-v0", "--capture-video"], "cannot be made for --capture-video"),
    (["--run-dir", "/dev/null/a"], "run_dir: /dev/null/a cannot be written"),
    (["--total-timesteps", "1023"], "total_timesteps: 1023 was given, but it must be at least {batch}"),
    (
        ["--num-minibatches", "31"],
        "num_minibatches: 31 was given, but it must be a divisor of num_envs * num_steps = {batch}",
    ),
    (["--num-envs", "0"], "num_envs: 0 was given, but it must be positive"),
    (["--num-steps", "-5"], "num_steps: -5"),
    (["--num-envs", "1", "--num-steps", "1"], "num_steps: 1 was given, but it must be at least 2"),
    (["--eval-episodes", "0"], "eval_episodes: 0"),
    (["--seed", "-1"], "seed: -1"),
    (["--gamma", "1.01"], "gamma: 1.01 was given, but it must be between 0.0 and 1.0"),
    (["--gae-lambda", "-0.1"], "gae_lambda: -0.1"),
    (["--gamma", "nan"], "gamma: nan"),
    (["--num-threads", "1000000"], "num_threads: 1000000 was given, but it must be between 1 and 1024"),
    (["--resume", "nowhere"], "resume or evaluate: nowhere/checkpoint.pt does not exist"),
    (["--evaluate", "nowhere"], "resume or evaluate: nowhere/checkpoint.pt does not exist"),
]
OWN_REFUSALS = {
    "ppo_clip": [(["--learning-rate", "0"], "learning_rate: 0.0"), (["--clip-coef", "-1"], "clip_coef: -1.0")],
    "ppo_kl": [(["--learning-rate", "inf"], "learning_rate: inf"), (["--target-kl", "0"], "target_kl: 0.0")],
    "trpo": [
        (["--max-kl", "0"], "max_kl: 0.0"),
        (["--backtrack-coef", "1"], "backtrack_coef: 1.0"),
        (["--min-log-std", "0"], "min_log_std: 0.0 must be at most init_log_std, -0.5"),
    ],
}
if not torch.cuda.is_available():
    REFUSALS.append((["--device", "cuda"], "device: cuda was given, but it must be cpu or auto"))


def refused(script, arguments, capsys):
    """The message with which the script refuses these arguments; fails where it does not or writes anything."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert sorted(Path.cwd().rglob("*")) == before
    return err


def test_wrong_arguments_are_refused_in_one_sentence_before_any_work(
    name, script, batch, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for arguments, message in REFUSALS + OWN_REFUSALS[name]:
        err = refused(script, arguments, capsys)
        assert message.format(batch=batch) in err, arguments
        assert err.count("\n") == 1 and "Traceback" not in err, err
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "compile: True was given, but it must be off" in refused(script, ["--compile"], capsys)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "no-such-directory")
    assert "Python's own headers are missing: no-such-directory" in refused(script, ["--compile"], capsys)


def test_the_exit_status_of_a_refusal_is_2_in_the_shell(tmp_path):
    assert "gamma: 2.0" in run("trpo", "--gamma", 2, cwd=tmp_path, status=2)
    assert not list(tmp_path.iterdir())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_wrong_choices_and_types_from_python_are_refused(script, tmp_path):
    """The command line offers only the right ones; "cuda:0" would otherwise be trained on the CPU."""
    for name, wrong in (("device", "cuda:0"), ("vectorization", "Async")):
        with pytest.raises(script.RefusedError, match=f"{name}: {wrong} was given, but it must be one of (auto|sync)"):
            script.train(quick(script, tmp_path / "a", **{name: wrong}))
    numbers = [("num_steps", 16.0, "int"), ("num_envs", True, "int"), ("gamma", "0.9", "float")]
    numbers += [("gamma", np.float64(0.9), "float, not float64")]  # a checkpoint with it could not be loaded
    for name, wrong, right in (*numbers, ("anneal_lr", "no", "bool"), ("resume", 5, "Path or NoneType")):
        with pytest.raises(script.RefusedError, match=f"{name}: {wrong} was given, but it must be of type {right}"):
            script.train(quick(script, tmp_path / "a", **{name: wrong}))
    assert not (tmp_path / "a").exists()


def test_train_refuses_to_train_where_an_evaluation_is_asked_for(script, tmp_path):
    with pytest.raises(script.RefusedError, match="evaluate: .*a was given to train"):
        script.train(quick(script, None, evaluate=tmp_path / "a"))


def test_whole_numbers_will_do_for_floats(script, tmp_path):
    script.train(quick(script, tmp_path / "a", gamma=1, init_log_std=0))
    assert script.load_checkpoint(tmp_path / "a")["agent"]["actor_log_std"].is_floating_point()


def test_a_run_on_the_cpu_leaves_the_gpu_alone(script, tmp_path, monkeypatch):
    """Asking for its random state would open a context there, for each of many runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", mock.Mock(side_effect=RuntimeError("devices are busy")))
    script.train(quick(script, tmp_path / "a"))
    assert (tmp_path / "a" / "checkpoint.pt").exists()


def test_a_signal_in_the_last_iteration_points_to_the_evaluation(script, batch, tmp_path, monkeypatch, capsys):
    original = script.update

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(script, "update", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_status:
        script.train(quick(script, tmp_path / "a", total_timesteps=batch))
    assert exit_status.value.code == 128 + signal.SIGTERM
    assert f"go on with --evaluate {tmp_path / 'a'}" in capsys.readouterr().out
    script.main(["--evaluate", str(tmp_path / "a"), "--eval-episodes", "1"])
    assert signal.getsignal(signal.SIGTERM) == before  # the program around it has its own again


@pytest.mark.parametrize("times, step", [(1, 1), (2, 0)])
def test_a_signal_ends_the_run_after_its_iteration_and_a_second_one_at_once(
    script, times, step, tmp_path, monkeypatch, capsys
):
    original, batch = script.update, 128
    sizes = {"num_envs": 2, "num_steps": 64, "num_minibatches": 4}

    def stopped(*arguments):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(script, "update", stopped)
    with pytest.raises(SystemExit) as exit_status:
        script.train(quick(script, tmp_path / "a", total_timesteps=3 * batch, **sizes))
    assert exit_status.value.code == 128 + signal.SIGTERM
    assert script.load_checkpoint(tmp_path / "a")["global_step"] == step * batch


def test_a_signal_that_ends_the_environments_too_is_a_stop_like_any_other(script, batch, tmp_path, monkeypatch, capsys):
    """Slurm and systemd signal every process: with --vectorization async the next step finds its pipes closed."""
    original, calls = script.collect, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise EOFError
        return original(*arguments)

    monkeypatch.setattr(script, "collect", broken)
    with pytest.raises(SystemExit) as exit_status:
        script.train(quick(script, tmp_path / "a"))
    assert exit_status.value.code == 128 + signal.SIGTERM
    assert script.load_checkpoint(tmp_path / "a")["global_step"] == batch
    assert f"stopped at step {batch}; go on with --resume" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [True, False])
def test_an_iteration_goes_on_where_the_last_one_ended_and_scales_rewards_as_asked(
    script, scale, tmp_path, monkeypatch
):
    calls, raw, saved, seen = [], [], [], []
    batch, sizes = 128, {"num_envs": 2, "num_steps": 64, "num_minibatches": 4}
    collect, update, save_checkpoint = script.collect, script.update, script.save_checkpoint

    def spy_on_collect(envs, agent, obs, num_steps, global_step):
        result = collect(envs, agent, obs, num_steps, global_step)
        calls.append((obs, global_step, result[1]))
        seen.append(result[0].obs.flatten(0, 1).double())
        return result

    def spy_on_update(agent, optimizer, rollout, rewards, *rest):
        raw.append(rewards.equal(rollout.rewards))
        return update(agent, optimizer, rollout, rewards, *rest)

    monkeypatch.setattr(script, "collect", spy_on_collect)
    monkeypatch.setattr(script, "update", spy_on_update)
    monkeypatch.setattr(script, "save_checkpoint", lambda *x, **y: saved.append(y) or save_checkpoint(*x, **y))
    script.train(
        quick(script, tmp_path / "a", total_timesteps=5 * batch, checkpoint_interval=2, scale_rewards=scale, **sizes)
    )
    assert [step for _, step, _ in calls] == [i * batch for i in range(5)]
    assert all(np.array_equal(then, obs) for (*_, then), (obs, *_) in zip(calls, calls[1:]))
    assert raw == [not scale] * 5
    assert [counters["global_step"] // batch for counters in saved] == [0, 2, 4, 5]  # first, when due, and at the end
    statistics = script.load_checkpoint(tmp_path / "a")["agent"]  # of what the policy has seen, and of nothing else
    torch.testing.assert_close(statistics["obs_stats.mean"], torch.cat(seen).mean(0))
    torch.testing.assert_close(statistics["obs_stats.var"], torch.cat(seen).var(0, correction=0))


def test_evaluation_episodes_differ(script):
    env = script.make_env("Pendulum-v1")
    returns = script.evaluate(script.Agent(env.observation_space, env.action_space), "Pendulum-v1", 2, seed=1)
    assert returns[0] != returns[1]


def another_pendulum(self, **kwargs):
    self.action_space, self.observation_space = gym.spaces.Box(-2.0, 2.0, (1,)), gym.spaces.Box(-8.0, 8.0, (2,))
    self.render_mode = None


def test_foreign_damaged_and_malicious_checkpoints_are_refused(name, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script.train(quick(script, tmp_path / "a"))
    other = SCRIPTS["ppo_clip" if name != "ppo_clip" else "trpo"]
    capsys.readouterr()
    for flag in ("--resume", "--evaluate"):
        assert f"was written by {name}_continuous.py" in refused(other, [flag, "a"], capsys)
    assert "total_timesteps" in refused(script, ["--resume", "a"], capsys)  # already done
    evaluate = ["--evaluate", "a", "--eval-episodes", "1"]
    assert "env_id: the run in a has 'Pendulum-v1'" in refused(script, [*evaluate, "--env-id", "Hopper-v5"], capsys)
    assert "init_log_std: the run in a has -0.5" in refused(script, [*evaluate, "--init-log-std", "0"], capsys)
    assert "hidden_size: the run in a has" in refused(script, [*evaluate, "--hidden-size", "32"], capsys)
    no_normalization = [*evaluate, "--no-normalize-observations"]  # its statistics are in the checkpoint all the same
    assert "normalize_observations: the run in a has True" in refused(script, no_normalization, capsys)
    script.main([*evaluate, "--seed", "5"])  # other episodes of the same run
    capsys.readouterr()
    assert "seed: the run" in refused(script, ["--resume", "a", "--total-timesteps", "99999", "--seed", "5"], capsys)
    assert "run_dir: a" in refused(script, ["--run-dir", "a"], capsys)
    assert "run_dir: b" in refused(script, ["--resume", "a", "--run-dir", "b", "--total-timesteps", "99999"], capsys)
    assert "eval_episodes: 0" in refused(script, ["--evaluate", "a", "--eval-episodes", "0"], capsys)
    assert "not both" in refused(script, ["--evaluate", "a", "--resume", "a"], capsys)
    assert "run_dir: b" in refused(script, [*evaluate, "--run-dir", "b"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert "capture_video: True" in refused(script, [*evaluate, "--capture-video"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(script, "find_spec", lambda package: None)
        assert "the package moviepy is not installed" in refused(script, ["--capture-video"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
        assert "checkpoint.pt cannot be read (Permission denied)" in refused(script, evaluate, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(PendulumEnv, "__init__", another_pendulum)
        for arguments in (evaluate, ["--resume", "a", "--total-timesteps", "99999"]):
            message = "env_id: Pendulum-v1 or this script's Agent has changed since the run was saved"
            assert message in refused(script, arguments, capsys)
    path = tmp_path / "a" / "checkpoint.pt"
    good = path.read_bytes()
    for bad in (b"", b"junk", good[: len(good) // 2], pickle.dumps(Malicious()), pickle.dumps({"script": name})):
        path.write_bytes(bad)
        for flag in ("--resume", "--evaluate"):
            assert "damaged or not a checkpoint" in refused(script, [flag, "a"], capsys)
    path.write_bytes(good)
    saved = script.load_checkpoint("a")
    torch.save({**saved, "args": {k: v for k, v in saved["args"].items() if k != "gamma"}}, path)
    assert "another version" in refused(script, evaluate, capsys)
    machine = {"num_threads": 2, "compile": True, "capture_video": True}
    torch.save({**saved, "args": {**saved["args"], **machine}}, path)
    args = script.parse_args(evaluate)  # perhaps on another machine
    assert (args.num_threads, args.compile, args.capture_video) == (1, False, False)
    path.write_bytes(good)
    torch.save({k: v for k, v in script.load_checkpoint("a").items() if k != "optimizer"}, path)
    assert "damaged or not a checkpoint" in refused(script, ["--resume", "a"], capsys)
    for part, message in ("reward_scaler", "do not fit"), ("agent", "do not fit"), ("torch_rng", "damaged"):
        path.write_bytes(good)
        torch.save({**script.load_checkpoint("a"), part: torch.zeros(3)}, path)
        assert message in refused(script, ["--resume", "a", "--total-timesteps", "99999"], capsys)
    torch.save({"script": f"{name}_continuous", "args": Malicious()}, path)
    assert "damaged or not a checkpoint" in refused(script, ["--evaluate", "a"], capsys)
    assert not (tmp_path / "pwned").exists()
