"""spelling: the many names and argument orders of one operation, and which operations return views, copies or random numbers.

`canonical_name(node)` gives the functional name that `normalise` and the facts know an operation by; `SIGNATURES` the order of
its arguments. A name that is not here keeps itself, and means what torch says it means.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import fx

# name -> argument names, for the operations whose arguments detection reads. A default of ... means "required".
SIGNATURES: dict[str, tuple[tuple[str, object], ...]] = {
    "transpose": (("x", ...), ("dim0", ...), ("dim1", ...)),
    "unsqueeze": (("x", ...), ("dim", ...)),
    "squeeze": (("x", ...), ("dim", None)),
    "select": (("x", ...), ("dim", ...), ("index", ...)),
    "index_select": (("x", ...), ("dim", ...), ("index", ...)),
    "gather": (("x", ...), ("dim", ...), ("index", ...), ("sparse_grad", False)),
    "narrow": (("x", ...), ("dim", ...), ("start", ...), ("length", ...)),
    "slice": (("x", ...), ("dim", 0), ("start", None), ("end", None), ("step", 1)),
    "chunk": (("x", ...), ("chunks", ...), ("dim", 0)),
    "split": (("x", ...), ("split_size", ...), ("dim", 0)),
    "unbind": (("x", ...), ("dim", 0)),
    "sum": (("x", ...), ("dim", None), ("keepdim", False), ("dtype", None)),
    "mean": (("x", ...), ("dim", None), ("keepdim", False), ("dtype", None)),
    "norm": (("x", ...), ("p", "fro"), ("dim", None), ("keepdim", False), ("dtype", None)),
    "linalg_vector_norm": (("x", ...), ("ord", 2), ("dim", None), ("keepdim", False), ("dtype", None)),
    "vector_norm": (("x", ...), ("ord", 2), ("dim", None), ("keepdim", False), ("dtype", None)),
    "normalize": (("x", ...), ("p", 2.0), ("dim", 1), ("eps", 1e-12)),
    "any": (("x", ...), ("dim", None), ("keepdim", False)),
    "amax": (("x", ...), ("dim", None), ("keepdim", False)),
    "cumsum": (("x", ...), ("dim", ...), ("dtype", None)),
    "one_hot": (("x", ...), ("num_classes", -1)),
    "nonzero": (("x", ...), ("as_tuple", False)),
    "argsort": (("x", ...), ("dim", -1), ("descending", False), ("stable", False)),
    "sort": (("x", ...), ("dim", -1), ("descending", False), ("stable", False)),
    "topk": (("x", ...), ("k", ...), ("dim", -1), ("largest", True), ("sorted", True)),
    "bincount": (("x", ...), ("weights", None), ("minlength", 0)),
    "histc": (("x", ...), ("bins", 100), ("min", 0), ("max", 0)),
    "index_add": (("x", ...), ("dim", ...), ("index", ...), ("source", ...), ("alpha", 1)),
    "index_put": (("x", ...), ("indices", ...), ("values", ...), ("accumulate", False)),
    "scatter": (("x", ...), ("dim", ...), ("index", ...), ("src", ...)),
    "scatter_add": (("x", ...), ("dim", ...), ("index", ...), ("src", ...)),
    "masked_fill": (("x", ...), ("mask", ...), ("value", ...)),
    "clamp": (("x", ...), ("min", None), ("max", None)),
    "cat": (("tensors", ...), ("dim", 0)),
    "stack": (("tensors", ...), ("dim", 0)),
    "baddbmm": (("bias", ...), ("x", ...), ("y", ...), ("beta", 1), ("alpha", 1)),
    "linear": (("x", ...), ("weight", ...), ("bias", None)),
    "matmul": (("x", ...), ("y", ...)),
    "bmm": (("x", ...), ("y", ...)),
    "addmm": (("bias", ...), ("x", ...), ("y", ...), ("beta", 1), ("alpha", 1)),
    "grouped_mm": (("x", ...), ("y", ...), ("offs", None), ("bias", None), ("out_dtype", None)),
    "repeat_interleave": (("x", ...), ("repeats", ...), ("dim", None), ("output_size", None)),
    "floor_divide": (("x", ...), ("y", ...)),
    "sym_size": (("x", ...), ("dim", ...)),
    "add": (("x", ...), ("y", ...), ("alpha", 1)),
    "sub": (("x", ...), ("y", ...), ("alpha", 1)),
    "mul": (("x", ...), ("y", ...)),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), (("x", ...), ("y", ...))),
}

# other spellings of the names above (after a trailing underscore has been taken off)
ALIASES = {
    "view": "reshape", "flatten": "reshape", "unflatten": "reshape", "view_as": "reshape",
    "_unsafe_view": "reshape", "reshape_as": "reshape", "ravel": "reshape", "swapaxes": "transpose",
    "swapdims": "transpose", "concat": "cat", "concatenate": "cat", "split_with_sizes": "split", "clip": "clamp",
    "mm": "matmul", "__matmul__": "matmul", "_grouped_mm": "grouped_mm", "grouped_mm_fallback": "grouped_mm",
    "index.Tensor": "index", "floordiv": "floor_divide", "truediv": "div", "multiply": "mul", "divide": "div",
    "true_divide": "div", "subtract": "sub", "greater": "gt", "greater_equal": "ge", "less": "lt",
    "less_equal": "le", "not_equal": "ne", "and_": "bitwise_and", "or_": "bitwise_or", "inv": "bitwise_not",
    "invert": "bitwise_not", "imul": "mul", "new_zeros": "zeros", "zeros_like": "zeros", "new_empty": "empty",
    "empty_like": "empty", "ones_like": "ones", "new_ones": "ones", "nonzero_numpy": "nonzero_tuple",
    "matrix_transpose": "mT", "__rmul__": "mul", "__radd__": "add",
}  # fmt: skip
INPLACE_OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floor_divide",
    "iand": "bitwise_and",
    "ior": "bitwise_or",
    "ipow": "pow",
}
FOREIGN = {"transformers::grouped_mm_fallback": "grouped_mm"}
CASTS = {
    "to", "type", "float", "double", "half", "bfloat16", "long", "int", "bool", "type_as", "_to_copy",
    "convert_element_type", "char", "short",
}  # fmt: skip
IDENTITIES = {"contiguous", "clone", "alias", "lift_fresh_copy", "__copy__"}
FRESH = {
    "empty", "empty_permuted", "empty_strided", "rand", "randn", "rand_like", "randn_like", "bernoulli", "uniform",
    "normal", "randint", "randperm", "multinomial", "exponential", "rrelu",
}  # fmt: skip
# What can return its input, or a view of it, beyond what the schemas of ATen say; and what ATen does not know and never does
VIEWS = {
    "reshape", "transpose", "permute", "t", "T", "mT", "unsqueeze", "squeeze", "expand", "expand_as", "select",
    "narrow", "slice", "chunk", "split", "unbind", "getitem", "item_of", "detach", "alias", "contiguous", "movedim",
    "diagonal", "as_strided", "data", "_get_data_attr", "real", "imag", "H", "mH", "tensor_split", "view",
    "dropout", *CASTS,
}  # fmt: skip
ALWAYS_NEW = {
    "grouped_mm", "linear", "matmul", "zeros", "ones", "one_hot", "index", "nonzero_tuple", "floor_divide",
    "scalar_tensor", "not",
}  # fmt: skip
# argument positions that are written although the name does not say so
HIDDEN_WRITES = {
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
    "native_batch_norm": (3, 4),
    "embedding": (1,),
    "embedding_bag": (1,),
}
SYNONYMS = {  # keyword names of other spellings -> ours
    "other": "y",
    "mat2": "y",
    "mat_b": "y",
    "batch2": "y",
    "weight": "y",
    "divisor": "y",
    "mat1": "x",
    "mat_a": "x",
    "value": "src",
    "axis": "dim",
    "split_sizes": "split_size",
    "split_size_or_sections": "split_size",
    "tensor": "source",
}


def canonical_name(node: fx.Node) -> tuple[str, bool, bool]:
    """(name, writes its first argument, is torch's own). The name is that of the functional form."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
    elif isinstance(target, torch._ops.OpOverload):
        space, name = target._schema.name.split("::")
        if target._schema.is_mutable and not name.endswith("_"):
            return str(target), False, False
        if space not in ("aten", "prims"):  # somebody's own `lib::gelu` is not torch's gelu
            name = target._schema.name if target._schema.name not in FOREIGN else FOREIGN[target._schema.name]
        if name == "_to_copy":
            name = "to"
        if name == "where" and len(node.args) > 1:
            return "where", False, True
    elif getattr(target, "__module__", None) in ("_operator", "operator"):
        name = getattr(target, "__name__", "")
    elif target is getattr:
        return str(node.args[1]), False, str(node.args[1]) in ("T", "mT", "data")
    elif isinstance(target, torch._ops.OpOverloadPacket):
        space, name = target._qualified_op_name.split("::")
        if space not in ("aten", "prims"):
            full = target._qualified_op_name
            if full not in FOREIGN:
                return full, False, False
            name = FOREIGN[full]
    elif _is_torch(target):
        name = getattr(target, "__name__", str(target))
    else:
        return str(target), False, False
    if name in INPLACE_OPERATORS:
        return INPLACE_OPERATORS[name], True, True
    if name.startswith("__i") and name.endswith("__") and name[2:-2] in INPLACE_OPERATORS:
        return INPLACE_OPERATORS[name[2:-2]], True, True
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2] if name not in ALIASES else name
    writes = name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_")
    if writes:
        name = name[:-1]
    return ALIASES.get(name, name), writes, True


def may_alias(node: fx.Node, name: str) -> bool:
    """Whether the result may be the first argument or a view of it. What is not known to be new memory may."""
    if name in VIEWS or name in IDENTITIES and name != "clone":
        return True
    if name in ALWAYS_NEW or name == "clone":
        return False
    target = node.target
    schemas = [target._schema] if isinstance(target, torch._ops.OpOverload) else _schemas(name)
    return not schemas or any(
        r.alias_info is not None and not r.alias_info.is_write for s in schemas for r in s.returns
    )


@functools.cache
def _schemas(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    return [getattr(packet, o)._schema for o in packet.overloads()] if packet is not None else []


def asks_in_place(node: fx.Node) -> bool:
    """Whether an argument `inplace`, by name or by position, is true: F.leaky_relu(x, 0.1, True)."""
    if node.op != "call_function" or not isinstance(node.target, types.FunctionType):
        return bool(node.kwargs.get("inplace", False))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace", False))
    return bool(bound.arguments.get("inplace", False))


def hidden_writes(node: fx.Node, name: str) -> list[fx.Node]:
    """Arguments that the call may write besides its first: running statistics, renormalised embeddings, lists of tensors."""
    if name.startswith("_foreach") and str(getattr(node.target, "__name__", "")).endswith("_"):
        return list(node.all_input_nodes)
    found = [node.args[i] for i in HIDDEN_WRITES.get(name, ()) if i < len(node.args)]
    found += [
        node.kwargs[k] for k in ("running_mean", "running_var", "weight") if name in HIDDEN_WRITES and k in node.kwargs
    ]
    if name in ("embedding", "embedding_bag"):
        renormalises = node.kwargs.get("max_norm", node.args[3] if len(node.args) > 3 else None) is not None
        return [a for a in found if isinstance(a, fx.Node)] if renormalises else []
    return [a for a in found if isinstance(a, fx.Node)]


@functools.cache
def is_random(name: str) -> bool:
    """Whether torch tags the operation as drawing random numbers."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if packet is None:
        return False
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, o).tags for o in packet.overloads())


def _is_torch(target: object) -> bool:
    module = getattr(target, "__module__", None) or ""
    if module.startswith("torch") or type(target).__name__ in ("builtin_function_or_method", "method_descriptor"):
        return not module.startswith("torch.utils.checkpoint") and "higher_order" not in module
    return False


def is_pure_helper(target: object) -> bool:
    if "mutation" in str(target):
        return False
    return type(target).__module__.startswith("torch._higher_order_ops") or getattr(
        target, "__module__", ""
    ).startswith("moec.")
