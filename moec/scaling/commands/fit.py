"""`moec fit`: the law from the runs of a sweep, or from anyone's table.

moec fit sweep/rows.csv --out fit.json --plot fit.png
moec plan --tokens 3B --coefficients fit.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict

from moec.scaling.commands.plan import accept_negative_numbers
from moec.scaling.errors import ScalingError
from moec.scaling.fit import PRIOR_C, Estimate, Fit, fit_runs, gain
from moec.scaling.render import table
from moec.scaling.rows import read_runs
from moec.scaling.store import plain, write_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `moec fit`."""
    accept_negative_numbers(parser)
    add_rows(parser)
    parser.add_argument("--expansion", type=float, help="only the runs with this E, where the table has several")
    parser.add_argument("--out", metavar="fit.json", help="for moec plan --coefficients")
    parser.add_argument("--plot", metavar="FILE.png", help="runs and curves (needs moec[scaling])")
    parser.add_argument("--json", action="store_true", help="print what --out writes instead of a table")


def add_rows(parser: argparse.ArgumentParser) -> None:
    """The options that say what to fit, shared with `moec advise`."""
    parser.add_argument("rows", metavar="rows.csv", help="CSV or JSON, one run a line; columns in moec.scaling.rows")
    center, width = PRIOR_C
    parser.add_argument(
        "--prior-c", default=f"{center}:{width}", help=f"center:width of the prior on c, nats ({center}:{width})"
    )
    parser.add_argument("--resamples", type=int, default=400, help="of the bootstrap (400)")


def fit_of(args: argparse.Namespace, expansion: float | None) -> Fit:
    """The fit that the command line asks for. Raises ScalingError for a table or an option that makes no sense."""
    try:
        center, width = (float(x) for x in args.prior_c.split(":"))
    except ValueError:
        raise ScalingError(f"--prior-c {args.prior_c!r} is not center:width; write such as 0.472:0.2") from None
    if args.resamples < 20:
        raise ScalingError(
            f"--resamples {args.resamples} is too few for an interval; give 20 or more, 400 is the default"
        )
    return fit_runs(read_runs(args.rows, expansion), (center, width), args.resamples, source=args.rows)


def run(args: argparse.Namespace) -> int:
    """Prints the fit; returns 0, also where the verdict is "not identifiable"."""
    fit = fit_of(args, args.expansion)
    data = as_json(fit)
    if args.out:
        write_json(args.out, data)
    if args.plot:
        from moec.scaling.plots import plot_fit

        plot_fit(args.plot, fit)
    print(json.dumps(plain(data), indent=2) if args.json else "\n".join(lines(fit)))
    return 0


def gains(fit: Fit) -> dict[float, Estimate]:
    """`gain` from the coarsest G among the runs to each finer one."""
    coarsest, *finer = sorted({r.granularity for r in fit.runs})
    return {g: gain(fit, coarsest, g) for g in finer}


def as_json(fit: Fit) -> dict[str, object]:
    """What --out writes; `moec plan --coefficients` reads "coefficients" and "measured"."""
    law = {k: v for k, v in asdict(fit.coefficients).items() if k != "measured"}
    return {
        "coefficients": law,
        "measured": asdict(fit.coefficients.measured),
        "estimates": {name: _estimate(e) for name, e in fit.estimates.items()},
        "gains": {f"{g:g}": _estimate(e) for g, e in gains(fit).items()},
        "runs": len(fit.runs),
        "noise": fit.noise,
        "seed_noise": fit.seed_noise,
        "prior_c": [fit.prior.c, fit.prior.width],
        "not_identifiable": list(fit.doubts),
    }


def lines(fit: Fit) -> list[str]:
    """The table for people."""
    runs = fit.coefficients.measured
    seeds = "no runs with other seeds" if fit.seed_noise is None else f"{fit.seed_noise:.4f} between seeds"
    rows: list[tuple[str, ...]] = [("", "value", "80 % interval", "")]
    rows += [_row(name, e) for name, e in fit.estimates.items()]
    coarsest = runs.granularity[0]
    rows += [_row(f"gain {coarsest:g}->{g:g}", e) for g, e in gains(fit).items()]
    verdict = [f"- not identifiable: {text}" for text in fit.doubts] or ["- every coefficient is identifiable"]
    return [
        f"moec fit: {len(fit.runs)} runs, E = {fit.coefficients.expansion or 'unknown'}, G {_span(runs.granularity)}, "
        f"N {_span(runs.total_params)}, D {_span(runs.tokens)}",
        f"noise {fit.noise:.4f} nats around the curve, {seeds}",
        "",
        *table(rows),
        "",
        "gain: how many times less compute the finer G needs for equal loss, routing free (moec plan charges it)",
        *verdict,
    ]


def _span(values: tuple[float, float]) -> str:
    return f"{values[0]:.3g}..{values[1]:.3g}"


def _row(name: str, e: Estimate) -> tuple[str, ...]:
    return name, f"{e.value:.4g}", f"{e.low:.4g} .. {e.high:.4g}", "" if e.identifiable else "not identifiable"


def _estimate(e: Estimate) -> Mapping[str, object]:
    return asdict(e) | {"identifiable": e.identifiable}
