"""Finds the MoE families in transformers' sources, and builds one of them small, with random weights (`families.py` says how)."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

from tests import hf

from .families import BATCH, COMMON, FAMILIES, SEQ, E


def root() -> Path:
    return Path(transformers.__file__).parent / "models"


@functools.cache
def scan() -> dict[str, bool]:
    """Folder -> whether its experts are decorated, for every folder whose modeling file names experts in code (not in prose)."""
    found = {}
    for path in sorted(root().glob("*/modeling_*.py")):
        source = path.read_text()
        if "expert" not in source.lower():
            continue
        tree = ast.parse(source)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if any("expert" in name.lower() for name in names):
            found[path.parent.name] = "use_experts_implementation" in names
    return found


def decorated(name: str) -> bool:
    """Whether the experts may also run as `grouped_mm`."""
    return "@use_experts_implementation" in _source(folder(name)).read_text()


def _source(folder: str) -> Path:
    return root() / folder / f"modeling_{folder}.py"


def folder(name: str) -> str:
    """`qwen3_omni_moe:talker` is a second architecture of the folder `qwen3_omni_moe`."""
    return name.partition(":")[0]


def modeling(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{folder(name)}.modeling_{folder(name)}")


# the first pattern that a class of the folder matches names the model; of several the shortest name
_MODELS = (r"ForCausalLM$", r"TextModel$", r"ForConditionalGeneration$", r"ForTokenClassification$", r"Model$")


def model_class(name: str) -> type[nn.Module]:
    module, family = modeling(name), FAMILIES[name]
    if family.model:
        return getattr(module, family.model)
    classes = [
        c
        for n, c in vars(module).items()
        if inspect.isclass(c)
        and c.__module__ == module.__name__
        and hasattr(c, "_from_config")
        and "PreTrained" not in n
    ]
    for pattern in _MODELS:
        fitting = [c for c in classes if re.search(pattern, c.__name__)]
        if fitting:
            return min(fitting, key=lambda c: len(c.__name__))
    raise LookupError(f"{name}: no model class among {', '.join(c.__name__ for c in classes)}")


def shrink(config_class: type, changes: Mapping[str, object]) -> transformers.PreTrainedConfig:
    """A small config: COMMON where the class has the field, no dropout and no noise in the router, then `changes`."""
    fields = _fields(config_class)
    values = {k: v for k, v in COMMON.items() if k in fields}
    values |= {
        k: 0.0 for k in fields if re.search(r"dropout|drop_rate|layerdrop|jitter", k) and isinstance(fields[k], float)
    }
    return config_class(**{**values, **changes})


def _fields(config_class: type) -> dict[str, object]:
    """Field -> default."""
    return {
        k: getattr(config_class, k, None)
        for c in reversed(config_class.__mro__)
        for k in getattr(c, "__annotations__", {})
    }


def model(name: str, implementation: str = "eager", seed: int = 0) -> nn.Module:
    """In training mode, float32; nothing in it draws random numbers."""
    cls, family = model_class(name), FAMILIES[name]
    if hasattr(cls, "_from_config"):
        config = shrink(cls.config_class, family.config)
        made = cls._from_config(config, attn_implementation="eager", experts_implementation=implementation)
    else:
        made = cls(shrink(cls.__init__.__annotations__["config"], family.config))
    hf._randomize(made, seed)
    for key, buffer in made.named_buffers():
        if key.endswith("tid2eid"):  # DeepSeek V4's table from token ids to experts, all zeros in a new model
            buffer.copy_(torch.randint(E, buffer.shape, generator=torch.Generator().manual_seed(seed)))
    return made.float().train()


def example_inputs(name: str, model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[name].inputs:
        return {FAMILIES[name].inputs: torch.randn(BATCH, SEQ, COMMON["hidden_size"], generator=generator)}
    config = model.config

    def ids() -> Tensor:
        return torch.randint(3, config.vocab_size, (BATCH, SEQ), generator=generator)

    if config.is_encoder_decoder:
        # switch_transformers makes a mask of its own in eager only, and fails under torch.compile without one
        ones = torch.ones(BATCH, SEQ, dtype=torch.long)
        return {"input_ids": ids(), "decoder_input_ids": ids(), "attention_mask": ones, "decoder_attention_mask": ones}
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(BATCH, config.num_channels, *config.image_size, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.arange(BATCH) % config.num_experts}
    if FAMILIES[name].flags:
        return {"input_ids": ids(), FAMILIES[name].flags: ids() % 2}
    return {"input_ids": ids()}


def dispatchers(name: str, model: nn.Module) -> dict[str, nn.Module]:
    found = model.named_modules()
    return {n: m for n, m in found if re.search(FAMILIES[name].dispatch, f"{n} {type(m).__name__}")}
