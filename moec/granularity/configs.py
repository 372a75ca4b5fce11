"""Sizes of experts from a config: transformers', a config.json, any object with such attributes.

    num_experts | num_local_experts | n_routed_experts | moe_num_experts ...    ->    num_experts

Names differ from family to family; the tables below list them. Where two names of one size are both there and disagree, or none
is, an error says so. What no config tells (Switch routes to one expert) is in a table by `model_type`.

Not handled: Doge's experts, which are single neurons chosen by product keys; experts of zero width (LongCat's) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest

from moec.errors import GranularityError

from .shape import ExpertShape

D_MODEL = ("hidden_size", "d_model", "n_embd", "dim")
NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "n_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
# Rank by rank: a name of its own for the width of an expert says more than that of any feed-forward block.
D_EXPERT = (
    ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "expert_hidden_size"),
    ("intermediate_size", "ffn_hidden_size", "d_ff", "encoder_ffn_dim"),
)
SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SWITCHES = ("is_moe", "enable_moe_block")  # present and false: a dense model of a family that has experts

FIXED_TOP_K = {"switch_transformers": 1, "nllb-moe": 2}
FIXED_SHARED_COUNT = {"llama4_text": 1, "hunyuan_v1_moe": 1}
UNGATED = ("nllb-moe", "nemotron_h", "switch_transformers")

Sizes = Mapping[str, object]


def shapes_in_config(config: object, given: Mapping[str, int]) -> list[ExpertShape]:
    """The shapes in a config and in the configs inside it (text_config and others); empty if none speaks of experts.

    Raises GranularityError for a size that is missing or ambiguous.
    """
    found = []
    for part, inherited in _parts(config, {}):
        found += _shapes(part, {**inherited, **given})
    return found


def _parts(config: object, inherited: dict[str, int]) -> Iterator[tuple[object, dict[str, int]]]:
    """The config and those inside it, each with what the one around it says of it."""
    yield config, inherited
    for name, inner in _entries(config).items():
        if name.startswith("_") or not (name.endswith("_config") or hasattr(inner, "model_type")):
            continue
        # DBRX keeps the experts in a ffn_config, whose own hidden_size is not that of the model
        width = _value(config, D_MODEL) if name == "ffn_config" else None
        yield from _parts(inner, {"d_model": width} if isinstance(width, int) else {})


def _entries(config: object) -> Mapping[str, object]:
    if isinstance(config, Mapping):
        return config
    return vars(config) if hasattr(config, "__dict__") else {}


def _get(config: object, name: str) -> object:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _value(config: object, names: tuple[str, ...]) -> object:
    """The value under the first name that has one. Raises GranularityError where two names disagree."""
    there = {name: value for name in names if (value := _get(config, name)) is not None}
    for name, value in there.items():
        if value != (first := next(iter(there.values()))):
            raise GranularityError(
                f"{_title(config)} is ambiguous: {next(iter(there))}={first} and {name}={value}; give the right one, such as "
                f"moec.granularity_of(config, {_keyword(names)}={value})"
            )
    return next(iter(there.values()), None)


def _keyword(names: tuple[str, ...]) -> str:
    table = {"d_model": D_MODEL, "num_experts": NUM_EXPERTS, "top_k": TOP_K}
    return next((keyword for keyword, known in table.items() if known is names), "d_expert")


def _title(config: object) -> str:
    return "this dict" if isinstance(config, Mapping) else type(config).__name__


def _shapes(config: object, given: Mapping[str, int]) -> list[ExpertShape]:
    """One shape, or one for each entry where sizes are lists (by layer, or by kind of expert)."""
    counts = _listed(given.get("num_experts") or _value(config, NUM_EXPERTS))
    if all(n is None or n == 0 or (n == 1 and "num_experts" not in given) for n in counts):
        return []
    if any(_get(config, name) is False for name in SWITCHES):
        return []
    widths = _listed(given.get("d_expert") or _first(config, D_EXPERT))
    ks = _listed(given.get("top_k") or _top_k(config))
    shared = given["shared"] if "shared" in given else _shared(config, widths[0])
    d_model = given.get("d_model") or _value(config, D_MODEL)
    gated = bool(given.get("gated", _gated(config)))
    found = []
    for n, width, k in _side_by_side(counts, widths, ks):
        sizes = {"d_model": d_model, "d_expert": width, "num_experts": n, "top_k": k}
        if n in (0, 1) and len(counts) > 1:
            continue  # a dense layer among the others
        _complain(config, sizes)
        found.append(ExpertShape(**sizes, shared=shared, gated=gated, d_ff=given.get("d_ff")))  # type: ignore[arg-type]
    return found


def _listed(size: object) -> list[object]:
    return list(size) if isinstance(size, (list, tuple)) else [size]


def _side_by_side(*columns: list[object]) -> Iterator[tuple[object, ...]]:
    """The columns row by row; a column with one entry counts for all rows."""
    for row in zip_longest(*columns):
        yield tuple(column[0] if len(column) == 1 else entry for column, entry in zip(columns, row))


def _first(config: object, ranks: tuple[tuple[str, ...], ...]) -> object:
    return next((value for names in ranks if (value := _value(config, names)) is not None), None)


def _top_k(config: object) -> object:
    fixed = FIXED_TOP_K.get(str(_get(config, "model_type")))
    return fixed if fixed is not None else _first(config, (TOP_K, ("top_k",)))


def _shared(config: object, d_expert: object) -> int:
    """The width of all shared experts together; a width that is given is that of all, but for one beside a count."""
    count = FIXED_SHARED_COUNT.get(str(_get(config, "model_type"))) or _first(config, tuple((n,) for n in SHARED_COUNT))
    width = _first(config, tuple((n,) for n in SHARED_WIDTH))
    count = _listed(count)[0]
    if isinstance(width, int):
        return width * count if isinstance(count, int) else width
    return count * d_expert if isinstance(count, int) and isinstance(d_expert, int) else 0


def _gated(config: object) -> bool:
    gated = _get(config, "is_gated_act")
    return gated if isinstance(gated, bool) else _get(config, "model_type") not in UNGATED


def _complain(config: object, sizes: Mapping[str, object]) -> None:
    looked = {"d_model": D_MODEL, "d_expert": sum(D_EXPERT, ()), "num_experts": NUM_EXPERTS, "top_k": (*TOP_K, "top_k")}
    for keyword, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            got = "" if size is None else f" (found {size!r})"
            raise GranularityError(
                f"{_title(config)} does not tell {keyword}{got}: looked for {', '.join(looked[keyword])}. Give it: "
                f"moec.granularity_of(config, {keyword}=...)"
            )
