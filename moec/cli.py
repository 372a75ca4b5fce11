"""`moec` on the command line: one subcommand per module, loaded when asked for.

    moec plan --flops 1.93e20 --expansion 64 --json
    moec place stats.npz --nodes 4 --gpus 8 --slots 5

A subcommand is a module with `configure(parser)` and `run(args) -> int`. What moec raises on purpose, and what a file or a
library that is not there raises, ends in one line on stderr and status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from moec.errors import MoecError


@dataclass(frozen=True)
class Command:
    name: str
    module: str
    help: str


COMMANDS = (
    Command("plan", "moec.scaling.commands.plan", "the best granularity, width and tokens for a budget"),
    Command("sweep", "moec.scaling.commands.sweep", "train a grid of small decoders on your own text"),
    Command("fit", "moec.scaling.commands.fit", "fit the scaling law to the runs of a sweep"),
    Command("advise", "moec.scaling.commands.advise", "one page: does a finer granularity pay on your data?"),
    Command("place", "moec.placement.command", "which expert lives on which GPU, from routing statistics"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((c for c in COMMANDS if argv and c.name == argv[0]), None)
    parser = argparse.ArgumentParser(
        prog="moec", description="Mixture-of-Experts models, compiled, planned and placed."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        if command is chosen:
            import_module(command.module).configure(sub)
    args = parser.parse_args(argv)
    assert chosen is not None
    try:
        return int(import_module(chosen.module).run(args))
    except BrokenPipeError:  # `moec plan | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except (MoecError, OSError, ImportError) as error:
        print(f"moec {chosen.name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
