"""The study's command line. On top of helpers.study."""

import argparse
import sys
from pathlib import Path

from helpers import command
from helpers.study.plan import EXPERIMENTS, missing, plan
from helpers.study.pool import execute_all
from helpers.study.rows import FILE, append, read_rows


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`."""
    parser = argparse.ArgumentParser(prog="python -m helpers.study", description="Run what data/study.csv does not hold yet.")
    parser.add_argument("--experiment", choices=EXPERIMENTS, help="one experiment (and the grid, which it needs); default all")
    parser.add_argument(
        "--workers",
        type=command.whole("number of workers", most=1000),
        help="runs at a time, one thread each; default one a core",
    )
    parser.add_argument(
        "--file", type=lambda text: Path(command.named(text)), default=FILE, help="where the rows are; default data/study.csv"
    )
    args = parser.parse_args(arguments)

    def work() -> None:
        rows = read_rows(args.file, repair=True)
        for name in EXPERIMENTS if args.experiment is None else dict.fromkeys(("grid", args.experiment)):
            runs = missing(name, rows)
            print(f"{name}: {len(plan(name, rows)) - len(runs)} runs are there, {len(runs)} to go", flush=True)
            for row in execute_all(runs, args.workers):
                append(args.file, row)
                rows.append(row)

    return command.status(work, f"interrupted; every finished run is in {args.file.name}, run the same command to go on")


if __name__ == "__main__":
    sys.exit(main())
