"""The figures' data, by the scripts' own functions on small settings; the drawing itself where matplotlib is there."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "figures"))

import draw  # noqa: E402

SMALL = {"env_id": "Hopper-v5", "total_timesteps": 4096, "hidden_size": 8}


def test_the_bound_stays_below_the_return_and_its_steps_never_make_it_worse():
    """TRPO, theorem 1 with eq. 9, on a task whose return, visits and advantages are known exactly."""
    for gamma, data in draw.minorise_maximise(draw.Args()).items():
        for start, bound in zip(data["path"], data["bounds"]):
            assert (bound["bound"] <= data["return"] + 1e-3).all()
            (touching,) = draw.lower_bound(start, [start], gamma)["bound"]
            assert touching == pytest.approx(data["at"][start], abs=1e-3)
        gains = np.diff([data["at"][theta] for theta in data["path"]])
        assert (gains > 0).all() and data["at"][data["trpo"]] > data["at"][data["path"][0]]
        surrogate = data["bounds"][0]["surrogate"]
        assert surrogate[-1] > data["return"][-1] + 0.1  # no bound without its price
        c = 4 * gamma / (1 - gamma) ** 2 * np.abs(draw.small_task(data["path"][0], gamma)[2]).max()
        assert data["bounds"][0]["c"] == pytest.approx(c)


def test_clipped_objective_is_the_papers_figure_1():
    data = draw.clipped_objective(draw.Args())
    assert data["clipped +1"].max() == pytest.approx(1.2) and data["clipped -1"].max() == pytest.approx(-0.8)
    assert data["clipped +1"][0] == 0.0 and data["clipped -1"][-1] == -2.0


def test_natural_gradient_follows_its_closed_form():
    """With H = diag(1/σ², 2) the natural gradient is (σ² g_1, g_2 / 2), and TRPO's steps stay on their circles."""
    data = draw.natural_gradient(draw.Args(), iterations=20, batch=256)
    sigma = np.exp(data["grid"][:, 1:])
    expected = data["vanilla"] * np.hstack([sigma**2, np.full_like(sigma, 0.5)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs((expected * data["natural"]).sum(1)).min() > 0.99
    for path in data["paths"].values():
        assert abs(path[-1, 0] - 1.0) < 0.1 and path[-1, 1] < -1.0  # the mean goes to the best action, the std falls
    (old_mean, old_std), (mean, std) = data["paths"]["TRPO"][:2]
    kl = std - old_std + (np.exp(2 * old_std) + (old_mean - mean) ** 2) / (2 * np.exp(2 * std)) - 0.5
    assert 0.5 * data["delta"] < kl <= data["delta"] * 1.001


def test_line_search_and_conjugate_gradient_on_a_real_batch():
    data = draw.line_search(draw.Args(**SMALL))
    assert data["accepted"] and np.interp(data["tries"][-1], data["lengths"], data["kl"]) <= data["delta"] * 1.05
    errors = draw.conjugate_gradient(draw.Args(**SMALL))["errors"]
    for error in errors.values():
        assert error[0] == 1.0 and (np.diff(error) < 1e-9).all()
    assert errors[0.1][20] < 1e-2


def test_every_picture_in_the_repository_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    draw.main(draw.Args(**SMALL, folder=tmp_path))
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures == {path.name for path in draw.FOLDER.glob("*.png")}
