"""The clipped surrogate, and that learning starts from a ratio of exactly 1."""

import pytest
import torch

import ppo_clip_continuous as ppo


# ratio, advantage, expected value, expected gradient with respect to the ratio, at ε = 0.2: the six cases of figure 1
@pytest.mark.parametrize(
    "ratio, advantage, value, gradient",
    [
        (0.5, 2.0, 1.0, 2.0),  # A > 0, below the interval: pulled back up
        (1.1, 2.0, 2.2, 2.0),  # A > 0, inside
        (1.5, 2.0, 2.4, 0.0),  # A > 0, above: nothing more to gain
        (0.5, -2.0, -1.6, 0.0),  # A < 0, below: nothing more to gain
        (0.9, -2.0, -1.8, -2.0),  # A < 0, inside
        (1.5, -2.0, -3.0, -2.0),  # A < 0, above: pulled back down
    ],
)
def test_clipped_surrogate_in_the_six_cases_of_figure_1(ratio, advantage, value, gradient):
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    result = ppo.clipped_surrogate(r, torch.tensor([advantage], dtype=torch.float64), 0.2)
    assert result.shape == (1,) and result.item() == pytest.approx(value)
    result.sum().backward()
    assert r.grad.item() == pytest.approx(gradient)


def test_value_clipping_takes_the_larger_error():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(ppo.squared_error(values, old, returns, None), torch.tensor([0.0, 0.81]))
    torch.testing.assert_close(ppo.squared_error(values, old, returns, 0.2), torch.tensor([0.64, 0.81]))


def test_every_ratio_is_exactly_1_before_the_first_gradient_step(monkeypatch, tmp_path):
    """The same forward pass before and in the first step; what it is fed is tested in test_iteration.py."""
    first_ratios = []

    def spy(agent, parameters, minibatch, args, count=[0]):  # noqa: B006
        if count[0] % (args.num_epochs * args.num_minibatches) == 0:
            obs, actions, old_log_probs = minibatch[:3]
            first_ratios.append((agent.distribution(obs).log_prob(actions) - old_log_probs).exp())
        count[0] += 1
        return original(agent, parameters, minibatch, args)

    original = ppo.loss_gradient
    monkeypatch.setattr(ppo, "loss_gradient", spy)
    args = ppo.Args(env_id="Pendulum-v1", total_timesteps=6144, num_epochs=2, run_dir=tmp_path / "run", eval_episodes=1)
    ppo.train(args)
    assert len(first_ratios) == 3
    assert all((ratio == 1.0).all() for ratio in first_ratios)


@pytest.mark.parametrize("target_kl, epochs", [(1e-9, 1), (1e9, 3)])
def test_target_kl_ends_the_iteration_after_an_epoch_that_went_too_far(target_kl, epochs, monkeypatch, tmp_path):
    calls = []
    original = ppo.loss_gradient
    monkeypatch.setattr(ppo, "loss_gradient", lambda *x: calls.append(1) or original(*x))
    options = {"num_epochs": 3, "eval_episodes": 1, "run_dir": tmp_path / "run"}
    ppo.train(ppo.Args(env_id="Pendulum-v1", total_timesteps=2048, target_kl=target_kl, **options))
    assert len(calls) == 32 * epochs
