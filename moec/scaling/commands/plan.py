"""`moec plan`: the best granularity, width and tokens for what there is.

moec plan --flops 1.93e20 --expansion 64
moec plan --tokens 3B --memory 80GB --json
moec plan --hours 12 --expansion 8 --device measured.json --plot plan.png
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

from moec.scaling import limits, render
from moec.scaling.costs import TRAINING_BYTES, Costs
from moec.scaling.device import Device, Doubling, doublings, measured_granularities, read_device
from moec.scaling.errors import ScalingError, positive
from moec.scaling.law import PUBLISHED, Coefficients, for_expansion, published
from moec.scaling.optimum import GRANULARITIES, Budget, Plan, buildable, plan
from moec.scaling.quantity import BYTES, COUNTS, SECONDS, quantity
from moec.scaling.store import plain, read_coefficients
from moec.scaling.successors import second_opinions


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `moec plan`."""
    accept_negative_numbers(parser)
    add_budget(parser)
    parser.add_argument("--active-params", help="the size wanted, active non-embedding parameters (1B)")
    names = ", ".join(law.name for law in PUBLISHED)
    parser.add_argument("--coefficients", help=f"{names}, or a file of moec fit; default: those of the nearest E")
    parser.add_argument("--max-granularity", type=float, default=max(GRANULARITIES), help="the finest G to consider")
    parser.add_argument("--flops-per-param", type=float, default=6.0, help="c_f, FLOPs per parameter and token (6)")
    parser.add_argument(
        "--routing-cost", type=float, default=14.0, help="c_r, FLOPs per d_model * E * G and token (14)"
    )
    parser.add_argument("--context", type=float, help="tokens in a sequence, to be warned about")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--plot", metavar="FILE.png", help="loss and price against G (needs moec[scaling])")


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The options that say what there is, shared with `moec advise`."""
    parser.add_argument("--flops", help="compute (1.93e20)")
    parser.add_argument("--hours", help="time on the machine of --device (12, or 90min, 3d)")
    parser.add_argument("--tokens", help="how much text there is (3B); alone: the model that is compute-optimal for it")
    parser.add_argument("--memory", help="for parameters and optimizer, in bytes (80GB, 80GiB)")
    help_bytes = (
        f"default {TRAINING_BYTES:g}: weight, gradient and AdamW moments in float32, or mixed with a master weight"
    )
    parser.add_argument("--bytes-per-param", type=float, default=TRAINING_BYTES, help=help_bytes)
    parser.add_argument(
        "--expansion", type=float, default=64.0, help="E, total over active feed-forward parameters (64)"
    )
    parser.add_argument(
        "--device", metavar="measured.json", help="times of MoE layers, from python -m moec.scaling.measure"
    )


def accept_negative_numbers(parser: argparse.ArgumentParser) -> None:
    """-1e20 is a number here, to be refused with a reason; argparse before 3.14 takes it for an option."""
    parser._negative_number_matcher = re.compile(r"^-\d*\.?\d+(e[-+]?\d+)?[a-z]*$", re.IGNORECASE)


def budget_of(args: argparse.Namespace) -> Budget:
    """The budget on the command line. Raises ScalingError for what is no number above zero."""
    hours = None if args.hours is None else args.hours + ("h" if args.hours.strip()[-1:].isdigit() else "")
    return Budget(
        flops=_given(args.flops, COUNTS, "--flops"),
        seconds=_given(hours, SECONDS, "--hours"),
        tokens=_given(args.tokens, COUNTS, "--tokens"),
        memory=_given(args.memory, BYTES, "--memory"),
        active_params=_given(getattr(args, "active_params", None), COUNTS, "--active-params"),
        bytes_per_param=args.bytes_per_param,
    )


def coefficients_of(choice: str | None, expansion: float) -> Coefficients:
    """A published set by name, a file of moec fit, or the published set of the nearest E."""
    if choice is None:
        return for_expansion(positive(expansion, "--expansion"))
    is_file = "/" in choice or choice.endswith(".json") or Path(choice).exists()
    return read_coefficients(choice) if is_file else published(choice)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns 0. Raises ScalingError for input that makes no sense."""
    law = coefficients_of(args.coefficients, args.expansion)
    costs = Costs(args.flops_per_param, args.routing_cost)
    device = read_device(args.device) if args.device else None
    budget = budget_of(args)
    granularities = tuple(g for g in GRANULARITIES if g <= args.max_granularity)
    if not granularities:
        raise ScalingError(f"--max-granularity {args.max_granularity:g} leaves no G; the coarsest is 1")
    found = plan(law, budget, args.expansion, costs, device, granularities)
    built = buildable(law, budget, found, costs, device)
    opinions = second_opinions(found)
    steps = break_even(device, law, found, costs)
    warnings = (
        *limits.doubts(found, law, args.context),
        *(limits.device_doubts(found, device) if device else ()),
        *limits.build_doubts(built),
        *limits.conflicts(found, opinions),
    )
    if args.plot:
        from moec.scaling.plots import plot_plan

        plot_plan(args.plot, law, found, costs)
    if args.json:
        print(
            json.dumps(
                plain(as_json(found, built, law, costs, steps, warnings) | {"opinions": [asdict(o) for o in opinions]}),
                indent=2,
            )
        )
    else:
        print("\n".join(render.plan_lines(found, built, law, costs, opinions, steps, warnings, device)))
    return 0


def break_even(device: Device | None, law: Coefficients, found: Plan, costs: Costs) -> tuple[Doubling, ...]:
    """The rule at the planned width, for every doubling that was measured; nothing without a table."""
    if device is None:
        return ()
    grains = measured_granularities(device, found.expansion)
    return doublings(device, law, found.d_model, found.expansion, costs, grains)


def as_json(
    found: Plan, built: Plan, law: Coefficients, costs: Costs, steps: tuple[Doubling, ...], warnings: tuple[str, ...]
) -> dict[str, object]:
    """What --json prints: the plan at the top; counts are whole numbers where they are whole."""
    whole = {n: int(v) for n in ("granularity", "num_experts", "top_k") if (v := getattr(found, n)) == int(v)}
    top = {k: v for k, v in asdict(found).items() if k != "alternatives"} | whole
    build = {k: v for k, v in asdict(built).items() if k not in ("alternatives", "bound_by")}
    return top | {
        "buildable": build,
        "alternatives": [asdict(a) for a in found.alternatives],
        "break_even": [asdict(s) | {"pays": s.pays} for s in steps],
        "coefficients": {k: v for k, v in asdict(law).items() if k != "measured"},
        "costs": asdict(costs),
        "warnings": list(warnings),
    }


def _given(text: str | None, units: dict[str, float], what: str) -> float | None:
    return None if text is None else quantity(text, units, what)
