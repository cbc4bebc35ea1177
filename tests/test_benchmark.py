"""The tables in the README files are those that the CSVs give."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmark"))

import plot  # noqa: E402


@pytest.mark.parametrize("path, table", plot.TABLES.items(), ids=lambda x: getattr(x, "parent", x) and str(x)[-20:])
def test_tables_and_data_agree(path, table):
    (written,) = plot.MARKED.findall(path.read_text())
    assert written == table() + "\n", "run python benchmark/plot.py"


def test_every_row_of_the_summary_has_its_curve_and_its_mean():
    for (algorithm, env_id), rows in plot.summary().items():
        for row in rows:
            name = f"{env_id.replace('/', '-')}__{row['seed']}.csv"
            returns = [float(line.split(",")[1]) for line in (plot.RESULTS / algorithm / name).read_text().split()[1:]]
            last = returns[-100:]
            assert sum(last) / len(last) == pytest.approx(float(row["train_last_100"]), abs=0.02)
