"""Expert parallelism: the experts of a model on the ranks of a mesh, tokens sent to them and back.

    moec.parallelize(model, mesh["ep"])
    compiled = torch.compile(model, backend="moec")
    compiled(**batch).loss.backward()
    moec.parallel.sync_gradients(model)
    optimizer.step()

| file | says |
|---|---|
| `entry` | `parallelize`: checks on all ranks, then the change |
| `discovery` | which parameters are experts: the model traced without data |
| `local` | what one rank keeps, and how a graph comes to know what is sharded |
| `graphs` | the step of the backend; the rewriting itself is `moec.passes.exchange` |
| `gradients` | `sync_gradients`: the gradients of one loss, on all ranks |
| `moves` | `rebalance`: another plan between two steps |
| `checkpoint` | `state_dict`, `load_state_dict`: logical names and full shapes |
"""

from __future__ import annotations

from moec.errors import ParallelError

from .checkpoint import load_state_dict, state_dict
from .entry import ParallelReport, parallelize
from .gradients import expert_parameters, sync_gradients
from .moves import Moved, rebalance

__all__ = [
    "Moved",
    "ParallelError",
    "ParallelReport",
    "expert_parameters",
    "load_state_dict",
    "parallelize",
    "rebalance",
    "state_dict",
    "sync_gradients",
]
