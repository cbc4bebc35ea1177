"""The tables in the README files are those that the CSVs give."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmark"))

import plot  # noqa: E402
import run  # noqa: E402


@pytest.mark.parametrize("path, marker", plot.TABLES, ids=lambda x: getattr(x, "parent", x) and str(x)[-20:])
def test_tables_and_data_agree(path, marker):
    (written,) = plot.marked(marker).findall(path.read_text())
    assert written == plot.TABLES[path, marker]() + "\n", "run python benchmark/plot.py"


def test_every_row_of_the_summary_has_its_curve_and_its_mean():
    for (algorithm, env_id), rows in plot.summary().items():
        for row in rows:
            name = f"{env_id.replace('/', '-')}__{row['seed']}.csv"
            returns = [float(line.split(",")[1]) for line in (plot.RESULTS / algorithm / name).read_text().split()[1:]]
            last = returns[-100:]
            assert sum(last) / len(last) == pytest.approx(float(row["train_last_100"]), abs=0.02)


def test_a_campaign_runs_what_is_missing_and_skips_what_is_there(tmp_path):
    args = run.Args(
        algorithms=["npg"], env_ids=["Pendulum-v1"], seeds=[101], total_timesteps=4096, compile=False,
        results=tmp_path / "results", runs=tmp_path / "runs",
    )  # fmt: skip
    run.main(args)
    (row,) = (tmp_path / "results" / "summary.csv").read_text().splitlines()[1:]
    assert row.startswith("npg,Pendulum-v1,101,4096,-") and "python trpo_continuous.py --no-line-search" in row
    curve = (tmp_path / "results" / "npg" / "Pendulum-v1__101.csv").read_text().splitlines()
    assert curve[0] == "step,return" and len(curve) == 1 + 8 * 2  # 8 environments, 2 episodes each in 512 steps
    run.main(args)
    assert len((tmp_path / "results" / "summary.csv").read_text().splitlines()) == 2
