"""The tables in the README files are those that the CSVs give."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmark"))

import peers_faults  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
import table1  # noqa: E402
import thin  # noqa: E402

TABLES = {**plot.TABLES, **table1.TABLES}


@pytest.mark.parametrize("path, marker", TABLES, ids=lambda x: str(x)[-16:])
def test_tables_and_data_agree(path, marker):
    (written,) = plot.marked(marker).findall(path.read_text())
    assert written == TABLES[path, marker]() + "\n", "run python benchmark/plot.py and benchmark/table1.py --no-run"


def test_gymnasium_forgets_the_return_before_the_last_reward_of_a_terminated_episode():
    """What README says of NormalizeReward; where this fails, Gymnasium has mended it."""
    std = peers_faults.gymnasium_normalize_reward()
    assert std["ours"] == pytest.approx(std["true"], rel=1e-3)
    assert std["of a vector"] < 0.9 * std["true"] and std["NormalizeReward"] < 0.5 * std["true"]


def test_interquartile_mean_and_interval():
    assert plot.interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0]), np.array([3.0, 4.0, -50.0, 5.0])) == 2.5
    low, high = plot.interval([np.full(3, 1.0), np.full(5, 3.0)], plot.mean_of_tasks)
    assert low == high == pytest.approx(2.0)  # every task counts the same, however many runs it has
    low, high = plot.interval([np.arange(30.0)], plot.mean_of_tasks)
    assert 10.0 < low < 14.5 < high < 19.0


def test_every_row_of_the_summary_has_its_curve():
    """At most 200 rows, and 100 episodes at the end with about the mean that the summary has of them."""
    assert {plot.curve_of(row) for rows in plot.summary().values() for row in rows} == set(plot.RESULTS.glob("*/*.csv"))
    for rows in plot.summary().values():
        for row in rows:
            steps, returns, episodes = np.loadtxt(plot.curve_of(row), delimiter=",", skiprows=1, ndmin=2).T
            assert len(steps) <= 200 and (np.diff(steps) > 0).all() and (episodes >= 1).all(), row
            about = 0.03 * np.ptp(returns) + 1.0  # the oldest of these rows reaches beyond the 100 episodes
            last_100 = plot.last_100(returns[-100:], episodes[-100:])[-1]
            assert last_100 == pytest.approx(float(row["train_last_100"]), abs=about), row


def test_a_thinned_curve_has_the_means_of_all_its_episodes(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [(int(step), float(rng.normal(2000.0, 900.0))) for step in np.sort(rng.integers(1, 10**6, 3000))]
    with (tmp_path / "curve.csv").open("w") as f:
        f.write("step,return\n" + "".join(f"{step},{value}\n" for step, value in episodes))
    row = {"algorithm": "a", "env_id": "E-v0", "seed": "1", "total_timesteps": "1000000", "train_last_100": "7"}
    (tmp_path / "a").mkdir()
    (tmp_path / "curve.csv").rename(tmp_path / "a" / "E-v0__1.csv")
    (tmp_path / "summary.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    assert thin.main(thin.Args(tmp_path, tmp_path / "into")) == 1
    assert thin.main(thin.Args(tmp_path / "into", tmp_path / "into")) == 0  # once is enough
    rows = np.loadtxt(tmp_path / "into" / "a" / "E-v0__1.csv", delimiter=",", skiprows=1)
    assert len(rows) == 200 and rows[:, 2].sum() == 3000
    for low, high in ((0, 50_000), (475_000, 525_000), (950_000, 10**6)):  # what the picture averages over
        inside = (rows[:, 0] > low) & (rows[:, 0] <= high)
        expected = np.mean([value for step, value in episodes if low < step <= high])
        assert np.average(rows[inside, 1], weights=rows[inside, 2]) == pytest.approx(expected, abs=0.01)
    row = thin.rows_of(tmp_path / "into")["a", "E-v0", "1"]
    returns = np.array([value for _, value in episodes])
    assert float(row["train_first_2"]) == pytest.approx(returns[:2].mean(), abs=0.01) and row["train_last_100"] == "7"
    assert float(row["worst_10"]) == pytest.approx(min(returns[i : i + 10].mean() for i in range(2991)), abs=0.01)
    assert row["steps_to_3000"] == ""
    rising = [(100 * i, 100.0 * i) for i in range(1, 100)]  # 20 in a row: 100 (i - 9.5) after episode i
    assert run.figures(rising)["steps_to_3000"] == 4000 and run.figures(rising[:5])["worst_10"] == ""


def test_no_run_is_reported_twice():
    for runs in plot.summary().values():
        assert len({run["seed"] for run in runs}) == len(runs)


def test_a_campaign_runs_what_is_missing_and_skips_what_is_there(tmp_path, monkeypatch):
    args = run.Args(
        algorithms=["npg"], env_ids=["Pendulum-v1"], seeds=[101], total_timesteps=4096, compile=False,
        results=tmp_path / "results", runs=tmp_path / "runs",
    )  # fmt: skip
    run.main(args)
    (row,) = (tmp_path / "results" / "summary.csv").read_text().splitlines()[1:]
    assert row.startswith("npg,Pendulum-v1,101,4096,-") and "python trpo_continuous.py --no-line-search" in row
    assert re.search(r" script ([0-9a-f]{7,}\+?|unknown),", row)  # what ran, as a commit of this repository
    curve = (tmp_path / "results" / "npg" / "Pendulum-v1__101.csv").read_text().splitlines()
    with pytest.raises(SystemExit, match="algorithms: npq was given"):
        run.main(dataclasses.replace(args, algorithms=["npq"]))
    longer = dataclasses.replace(args, total_timesteps=8192)
    line = run.run(longer, "npg", "Pendulum-v1", 101)
    assert "FAILED" in line and "another command, python trpo_continuous.py --no-line-search" in line
    # 8 environments of 512 steps; after a cut at 25 i steps, which is no episode, environment i plays 200 at a time
    assert curve[0] == "step,return,episodes"
    assert sum(int(line.split(",")[2]) for line in curve[1:]) == 5 * 2 + 3 * 1
    run.main(args)
    assert len((tmp_path / "results" / "summary.csv").read_text().splitlines()) == 2

    # Killed while it trained.
    run_dir = tmp_path / "runs" / "npg" / "Pendulum-v1__101"
    arguments = row.split("trpo_continuous.py ")[1].split(",")[0].split()
    whole = (run_dir / "checkpoint.pt").read_bytes()
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "global_step": 0}, run_dir / "checkpoint.pt")
    assert run.how_to_go_on("trpo_continuous.py", arguments, run_dir) == "--resume"
    (run_dir / "checkpoint.pt").write_bytes(whole)

    # Killed while it evaluated, or between curve and row: there is a whole run, but no row. And another setting's run.
    (tmp_path / "results" / "summary.csv").unlink()
    assert "FAILED" not in run.run(args, "npg", "Pendulum-v1", 101)
    again = (tmp_path / "results" / "summary.csv").read_text().splitlines()[1]
    assert again.split(",")[:7] == row.split(",")[:7] and again.split(",")[7] == ""  # no speed
    (tmp_path / "runs" / "npg").rename(tmp_path / "runs" / "trpo_no_floor")
    assert "other arguments (line_search, min_log_std)" in run.run(args, "trpo_no_floor", "Pendulum-v1", 101)
