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
| `gradients` | `sync_gradients`: what is replicated gets equal gradients |
"""

from __future__ import annotations

from moec.errors import ParallelError

from .entry import ParallelReport, parallelize

__all__ = ["ParallelError", "ParallelReport", "parallelize"]
