"""How much of the main job is arithmetic that nobody can leave out? Counted operations against measured minutes.

    python benchmarks/job.py --seconds 1700 [--profile quick]

The products of all trainings of a profile are counted (forward and backward, ``runner.estimates.count_step``) and
divided by the rate of one large product on this machine, a thread for each worker. ``--seconds`` is what the whole job
took (``benchmarks/times.py quick``). Attacks, controls, figures and everything between products are the rest.
"""

from __future__ import annotations

import argparse
import sys

import common
import torch

from mia_utils.models.backbones import use_fast_products
from mia_utils.runner import estimates, profiles


def main(arguments: list[str] | None = None) -> int:
    """Count, time one product, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seconds", type=float, required=True, help="of the whole job, wall clock")
    options = parser.parse_args(arguments)
    run, profile = common.describe_run(options), profiles.load(options.profile)
    use_fast_products()
    a, b = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(options.seed))
    taken = common.time_ways({"product": lambda: a @ b}, options.repeats, run["clock"])["product"]
    rate = 2 * 1024**3 / 1e9 / sorted(taken)[len(taken) // 2]
    gflop = sum(estimates.count_row(row, profile)[0] * row.n_train * row.epochs for row in profile.models)
    needed = gflop / rate / profile.workers
    made = {"products of all trainings": needed, "the whole job": options.seconds}
    facts = {"gflop": round(gflop), "gflop_per_second": round(rate, 1)}
    rows = [
        {"what": f"{profile.name}: {name}", "seconds": round(seconds), "share": round(seconds / options.seconds, 3)}
        for name, seconds in made.items()
    ]
    rows = [row | facts | run for row in rows]
    common.write_table(rows, "job", options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
