"""Is expert j the same as expert 2, but for the weights?

Dynamo names everything it reads from the heap by a `Source`: `L['self'].experts._modules['2'].gate_proj...`. An iteration may be
repeated for another expert if putting '7' for '2' in all these names leads to the same things: modules of the same class with
equal attributes, the same functions, no hooks, parameters alike in shape, dtype, device, and so on. `alike` compares two whole
modules that way, whether the body reads all of them or not; a doubt is a no.

What was guarded for expert 2 is then guarded for expert j, so that a later change of one expert is noticed as always.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,attr-defined,call-overload,index"
from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator

import torch
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._guards import Guard, Source

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type(...), torch.dtype, torch.device, torch.Size)
Field = tuple[str, ...]  # the way from a source down to one of its fields


def differences(a: Source, b: Source, way: Field = ()) -> Iterator[tuple[Field, object, object]]:
    """Where two names differ; a difference of kind is reported as one of the whole."""
    if type(a) is not type(b):
        yield way, a, b
        return
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Source) and isinstance(right, Source):
            yield from differences(left, right, (*way, field.name))
        elif left is not right and (type(left) is not type(right) or left != right):
            yield (*way, field.name), left, right


def prefix(source: Source, way: Field) -> Source:
    """The part of the name that ends with the field at the end of `way` (`experts._modules['2']` of the example above)."""
    for name in way[:-1]:
        source = getattr(source, name)
    return source


def rename(source: Source, names: dict[Source, Source], done: dict[int, Source] | None = None) -> Source:
    """`source` with each of `names`, wherever it stands in the name, replaced; the same object if none is there.

    `done` remembers the parts renamed already, by id: hundreds of names begin alike, and then share their beginnings.
    """
    done = {} if done is None else done
    known = done.get(id(source))
    if known is not None:
        return known
    new = names.get(source, source)
    changed = {}
    for name in _source_fields(type(new)):
        part = getattr(new, name)
        if isinstance(part, Source) and (renamed := rename(part, names, done)) is not part:
            changed[name] = renamed
    done[id(source)] = new = dataclasses.replace(new, **changed) if changed else new
    return new


@functools.cache
def _source_fields(kind: type[Source]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def resolve(tx: InstructionTranslatorBase, source: Source) -> object:
    """The object behind a name; raises if there is none."""
    name = source.name if isinstance(source.name, str) else source.name()
    return eval(name, {"G": tx.output.global_scope, "L": tx.output.local_scope})


def parts(sources: Iterable[Source]) -> Iterator[Source]:
    """The sources and all sources that they are made of, each object once."""
    seen: set[int] = set()
    work = list(sources)
    while work:
        source = work.pop()
        if id(source) in seen:
            continue
        seen.add(id(source))
        yield source
        fields = (getattr(source, name) for name in _source_fields(type(source)))
        work.extend(part for part in fields if isinstance(part, Source))


def repeat_guards(
    tx: InstructionTranslatorBase, guards: list[Guard], names: dict[Source, Source], done: dict[int, Source]
) -> None:
    """Install for the new names (the values of `names`) what `guards` say about the old ones; `done` as in `rename`."""
    for guard in guards:
        source = rename(guard.originating_source, names, done)
        # A tensor's guard holds the tensor itself; it came when the tensor was lifted.
        if source is not guard.originating_source and guard.create_fn_name() != "TENSOR_MATCH":
            tx.output.guards.add(Guard(source, guard.create_fn, user_stack=guard.user_stack, stack=guard.stack))


def mentions_others(guard: Guard) -> bool:
    """Whether the guard compares its object with another named one, and so cannot be renamed."""
    if not isinstance(guard.create_fn, functools.partial):
        return False
    return any(isinstance(part, Source) for part in (*guard.create_fn.args, *guard.create_fn.keywords.values()))


def alike(a: object, b: object, pairs: dict[int, int] | None = None) -> bool:
    """Whether the same Python code does the same with `a` as with `b`, up to the values of their tensors."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    pairs = {} if pairs is None else pairs
    if id(a) in pairs:
        return pairs[id(a)] == id(b)  # shared inside a exactly as inside b
    if isinstance(a, _PLAIN):
        return a == b
    pairs[id(a)] = id(b)
    if isinstance(a, torch.Tensor):
        return _alike_tensors(a, b) and alike(a.__dict__, b.__dict__, pairs)
    if isinstance(a, torch.nn.Module):
        return alike(a.__dict__, b.__dict__, pairs)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key], pairs) for key in a)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(alike(x, y, pairs) for x, y in zip(a, b))
    if type(a) in (set, frozenset):
        return all(isinstance(x, _PLAIN) for x in a) and a == b
    if type(a) is functools.partial:
        return all(alike(getattr(a, part), getattr(b, part), pairs) for part in ("func", "args", "keywords"))
    if type(a) is types.MethodType:
        return a.__func__ is b.__func__ and alike(a.__self__, b.__self__, pairs)
    return False


def _alike_tensors(a: torch.Tensor, b: torch.Tensor) -> bool:
    if type(a) not in (torch.Tensor, torch.nn.Parameter) or a._backward_hooks or b._backward_hooks:
        return False
    return all(
        getattr(a, what) == getattr(b, what)
        for what in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf")
    ) and (a.layout != torch.strided or a.stride() == b.stride())
