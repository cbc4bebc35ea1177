"""Learning curves of every episode, as older versions of run.py left them, in at most 200 rows a run.

    python benchmark/thin.py                        # what lies in results/ itself
    python benchmark/thin.py --campaign elsewhere   # takes the runs of another --results folder into results/

Thins each run's curve (`run.thin`) and writes the figures that need every episode (`run.figures`) into summary.csv.
A run that results/ has already is replaced. What has been thinned before stays as it is, so it may be run again.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import run
import tyro


@dataclass
class Args:
    campaign: Path | None = None
    """The folder with the runs to take in: a summary.csv and one folder an algorithm; by default results itself."""
    results: Path = run.Args.results
    """Where they go."""


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (folder / "summary.csv").open() as f:
        return {(row["algorithm"], row["env_id"], row["seed"]): row for row in csv.DictReader(f, restval="")}


def main(args: Args) -> int:
    """Returns how many curves were thinned."""
    campaign, thinned = args.campaign or args.results, 0
    args.results.mkdir(parents=True, exist_ok=True)
    rows = rows_of(args.results) if (args.results / "summary.csv").exists() else {}
    for key, row in rows_of(campaign).items():
        name = Path(row["algorithm"], f"{run.file_name(row['env_id'], row['seed'])}.csv")
        with (campaign / name).open() as f:
            header, *lines = csv.reader(f)
        if header == ["step", "return"]:
            episodes = [(int(step), float(value)) for step, value in lines]
            figures = run.figures(episodes)
            del figures["train_last_100"]  # it is there, and where a run was stopped by hand not always of all episodes
            row |= figures
            lines = run.thin(episodes, int(row["total_timesteps"]))
            thinned += 1
        rows[key] = row
        run.write_curve(args.results / name, lines)
    with (args.results / "summary.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, max(rows.values(), key=len).keys(), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    print(f"{thinned} curves thinned, {len(rows)} runs in {args.results}")
    return thinned


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
