"""torch's compile caches stay on and stay right: warm for the same moec, never stale for another one.

Processes share one fresh cache directory. What is edited is a copy of the package, first on PYTHONPATH.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

CHILD = """
import json, sys
import torch
from torch._dynamo.utils import counters
import moec
from moec.models import IDIOMS

torch.manual_seed(0)
layer = IDIOMS["static_where"](8, 8, 4, 2).double()
x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
options = json.loads(sys.argv[1])
out = torch.compile(layer, backend="moec", options=options)(x)
out.square().sum().backward()
from moec.report import last_sites
grads = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
print(json.dumps({
    "moec": moec.__file__,
    "sites": [s.status for s in last_sites()],
    "out": out.tolist(),
    "grads": {name: g.tolist() for name, g in grads.items()},
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
}))
"""


def child(
    cache: Path, package: Path | None = None, sites: tuple[str, ...] = ("rewritten",), **options: object
) -> dict[str, object]:
    environment = dict(os.environ)
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package or ROOT)}
    command = [sys.executable, "-c", CHILD, json.dumps({"moec.strict": True, **options})]
    done = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["moec"]).parents[1] == (package or ROOT)
    assert result["sites"] == list(sites)
    return result


def same(a: dict[str, object], b: dict[str, object], name: str, factor: float = 1.0) -> bool:
    left, right = (torch.tensor(r["grads"][name], dtype=torch.float64) for r in (a, b))
    return torch.allclose(left * factor, right, rtol=1e-10, atol=1e-12)


def edited(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of moec in which one formula differs."""
    shutil.copytree(ROOT / "moec", folder / "moec", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "moec" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} does not hold {old!r} once: this test has to follow it"
    path.write_text(text.replace(old, new))
    return folder


@pytest.mark.slow
def test_warm_and_right(tmp_path: Path) -> None:
    """The same twice: the second is served from the cache. Then a backward formula changes: it is not."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cold = child(cache)
    assert cold["hits"] == 0
    assert cold["bypasses"] == 0
    assert cold["misses"] >= 1
    warm = child(cache)
    assert (warm["hits"], warm["misses"]) == (cold["misses"], 0)
    assert (warm["out"], warm["grads"]) == (cold["out"], cold["grads"])

    package = edited(
        tmp_path / "edited",
        "ops/autograd.py",
        "grads[1] = _spread(moec.grouped_outer(left, right, offsets, experts, ctx.weight_dtype), needs_weights)",
        "grads[1] = _spread(moec.grouped_outer(3 * left, right, offsets, experts, ctx.weight_dtype), needs_weights)",
    )
    changed = child(cache, package, **{"moec.verify": "off"})  # verification would refuse the site
    assert changed["hits"] == 0
    assert same(cold, changed, "router.weight")
    for e in range(4):
        assert same(cold, changed, f"experts.{e}.down_proj.weight", 3), "the gradient follows the formula"
        assert same(cold, changed, f"experts.{e}.up_proj.weight", 3)

    off = child(cache, sites=(), **{"moec.disable": True, "moec.strict": False})
    assert off["hits"] == 0
    for name in cold["grads"]:
        assert same(cold, off, name), f"switched off, in the same cache directory: {name}"


def test_the_key_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compiler.config.cache_key_tag` set by the user takes part, and is the same again afterwards."""
    import torch._inductor.compile_fx as module

    from moec.backend import compile_inner
    from moec.config import Options

    seen: list[str] = []

    def spy(gm: object, example_inputs: object, **kwargs: object) -> object:
        seen.append(torch.compiler.config.cache_key_tag)
        return gm

    monkeypatch.setattr(module, "compile_fx", spy)
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    for tag in ("", "theirs"):
        with torch.compiler.config.patch(cache_key_tag=tag):
            compile_inner(gm, [], Options(), None, {})
            compile_inner(gm, [], Options(), None, {})
            assert torch.compiler.config.cache_key_tag == tag
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0] != seen[2]
