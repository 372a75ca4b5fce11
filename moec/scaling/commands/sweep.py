"""`moec sweep`: a grid of small decoders on your own text, one row a run. Say the same again after a kill, and it goes on.

moec sweep --out sweep                                        # the "small" grid on Python's own sources
moec sweep --text ~/corpus --shape 64x2 128x4 --granularity 1 2 4 8 --tokens 2M 8M --seeds 2 --out mine
moec fit mine/rows.csv
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from moec.scaling.commands.plan import accept_negative_numbers
from moec.scaling.errors import ScalingError
from moec.scaling.quantity import COUNTS, quantity
from moec.scaling.render import count
from moec.scaling.sweep.grid import GRIDS, Grid, all_branches, check, flops_per_step, steps_of, trunks


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `moec sweep`."""
    accept_negative_numbers(parser)
    parser.add_argument(
        "--text", nargs="+", default=[], help="files or folders; default: sources of the standard library"
    )
    parser.add_argument("--out", default="sweep", metavar="DIR", help="where rows.csv and all else goes (sweep)")
    parser.add_argument(
        "--grid", choices=list(GRIDS), default="small", help="what the options below start from (small)"
    )
    parser.add_argument(
        "--shape", nargs="+", dest="shapes", metavar="DxN", help="d_model x n_blocks, such as 64x2 96x3"
    )
    parser.add_argument("--granularity", nargs="+", type=int, dest="granularities", help="G, such as 1 2 4")
    parser.add_argument("--tokens", nargs="+", help="D of the decay branches, such as 1M 4M")
    parser.add_argument("--seeds", type=int, help="runs that differ in nothing else")
    parser.add_argument("--expansion", type=int, help="E")
    parser.add_argument("--batch", type=int, help="sequences in a step")
    parser.add_argument("--context", type=int, help="bytes in a sequence")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--warmup", type=int, help="steps")
    parser.add_argument("--decay", type=float, help="share of a run's steps")
    parser.add_argument("--router", help="a name in moec.nn.ROUTERS")
    parser.add_argument("--balance-loss", type=float, help="coefficient, for routers that choose experts")
    parser.add_argument("--z-loss", type=float, help="coefficient")
    parser.add_argument("--backend", help="moec, inductor or eager")
    parser.add_argument("--validation", type=int, help="bytes that the loss is a mean over")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, help="of torch; default: what torch takes")
    parser.add_argument("--torch-device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and stop")


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0. Raises ScalingError for a grid, a text or a folder that cannot be used."""
    grid = grid_of(args)
    check(grid)
    if args.dry_run:
        print("\n".join(plan_lines(grid)))
        return 0
    import torch

    from moec.scaling.sweep.runner import sweep
    from moec.scaling.sweep.text import read_text

    if args.threads is not None:
        if args.threads < 1:
            raise ScalingError(f"--threads is {args.threads}; give a whole number of at least 1")
        torch.set_num_threads(args.threads)
    folder = Path(args.out)
    text = read_text(args.text)
    rows = sweep(grid, text, folder, device=args.torch_device, bars=not args.quiet)
    print(
        f"{rows} runs in {folder / 'rows.csv'}, their times in {folder / 'timing.csv'}; next: moec fit {folder / 'rows.csv'}"
    )
    return 0


def grid_of(args: argparse.Namespace) -> Grid:
    """The grid that --grid names, with what else was said. Raises ScalingError for values that are no numbers."""
    given: dict[str, object] = {}
    for field in fields(Grid):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    if args.shapes:
        given["shapes"] = tuple(_shape(text) for text in args.shapes)
    if args.tokens:
        given["tokens"] = tuple(int(quantity(text, COUNTS, "--tokens")) for text in args.tokens)
    return replace(GRIDS[args.grid], **given)  # type: ignore[arg-type]


def plan_lines(grid: Grid) -> list[str]:
    """What would be trained."""
    flops = sum(steps_of(grid, t) * flops_per_step(grid, t) for t in trunks(grid))
    tokens = sum(steps_of(grid, t) for t in trunks(grid)) * grid.batch * grid.context
    names = [b.name for b in all_branches(grid)]
    return [
        f"{len(names)} runs on {len(trunks(grid))} trunks, {count(tokens)} tokens, {flops:.2e} FLOPs by the law",
        *names,
    ]


def _shape(text: str) -> tuple[int, int]:
    d, cross, n = text.partition("x")
    if not (cross and d.isdigit() and n.isdigit()):
        raise ScalingError(f"--shape {text!r} is not DxN; write d_model x n_blocks such as 64x2")
    return int(d), int(n)
