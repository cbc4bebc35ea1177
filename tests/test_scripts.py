"""The scripts as their users run them: train, stop, resume, evaluate, refuse. `Run`, checkpoints and `main` are one
text in all four (test_contract.py): where `train` and networks do not matter, one script stands for all."""

import ctypes.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SCRIPTS, each, each_of_four, quick, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_envs import Held

import ppo_atari as atari
import ppo_clip_continuous as clip
import ppo_kl_continuous as kl_penalty
import trpo_continuous as trpo

COMMON_SCALARS = """charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate losses/policy_loss
    losses/value_loss losses/entropy losses/approx_kl losses/clipfrac losses/explained_variance"""
OWN_SCALARS = {
    clip: "",
    kl_penalty: "losses/kl charts/kl_coef",
    trpo: """losses/kl losses/surrogate_improvement losses/expected_improvement charts/line_search_steps
        charts/cg_residual charts/step_norm charts/skipped_updates""",
}
SMALL = "--num-envs 2 --num-steps 64 --num-minibatches 4 --total-timesteps 256 --eval-episodes 1".split()


def start(script, *arguments, cwd):
    command = [sys.executable, str(ROOT / f"{script.SCRIPT}.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(script, *arguments, cwd):
    process = start(script, *arguments, cwd=cwd)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def exit_of(script, *arguments):
    """What the script's `main` exits with: a status, or a message that makes it 1."""
    with pytest.raises(SystemExit) as stopped:
        script.main([str(x) for x in arguments])
    return stopped.value.code


def save_untrained(run_dir, env_id, **options):
    """(agent, args) of a checkpoint in run_dir that `evaluate` can play."""
    args = quick(clip, None, env_id=env_id, **options)
    with ExitStack() as opened:
        env = clip.make_env(env_id, opened)
    agent = clip.Agent(env.observation_space, env.action_space, args)
    clip.save_checkpoint(run_dir, args, 0, [], agent=agent)
    return agent, args


@each
def test_train_resume_and_evaluate_as_a_user_would(script, tmp_path, capsys):
    batch, sizes = 4 * 256, "--num-envs 4 --num-steps 256 --num-minibatches 4 --total-timesteps 2048".split()
    out = run(script, "--env-id", "Pendulum-v1", *sizes, "--eval-episodes", 2, cwd=tmp_path)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"Pendulum-v1__{script.SCRIPT}__1__\d{{8}}-\d{{6}}", run_dir.name)
    assert json.loads((run_dir / "args.json").read_text())["env_id"] == "Pendulum-v1"
    assert re.search(r"training: -.* over the last 7 episodes", out) and f"run directory: runs/{run_dir.name}" in out
    assert re.search(r"evaluation: -\d+\.\d ± \d+\.\d over 2 episodes", out)

    script.main(["--resume", str(run_dir), "--total-timesteps", str(4 * batch), "--eval-episodes", "3"])
    trained, logged = capsys.readouterr().out, scalars(run_dir)
    assert {*COMMON_SCALARS.split(), *OWN_SCALARS[script].split()} == logged.keys()
    assert [step for step, _ in logged["losses/value_loss"]] == [batch, 2 * batch, 3 * batch, 4 * batch]
    texts = EventAccumulator(str(run_dir)).Reload().Tensors("args/text_summary")  # both parts' arguments are kept
    kept = [json.loads(text.tensor_proto.string_val[0].decode().strip("`\n"))["total_timesteps"] for text in texts]
    assert [text.step for text in texts] == [0, 2 * batch] and kept == [2 * batch, 4 * batch]
    # Environment i cuts an episode at 50 i steps and then plays 200 at a time, anew after the resume.
    ends = sorted(4 * t - 3 + i for i in range(4) for t in range(50 * i + 200, 513, 200))
    assert [step for step, _ in logged["charts/episodic_return"]] == ends + [2 * batch + end for end in ends]
    assert all(value < 0.0 for _, value in logged["charts/episodic_return"])
    assert all(value == 200 for _, value in logged["charts/episodic_length"])

    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    script.main(["--evaluate", str(run_dir), "--eval-episodes", "3"])
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    evaluations = (re.search(r"evaluation: .* over 3 episodes", out)[0] for out in (trained, capsys.readouterr().out))
    assert len(set(evaluations)) == 1  # the saved agent, and the same episodes


@each_of_four
def test_the_same_seed_gives_the_same_scalars_and_another_seed_others_and_steps_grow_smaller(script, tmp_path):
    a, b, c = (scalars(script.train(quick(script, tmp_path / f"{i}", seed=max(i, 1)))) for i in range(3))
    for logged in (a, b, c):
        del logged["charts/SPS"]
    assert a == b and a != c
    rates = [rate / script.Args.learning_rate for _, rate in a["charts/learning_rate"]]
    assert rates == pytest.approx([1.0, 0.5])  # on the way to 0


def test_a_killed_process_resumes_where_it_was(tmp_path):
    sizes = ["--num-envs", 2, "--num-steps", 64, "--num-minibatches", 4, "--checkpoint-interval", 2]
    process = start(clip, "--env-id", "Pendulum-v1", "--run-dir", "a", *sizes, cwd=tmp_path)
    saved_step = lambda: clip.load_checkpoint(tmp_path / "a")["global_step"]  # noqa: E731
    while process.poll() is None and not ((tmp_path / "a" / "checkpoint.pt").exists() and saved_step() > 0):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    step = saved_step()
    assert process.returncode == -signal.SIGKILL and step > 0 and step % 128 == 0
    clip.train(quick(clip, None, step // 128 + 2, resume=tmp_path / "a"))
    steps = [step for step, _ in scalars(tmp_path / "a")["losses/value_loss"]]
    assert steps == list(range(128, step + 2 * 128 + 1, 128))  # none lost, none twice


def test_a_run_and_its_resumption_within_one_second_are_read_in_order_and_nothing_twice(tmp_path, monkeypatch):
    """TensorBoard reads event files in the order of their names: the second in which they begin, host, process. What
    was logged after the checkpoint from which a killed run goes on is forgotten."""
    clock = [1e9 + 0.5]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    for iterations, process, where in ((2, 9, {"run_dir": tmp_path}), (4, 8, {"run_dir": None, "resume": tmp_path})):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        clip.train(quick(clip, iterations=iterations, **where))
        torch.save({**clip.load_checkpoint(tmp_path), "global_step": 128}, tmp_path / "checkpoint.pt")
    assert [step for step, _ in scalars(tmp_path)["losses/value_loss"]] == [128, 256, 384, 512]


@each_of_four
def test_a_signal_ends_the_run_after_its_iteration(script, tmp_path, monkeypatch, capsys):
    update, before = script.update, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(script, "update", lambda *x: os.kill(os.getpid(), signal.SIGTERM) or update(*x))
    args = quick(script, tmp_path, 3)
    with pytest.raises(SystemExit) as stopped:
        script.train(args)
    step = args.num_envs * args.num_steps
    assert stopped.value.code == 128 + signal.SIGTERM and script.load_checkpoint(tmp_path)["global_step"] == step
    assert f"stopped at step {step}; go on with --resume {tmp_path}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before  # the program around it has its own again


@each_of_four
def test_a_restored_run_is_the_saved_one_and_goes_on_with_other_episodes(script, tmp_path, monkeypatch):
    """Networks, statistics, optimizer, random state, counters: saving right after resuming gives the same."""
    first_obs, collect = [], script.collect
    monkeypatch.setattr(script, "collect", lambda *x: first_obs.append(x[2]) or collect(*x))
    script.train(quick(script, tmp_path, num_steps=16 if script is atari else 256))
    saved = script.load_checkpoint(tmp_path)
    monkeypatch.setattr(script, "collect", lambda *x: first_obs.append(x[2]) or 1 / 0)
    torch.manual_seed(99)
    with pytest.raises(ZeroDivisionError):
        script.train(quick(script, None, 100, resume=tmp_path))
    resumed = script.load_checkpoint(tmp_path)
    assert not np.array_equal(first_obs[-1], first_obs[0]) and (saved["recent_returns"] or script is atari)
    assert saved.pop("script") == resumed.pop("script") and saved.pop("args") != resumed.pop("args")  # total_timesteps
    torch.testing.assert_close(resumed, saved, rtol=0.0, atol=0.0)


def test_training_runs_outside_the_main_thread_and_leaves_torchs_number_of_threads_alone(tmp_path):
    """As under Ray Tune: Python refuses signal handlers there, and the number of threads is the program's own."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(clip.train, quick(clip, tmp_path / "a", num_threads=threads + 2)).result() == tmp_path / "a"
    clip.train(quick(clip, tmp_path / "b", num_threads=threads + 2))
    assert torch.get_num_threads() == threads


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20261121-120000")
    first = f"ALE-x-y-v0__{clip.SCRIPT}__1__20261121-120000"
    names = {clip.make_run_dir(clip.Args(env_id="ALE/x:y-v0")).name for _ in range(3)}
    assert len(names) == 3 and first in names and all(name.startswith(first) for name in names)


def test_a_script_pasted_into_a_notebook_defines_its_names_and_starts_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    for script in SCRIPTS:
        names = {"__name__": "__main__"}
        exec(compile((ROOT / f"{script.SCRIPT}.py").read_text(), "cell", "exec", dont_inherit=True), names)
        assert {"Args", "Agent", "train", "main"} <= names.keys()


@each
def test_no_environment_stays_open_whatever_ends_the_script(script, tmp_path, monkeypatch):
    """Success, a NaN, a second signal (which ends it at once), an environment that cannot be made after others were."""
    monkeypatch.setattr(Held, "limit", 2)
    script.main(["--env-id", "toy_envs:Held-v0", "--run-dir", str(tmp_path), *SMALL])
    assert Held.opened == 0
    for fault, num_envs, end in (("-reward", 2, "NaN"), ("-signals", 2, "143"), ("", 4, "2")):
        options = ["--env-id", f"toy_envs:Held{fault}-v0", "--run-dir", tmp_path / end, "--num-envs", num_envs]
        assert end in str(exit_of(script, *SMALL, *options)) and Held.opened == 0
    assert script.load_checkpoint(tmp_path / "143")["global_step"] == 0


@each
def test_a_task_that_opens_only_once_can_be_trained_on_and_evaluated(script, tmp_path, monkeypatch):
    monkeypatch.setattr(Held, "limit", 1)
    script.main(["--env-id", "toy_envs:Held-v0", "--run-dir", str(tmp_path), *SMALL, "--num-envs", "1"])
    script.main(["--evaluate", str(tmp_path)])
    assert Held.opened == 0


def test_flattened_observations_and_shaped_actions(tmp_path):
    clip.main(["--env-id", "toy_envs:Odd-v0", "--run-dir", str(tmp_path), *SMALL])
    assert clip.load_checkpoint(tmp_path)["agent"]["obs_stats.mean"].tolist() == [7.0] * 6 + [0.0, 1.0, 0.0]


def test_an_evaluation_plays_the_mean_actions_of_the_saved_policy_in_different_episodes(tmp_path):
    agent, args = save_untrained(tmp_path, "toy_envs:Counting-v0", eval_episodes=2)
    means = agent.distribution(torch.arange(7.0)[:, None]).mean  # the reward is the action
    assert clip.evaluate(args, tmp_path) == pytest.approx([float(means.detach().sum())] * 2)
    _, args = save_untrained(tmp_path, "Pendulum-v1", eval_episodes=2)
    assert len(set(clip.evaluate(args, tmp_path))) == 2


def test_an_evaluation_that_nothing_ends_is_cut_at_10_000_steps_and_says_so(tmp_path, capsys):
    _, args = save_untrained(tmp_path, "toy_envs:Limitless-v0")
    assert clip.evaluate(args, tmp_path).tolist() == [10_000.0]
    assert "evaluation episode 1 was cut at 10,000 steps" in capsys.readouterr().out


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL to render with")
def test_a_video_needs_no_display_and_its_camera_follows_what_runs_away(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    save_untrained(tmp_path, "Reacher-v5")
    run(clip, "--evaluate", tmp_path, "--capture-video", "--eval-episodes", 1, cwd=tmp_path)
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000 and video.read_bytes()[4:8] == b"ftyp"
    with ExitStack() as opened:
        env = clip.make_env("HalfCheetah-v5", opened, tmp_path / "cheetah")
        env.reset()
        first = env.render()
        for _ in range(8):
            env.unwrapped.data.qpos[0] += 5.0  # 40 m ahead, where a camera that stands still sees the floor alone
            env.step(env.action_space.sample() * 0)
        last = env.render()
    reddish = lambda frame: (frame[..., 0] > frame[..., 2] + 40.0).mean()  # noqa: E731  the cheetah's colour
    assert reddish(last) > 0.5 * reddish(first) > 0.005


@pytest.mark.parametrize("fault, step, of_evaluation", [("reward", 190, "15 of evaluation episode 5"),
    ("observation", 190, "15 of evaluation episode 5"), ("start", 0, "0 of evaluation episode 1")])  # fmt: skip
def test_a_nan_from_the_environment_ends_training_and_evaluation_with_its_step(fault, step, of_evaluation, tmp_path):
    """And the last good checkpoint stays."""
    env_id, what = f"toy_envs:Held-{fault}-v0", "a reward" if fault == "reward" else "an observation"
    message = exit_of(clip, "--env-id", env_id, "--run-dir", tmp_path, "--checkpoint-interval", 1, *SMALL)
    assert f"stopped: the environment returned {what} that is NaN or infinite at step {step};" in message
    checkpoint = clip.load_checkpoint(tmp_path)
    assert checkpoint["global_step"] == step // 128 * 128
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())
    with pytest.raises(FloatingPointError, match=f"that is NaN or infinite at step {of_evaluation}"):
        clip.evaluate(quick(clip, None, env_id=env_id, eval_episodes=6), tmp_path)


@each
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(script, tmp_path, monkeypatch):
    original, factors = script.estimate_advantages, iter([1.0, np.nan])
    monkeypatch.setattr(script, "estimate_advantages", lambda *x: torch.stack(original(*x)) * next(factors))
    options = {"num_epochs": 1} if script is not trpo else {"critic_epochs": 1}
    with pytest.raises(FloatingPointError, match="losses/.* is nan after the update at step 256"):
        script.train(quick(script, tmp_path, checkpoint_interval=1, **options))
    checkpoint = script.load_checkpoint(tmp_path)
    assert checkpoint["global_step"] == 128
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


REFUSALS = [
    (clip, "--env-id CartPole-v1", "env_id: CartPole-v1 has the actions Discrete(2)"),
    (clip, "--env-id no_such_module:Task-v0", "env_id: 'no_such_module:Task-v0' cannot be made"),
    (clip, "--env-id toy_envs:Endless-v0 --capture-video", "env_id: 'toy_envs:Endless-v0' cannot be filmed"),
    (clip, "--run-dir /dev/null/a", "run_dir: /dev/null/a cannot be written"),
    (clip, "--total-timesteps 1023", "total_timesteps: 1023 was given, but it must be at least 2048"),
    (clip, "--num-minibatches 31", "num_minibatches: 31 was given, but it must be a divisor of num_envs * num_steps"),
    (clip, "--seed -1", "seed: -1 was given, but it must be 0 or more"),
    (clip, "--gamma nan", "gamma: nan was given, but it must be between 0 and 1"),
    (clip, "--evaluate nowhere", "nowhere holds no checkpoint that ppo_clip_continuous.py can use"),
    (kl_penalty, "--kl-coef -1", "kl_coef: -1.0 was given, but it must be 0 or more"),
    (trpo, "--min-log-std 0", "min_log_std: 0.0 was given, but it must be at most init_log_std, -0.5"),
    (atari, "--env-id HalfCheetah-v5", "ppo_clip_continuous.py"),
    (atari, "--env-id ALE/NoSuchGame-v5", "does not exist"),
    (atari, "--env-id MsPacmanNoFrameskip-v4", "give ALE/MsPacman-v5"),
]
UNFIT = [  # beside a saved run in `a`
    (clip, "--resume a", "total_timesteps: 256 was given, but it must be at least 384"),
    (clip, "--resume a --evaluate a", "resume: a was given, but it must be left out"),
    (clip, "--resume a --run-dir b --total-timesteps 999", "run_dir: b was given, but it must be left out"),
    (clip, "--run-dir a", "run_dir: a was given, but it must be a directory without a saved run"),
    (clip, "--evaluate a --env-id Hopper-v5", "env_id: Hopper-v5 was given, but it must be Pendulum-v1"),
    (clip, "--evaluate a --hidden-size 32", "a holds no checkpoint"),
    (trpo, "--resume a", "ppo_clip_continuous.py wrote it"),
    (atari, "--evaluate a", "ppo_clip_continuous.py wrote it"),
]


def refused(script, arguments, capsys):
    """The sentence with which the script refuses these arguments; fails where it does not or writes anything."""
    before = sorted(Path.cwd().rglob("*"))
    status, (out, err) = exit_of(script, *arguments.split()), capsys.readouterr()
    assert status == 2 and not out and err.count("\n") == 1 and sorted(Path.cwd().rglob("*")) == before, err
    return err


def test_wrong_arguments_are_refused_in_one_sentence_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script, arguments, message in REFUSALS:
        assert message in refused(script, arguments, capsys), arguments
    if not torch.cuda.is_available():
        assert "device: cuda was given, but it must be cpu" in refused(trpo, "--device cuda", capsys)
    monkeypatch.setitem(sys.modules, "cv2", None)  # the games' training does without it, their evaluation does not
    assert "opencv" in refused(atari, "", capsys)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_what_does_not_fit_a_saved_run_and_damaged_or_malicious_checkpoints_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clip.train(quick(clip, Path("a")))
    path, saved = Path("a", "checkpoint.pt"), clip.load_checkpoint("a")
    capsys.readouterr()
    for script, arguments, message in UNFIT:
        assert message in refused(script, arguments, capsys), arguments
    # Arguments that the script has not any more, or not yet, are no reason to refuse.
    torch.save({**saved, "args": {"env_id": "Pendulum-v1", "num_steps": 64, "eval_episodes": 1, "old": 1}}, path)
    clip.main(["--evaluate", "a"])
    assert "over 1 episodes" in capsys.readouterr().out
    for part in ("agent", "optimizer", "reward_scaler"):
        torch.save({**saved, part: {"other": torch.zeros(3)}}, path)
        assert "a holds no checkpoint" in refused(clip, "--resume a --total-timesteps 999", capsys)
    torch.save({**saved, "args": Malicious()}, path)
    for contents in (path.read_bytes(), path.read_bytes()[:5000], b"", pickle.dumps(Malicious())):
        path.write_bytes(contents)
        for flag in ("--resume a", "--evaluate a"):
            assert "a holds no checkpoint that ppo_clip_continuous.py can use" in refused(clip, flag, capsys)
    assert not Path("pwned").exists()
