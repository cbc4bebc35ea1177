"""Several processes, as torchrun starts them. Most tests fork theirs from a server that has imported the scripts once;
the last one runs the command itself."""

import functools
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, SCRIPTS, each_of_four, quick, scalars
from torch import distributed

import ppo_atari as atari
import ppo_clip_continuous as clip
import ppo_kl_continuous as kl_penalty
import trpo_continuous as trpo

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers", "torch._dynamo"])


def process(rank, world, store, function, *arguments):
    """What one process does, told its rank as torchrun would; they meet in a file."""
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
    distributed.init_process_group = functools.partial(distributed.init_process_group, "gloo", **place)
    for script in SCRIPTS:
        script.RANK, script.WORLD = rank, world
    function(*arguments)


def together(world, folder, function, *arguments):
    """The exit statuses of processes that call the function with these arguments."""
    store = tempfile.mktemp(dir=folder)
    processes = [CONTEXT.Process(target=process, args=(i, world, store, function, *arguments)) for i in range(world)]
    for one in processes:
        one.start()
    deadline = time.monotonic() + 120.0
    for one in processes:
        one.join(max(0.0, deadline - time.monotonic()))
        one.kill()  # one that waits for another for ever has no status
    return [one.exitcode for one in processes]


def learn(name, args):
    """Train with actions that follow from the observations, and with random numbers that one process draws alike."""
    script = sys.modules[name]
    distribution, collect = script.Agent.distribution, script.collect

    def scripted(agent, obs):
        policy = distribution(agent, obs)
        policy.sample = lambda: 2.0 * obs[:, :1]
        return policy

    def seeded(*arguments):
        if script.WORLD == 1:
            torch.manual_seed(int(torch.randint(2**62, ())) + 1)
        results = collect(*arguments)
        torch.manual_seed(torch.initial_seed() - script.WORLD)
        return results

    script.Agent.distribution, script.collect = scripted, seeded
    script.train(args)


@pytest.mark.parametrize("script, several", [(trpo, 4), (clip, 2), (kl_penalty, 2)], ids=["trpo", "clip", "kl"])
def test_several_processes_learn_bit_for_bit_what_one_learns(script, several, tmp_path):
    """From the same observations, in 3 iterations: networks, statistics, optimizer, random state, and the log."""
    runs = []
    for world in (1, several):
        run_dir = tmp_path / f"{world}"
        assert together(world, tmp_path, learn, script.SCRIPT, quick(script, run_dir, 3, num_envs=4)) == [0] * world
        checkpoint, logged = script.load_checkpoint(run_dir), scalars(run_dir)
        del checkpoint["args"], checkpoint["script"], logged["charts/SPS"]
        runs.append((checkpoint, logged))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=0.0, atol=0.0)
    assert runs[1][1] == runs[0][1] and len(logged["losses/value_loss"]) == 3


def average():
    """The gradient and the advantages of one's own games beside those of all: 8 steps of 4."""
    distributed.init_process_group()
    torch.manual_seed(0)
    agent, args = atari.Agent(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6)), atari.Args()
    obs, actions = torch.randint(0, 256, (8, 4, 4, 84, 84), dtype=torch.uint8), torch.randint(0, 6, (8, 4))
    log_probs, values, raw, returns = torch.randn(4, 8, 4)
    none = torch.zeros(8, 4).bool()

    def of(games):
        rollout = (x[:, games] for x in (obs, actions, log_probs - 2.0, values, raw, none, none))
        rollout = atari.Rollout(*rollout, obs[-1, games])
        atari.compute_gae = lambda *_: (raw[:, games], returns[:, games])
        advantages, targets = atari.estimate_advantages(agent, rollout, args)
        minibatch = rollout.actions.flatten(), rollout.log_probs.flatten(), advantages, targets
        atari.compute_gradient(agent, agent.pixels(rollout.obs.flatten(0, 1)), *minibatch, args)
        gradient = torch.cat([p.grad.flatten() for p in agent.parameters()])
        agent.zero_grad()
        return gradient, advantages.view(8, -1)

    mine = slice(2 * atari.RANK, 2 * atari.RANK + 2)
    gradient, advantages = of(mine)
    atari.WORLD = 1
    whole_gradient, whole_advantages = of(slice(4))
    assert float(whole_gradient.norm()) == pytest.approx(args.max_grad_norm, rel=1e-3)  # it is clipped, once averaged
    torch.testing.assert_close(gradient, whole_gradient, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(advantages, whole_advantages[:, mine], rtol=0.0, atol=1e-6)


def test_averaged_gradients_and_advantages_of_pixels_are_those_of_the_whole_batch(tmp_path):
    assert together(2, tmp_path, average) == [0, 0]


def leave_together(args):
    """The mean KL is 0.5, and 0 or 1 for one alone; at the end the networks are the same."""
    steps, gradient, finish = [], atari.compute_gradient, atari.Run.finish
    atari.approximate_kl = lambda *_: float(atari.RANK)
    atari.compute_gradient = lambda *x: steps.append(1) or gradient(*x)

    def compare(run):
        assert len(steps) == 2 * args.num_minibatches * (1 if args.target_kl < 0.5 else 2)
        network = torch.cat([p.detach().flatten() for p in run.parts["agent"].parameters()])
        assert len({x.numpy().tobytes() for x in atari.exchange(network)}) == 1
        finish(run)

    atari.Run.finish = compare
    atari.train(args)


@pytest.mark.parametrize("target_kl", [0.4, 0.6])
def test_processes_that_average_leave_an_iteration_together_and_have_one_network(target_kl, tmp_path):
    args = quick(atari, tmp_path / "a", num_epochs=2, target_kl=target_kl)
    assert together(2, tmp_path, leave_together, args) == [0, 0]


def signalled(name, args):
    """A signal reaches the second process alone. The first actions, in equal states, are not equal."""
    script, update = sys.modules[name], sys.modules[name].update

    def spy(*arguments):
        if script.RANK == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # as torchrun does
        if script is not atari:
            (rollout,) = (x for x in arguments if isinstance(x, script.Rollout))
            assert len({*rollout.actions[0].flatten().tolist()}) == args.num_envs
        return update(*arguments)

    script.update = spy
    script.train(args)


@each_of_four
def test_a_signal_to_one_process_ends_all_after_the_same_iteration(script, tmp_path):
    options = {} if script is atari else {"env_id": "toy_envs:Endless-v0"}
    args = quick(script, tmp_path / "a", 3, **options)
    assert together(2, tmp_path, signalled, script.SCRIPT, args) == [128 + signal.SIGTERM, 0]
    assert script.load_checkpoint(tmp_path / "a")["global_step"] == args.num_envs * args.num_steps


@each_of_four
def test_a_number_of_processes_that_does_not_fit_is_refused_and_so_is_an_evaluation(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WORLD", 3)
    with pytest.raises(script.RefusedError, match="num_envs: 8 was given, but it must be a multiple of 3"):
        script.train(quick(script, tmp_path / "a", num_envs=8))
    assert not (tmp_path / "a").exists()
    with pytest.raises(script.RefusedError, match="evaluate: .* was given, but it must be left out under torchrun"):
        script.check_args(quick(script, None, num_envs=3, evaluate=tmp_path))


@pytest.mark.parametrize("end", ["SIGTERM", "reward"])
def test_what_ends_one_process_ends_torchrun_and_the_run_goes_on_with_any_number(end, tmp_path):
    """SIGTERM to torchrun, or a NaN in one process in its second iteration."""
    env_id = "toy_envs:Endless-v0" if end == "SIGTERM" else f"toy_envs:Held-{end}-v0"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = "--run-dir a --num-envs 2 --num-steps 64 --num-minibatches 4 --num-epochs 1 --checkpoint-interval 1"
    command += [str(ROOT / "ppo_clip_continuous.py"), "--env-id", env_id, *options.split()]
    torchrun = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    saved_step = lambda: clip.load_checkpoint(tmp_path / "a")["global_step"]  # noqa: E731
    if end == "SIGTERM":
        while torchrun.poll() is None and not ((tmp_path / "a" / "checkpoint.pt").exists() and saved_step() > 0):
            time.sleep(0.05)
        torchrun.send_signal(signal.SIGTERM)
    out, _ = torchrun.communicate(timeout=120.0)
    step, said = saved_step(), re.findall(r"stopped at step .*|stopped: .*", out)
    assert torchrun.returncode == 1, out
    if end != "SIGTERM":
        assert step == 128 and "".join(said).count("NaN") == len(said) == 1, out
        return
    assert step % 128 == 0 and len(said) == 1 and said[0].startswith(f"stopped at step {step}; go on with --resume a")
    steps = step // 128 + 2
    clip.train(quick(clip, None, steps, env_id=env_id, resume=tmp_path / "a"))
    args = quick(clip, None, steps + 2, env_id=env_id, resume=tmp_path / "a")
    assert together(2, tmp_path, clip.train, args) == [0, 0]
    logged = scalars(tmp_path / "a")
    assert [step for step, _ in logged["losses/value_loss"]] == [*range(128, 128 * steps + 257, 128)]
    assert len({step for step, _ in logged["charts/episodic_return"]}) == len(logged["charts/episodic_return"])
