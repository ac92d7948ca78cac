"""The page of the experiment from its raw files alone: results.json, README.md, the plots and report.html."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiment_page.markdown import make_page
from experiment_page.plots import write_plots
from experiment_page.raw import read_experiment
from experiment_page.results import as_text, make_results

from ultramem.runtime.report import read_training_run, render_training, write_report

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, default=HERE / "raw", help="what examples/experiment.py --publish wrote")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    args = parser.parse_args()
    try:
        write_page(args.raw, args.out)
    except (FileNotFoundError, ValueError) as error:
        print(f"make_page: {error}", file=sys.stderr)
        return 2
    return 0


def write_page(raw: Path, out: Path) -> None:
    """Read and check everything, then write everything; see `read_experiment` for what is refused."""
    experiment = read_experiment(raw)
    results = make_results(experiment)
    page = make_page(results)
    first_seeds = [runs[0] for runs in experiment.families.values()]
    report = render_training(
        [read_training_run(raw / run.folder, name=run.name) for run in first_seeds],
        title=f"The four families, seed {first_seeds[0].seed}",
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(as_text(results))
    (out / "README.md").write_text(page)
    write_plots(experiment, results, out)
    write_report(out / "report.html", report)
    print(out / "README.md")


if __name__ == "__main__":
    sys.exit(main())
