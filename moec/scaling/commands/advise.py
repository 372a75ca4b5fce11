"""`moec advise`: one page, from the runs of a sweep, a budget and a measured table: go, no-go or measure more.

moec advise sweep/rows.csv --tokens 3B --device measured.json --out advice
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moec.scaling.advise import advise
from moec.scaling.commands.fit import add_rows, fit_of
from moec.scaling.commands.plan import accept_negative_numbers, add_budget, budget_of
from moec.scaling.costs import Costs
from moec.scaling.device import read_device
from moec.scaling.errors import ScalingError
from moec.scaling.page import page
from moec.scaling.store import write_atomic


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `moec advise`."""
    accept_negative_numbers(parser)
    add_rows(parser)
    add_budget(parser)
    parser.set_defaults(expansion=None)
    parser.add_argument("--routing-cost", type=float, default=14.0, help="c_r, where no machine was measured (14)")
    parser.add_argument("--out", default="advice", metavar="DIR", help="where advice.md and advice.png go (advice)")
    parser.add_argument("--no-plot", action="store_true", help="text only, without matplotlib")


def run(args: argparse.Namespace) -> int:
    """Writes and prints the page; returns 0 whatever it advises."""
    device = read_device(args.device) if args.device else None
    budget = budget_of(args)
    fit = fit_of(args, args.expansion)
    expansion = args.expansion or fit.coefficients.expansion
    if not expansion:
        raise ScalingError(f"{args.rows} does not say its expansion; add that column or give --expansion")
    advice = advise(fit, budget, expansion, Costs(routing=args.routing_cost), device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    picture = "" if args.no_plot else "advice.png"
    if picture:
        from moec.scaling.plots import plot_advice

        plot_advice(str(out / picture), advice)
    text = page(advice, device, picture)
    write_atomic(out / "advice.md", text.encode())
    print(text, end="")
    return 0
