"""Options: `torch.compile(model, backend="moec", options={"moec.verify": "sample", ...})`. The environment is read here only.

Keys that do not begin with "moec." go to Inductor untouched; an unknown one of ours or of Inductor's is an error that names the
nearest valid key.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from moec.errors import OptionError

VERIFY = ("off", "sample", "full")


@dataclass(frozen=True)
class Options:
    """moec's own options.

    inner    the backend that compiles the rewritten graph ("inductor", "aot_eager", "eager", any registered name)
    disable  True: leave every site alone; or a comma-separated list of parts of locations ("modeling_mixtral.py:72,block.py")
    strict   a refused site or an internal fault raises instead of being reported
    verify   "off", "sample" (each distinct region once, large ones left out) or "full"
    """

    inner: str = "inductor"
    disable: bool | str = False
    strict: bool = False
    verify: str = "sample"

    def disabled(self, location: str) -> bool:
        """Whether the site at that "file:line" is switched off."""
        if isinstance(self.disable, bool):
            return self.disable
        return any(part.strip() in location for part in self.disable.split(",") if part.strip())


def split(options: Mapping[str, object] | None) -> tuple[Options, dict[str, object]]:
    """(moec's options, those of the inner backend). Raises OptionError for what nobody knows."""
    known = {f.name: f for f in fields(Options)}
    ours: dict[str, object] = {}
    rest: dict[str, object] = {}
    for key, value in (options or {}).items():
        if not key.startswith("moec."):
            rest[key.replace("-", "_")] = value  # as torch.compile does for Inductor
            continue
        name = key.removeprefix("moec.")
        if name not in known:
            near = difflib.get_close_matches(key, [f"moec.{n}" for n in known], n=1, cutoff=0.0)
            raise OptionError(
                f"unknown option {key!r}; the nearest is {near[0]!r}. Valid: {', '.join(f'moec.{n}' for n in known)}"
            )
        ours[name] = value
    if "disable" not in ours and os.environ.get("MOEC_DISABLE"):
        flag = os.environ["MOEC_DISABLE"]
        ours["disable"] = {"1": True, "true": True, "0": False, "false": False}.get(flag.lower(), flag)
    _check(ours)
    return Options(**ours), rest  # type: ignore[arg-type]


def native() -> bool:
    """Whether the kernels that are compiled for this machine may be used: not with MOEC_NATIVE=0."""
    return os.environ.get("MOEC_NATIVE", "1").lower() not in ("0", "false", "off")


def _check(ours: Mapping[str, object]) -> None:
    if ours.get("verify", "off") not in VERIFY:
        raise OptionError(f"moec.verify is one of {', '.join(map(repr, VERIFY))}, not {ours['verify']!r}")
    for key in ("inner",):
        if not isinstance(ours.get(key, ""), str):
            raise OptionError(f"moec.{key} is a string, not {ours[key]!r}")
    if not isinstance(ours.get("strict", False), bool):
        raise OptionError(f"moec.strict is True or False, not {ours['strict']!r}")
    if not isinstance(ours.get("disable", False), (bool, str)):
        raise OptionError(f"moec.disable is True, False or a string of locations, not {ours['disable']!r}")


def check_inner(rest: Mapping[str, object], inner: str) -> None:
    """Raises OptionError for a key that Inductor does not have, naming the nearest of its keys and of ours."""
    if inner != "inductor" or not rest:
        return
    from torch._inductor import config as inductor

    valid = list(inductor._config) if hasattr(inductor, "_config") else list(inductor.get_config_copy())
    ours = [f"moec.{f.name}" for f in fields(Options)]
    for key in rest:
        if key.replace("-", "_") not in valid:
            near = difflib.get_close_matches(key, valid + ours, n=1, cutoff=0.0)
            raise OptionError(f"unknown option {key!r}; the nearest is {near[0]!r}")


def check_mode(mode: str | None) -> None:
    """Raises OptionError for a mode that Inductor does not have."""
    if mode is None or mode == "default":
        return
    from torch._inductor import list_mode_options

    valid = ["default", *list_mode_options()]
    if mode not in valid:
        near = difflib.get_close_matches(mode, valid, n=1, cutoff=0.0)
        raise OptionError(f"unknown mode {mode!r}; the nearest is {near[0]!r}. Valid: {', '.join(valid)}")
