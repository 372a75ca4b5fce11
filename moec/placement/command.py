"""`moec place stats.npz --nodes 4 --gpus 8 --slots 5`: a plan from statistics, and what to expect of it beside EPLB's."""

from __future__ import annotations

import argparse
import json

from .baselines import eplb
from .cluster import PRESETS, Topology, topology
from .errors import PlacementError
from .picture import heat_map
from .plan import Plan
from .solver import solve
from .stats import RoutingStats


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this subcommand."""
    parser.add_argument("stats", help="routing statistics, written by RoutingStats.save")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the cluster (default 1)")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of each node")
    parser.add_argument("--slots", type=int, required=True, help="experts that each GPU has room for")
    parser.add_argument(
        "--topology", choices=sorted(PRESETS), default="h100", help="links of the cluster (default h100)"
    )
    parser.add_argument(
        "--traffic", type=float, default=0.5, help="weight of traffic against balance, 0..1 (default 0.5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the solver's restarts (default 0)")
    parser.add_argument("--current", metavar="PLAN", help="the plan in force: as little as possible moves from it")
    parser.add_argument(
        "--bytes-per-expert", type=int, default=0, help="with --current: weights of one expert, to count what moves"
    )
    parser.add_argument("--out", metavar="PLAN", help="write the plan here, .npz or .json")
    parser.add_argument(
        "--picture", metavar="PNG", help="draw the expected load of every GPU and layer (needs matplotlib)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Solves, writes and prints. Raises PlacementError and OSError, which the command line turns into one line."""
    stats = RoutingStats.load(args.stats)
    cluster = topology(args.topology, nodes=args.nodes, gpus_per_node=args.gpus)
    sizes = {"num_experts": stats.num_experts, "num_layers": stats.num_layers}
    current = Plan.load(args.current, **sizes) if args.current else None
    plan = solve(stats, cluster, args.slots, current=current, seed=args.seed, traffic=args.traffic)
    if args.out:
        plan.save(args.out)
    if args.picture:
        heat_map(plan, stats, args.picture)
    rows = {plan.method: _figures(plan)}
    try:
        rows["eplb"] = _figures(eplb(stats, cluster, args.slots))
    except PlacementError:
        pass  # sizes that EPLB does not take; there is nothing to compare with
    moves = current.diff(plan, args.bytes_per_expert) if current else None
    summary = {
        "experts": stats.num_experts,
        "layers": stats.num_layers,
        "gpus": cluster.num_gpus,
        "slots_per_gpu": args.slots,
        "note": plan.note,
        "plans": rows,
        "moves": None if moves is None else {"intra": moves.intra, "inter": moves.inter, "bytes": moves.bytes},
        "out": args.out,
    }
    print(json.dumps(summary, indent=2) if args.json else _text(summary, cluster))
    return 0


def _figures(plan: Plan) -> dict[str, float]:
    predicted = plan.predicted
    assert predicted is not None
    return {
        "imbalance": float(predicted.imbalance.mean()),
        "worst_layer": float(predicted.imbalance.max()),
        "bound": float(predicted.bound.mean()),
        "gap": float(predicted.gap.max()),
        "pairs_on_one_node": float(predicted.kept.mean()),
    }


def _text(summary: dict[str, object], cluster: Topology) -> str:
    lines = [
        f"{summary['layers']} layers x {summary['experts']} experts on {cluster.num_nodes} nodes, {cluster.num_gpus} GPUs x "
        f"{summary['slots_per_gpu']} slots",
        "",
        f"{'expected, on these statistics':<32}{'imbalance':>10}{'worst':>8}{'bound':>8}{'pairs kept on a node':>23}",
    ]
    plans = summary["plans"]
    assert isinstance(plans, dict)
    for name, row in plans.items():
        lines.append(
            f"{name:<32}{row['imbalance']:>10.4f}{row['worst_layer']:>8.4f}{row['bound']:>8.4f}{row['pairs_on_one_node']:>22.1%}"
        )
    if summary["note"]:
        lines.append(f"note: {summary['note']}")
    if isinstance(moves := summary["moves"], dict):
        lines.append(
            f"moves: {moves['intra']} slots inside nodes, {moves['inter']} between nodes, {moves['bytes']} bytes"
        )
    if summary["out"]:
        lines.append(f"written to {summary['out']}")
    return "\n".join(lines)
