"""LoRA through peft: adapters beside frozen linear layers, `y = W x + alpha / rank * B A dropout(x)` (Hu et al., 2021).

peft puts a layer around each target, and with it words into the names of the weights:

    language_model.model.layers.0.self_attn.q_proj.weight                     before
    language_model.model.layers.0.self_attn.q_proj.base_layer.weight          the same weight, frozen
    language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight      f[rank, inputs], uniform as peft's
    language_model.model.layers.0.self_attn.q_proj.lora_B.default.weight      f[outputs, rank], zeros at first

peft imports transformers, so it is imported only where a recipe asks for LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_train.model.dropout import Draws, Dropout, Rows
from nvlm_train.model.recompute import Recompute
from nvlm_train.recipe import schema

_ROWS: dict[str, Rows] = {
    "vision": "patches", "projector": "image_tokens", "cross_attention": "readers", "language_model": "tokens",
}  # fmt: skip


def attribute_of(module: str) -> str:
    """What the model calls a module of the recipe."""
    return {"vision": "vision_model"}.get(module, module)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_trained(name: str, mode: str) -> bool:
    """Whether a parameter of a module in this mode is trained: all of them in full, the adapters alone in lora."""
    return mode == "full" or (mode == "lora" and is_adapter(name))


def base_name(name: str) -> str:
    """The name that a weight has in the model without LoRA, in folders and in exports."""
    return name.replace(".base_layer.", ".")


def adapter_names(base: str) -> tuple[str, str]:
    """The names of A and B beside the weight `base`: "x.q_proj.weight" -> ("x.q_proj.lora_A.default.weight", ...)."""
    layer = base.removesuffix(".weight")
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def targets(
    model: nn.Module, config: schema.Model, module: str, options: schema.Lora
) -> Iterator[tuple[str, nn.Linear]]:
    """Name inside the module, and layer, of every target. Raises ValueError for one that is no plain linear layer."""
    wanted = options.targets or schema.lora_targets(config, module)
    for name, layer in getattr(model, attribute_of(module)).named_modules():
        if name.rsplit(".", 1)[-1] in wanted:
            if type(layer) is not nn.Linear:
                raise ValueError(f"{attribute_of(module)}.{name} is a {type(layer).__name__}; LoRA goes beside Linear")
            yield name, layer


def add_adapters(model: nn.Module, config: schema.Model, train: schema.Train) -> Draws | None:
    """Puts adapters beside the targets of every module that `train` sets to lora; their values come from `fill`.

    Built inside the context that partitions parameters at birth, adapters are partitioned like all others.
    Returns what the dropouts need to be told (`Draws.start_step`), or None where there is no dropout.
    """
    modules = [module for module, mode in train.modes.items() if mode == "lora"]
    if not modules:
        return None
    from peft import LoraConfig, inject_adapter_in_model

    draws = Draws((config.vision.image_size // config.vision.patch_size // 2) ** 2)
    drops = False
    for module in modules:
        options: schema.Lora = getattr(train.lora, module)
        names = [name for name, _ in targets(model, config, module, options)]
        # a bare module around it, because peft reads a `config` where there is one and takes it for its own
        around = nn.Module()
        inner: nn.Module = getattr(model, attribute_of(module))
        around.inner = inner
        settings = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            target_modules=[f"inner.{name}" for name in names],
            init_lora_weights=False,  # values come from `fill`, as those of all other weights
        )
        inject_adapter_in_model(settings, around)
        if options.dropout:
            drops = True
            for name in names:
                full = f"{attribute_of(module)}.{name}"
                layer: Any = inner.get_submodule(name)
                of_memory = module == "cross_attention" and name.endswith((".k_proj", ".v_proj"))
                rows: Rows = "memory" if of_memory else _ROWS[module]
                layer.lora_dropout["default"] = Dropout(options.dropout, full, rows, draws)
    if not drops:
        return None
    model.register_forward_pre_hook(lambda module, args: draws.look_at(args[0]) if module.training else None)
    if train.lora.vision.dropout:
        tower: Any = model.vision_model
        tower.register_forward_pre_hook(
            lambda module, args: draws.next_tiles(len(args[0])) if module.training else None
        )
    for part in model.modules():
        recompute = getattr(part, "recompute", None)
        if isinstance(recompute, Recompute):
            recompute.draws = draws
    return draws


def adapter_shapes(config: schema.Model, train: schema.Train) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter that `add_adapters` makes; no weight is."""
    from nvlm_train.model.nvlm import class_of

    modules = [module for module, mode in train.modes.items() if mode == "lora"]
    with torch.device("meta"):
        model = class_of(config)(config, with_vision="vision" in modules) if modules else nn.Module()
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        options: schema.Lora = getattr(train.lora, module)
        for name, layer in targets(model, config, module, options):
            a, b = adapter_names(f"{attribute_of(module)}.{name}.weight")
            shapes[a] = (options.rank, layer.in_features)
            shapes[b] = (layer.out_features, options.rank)
    return shapes


def scales(train: schema.Train) -> dict[str, float]:
    """alpha / rank of every module with adapters, by its attribute; what a checkpoint records of them."""
    return {
        attribute_of(module): getattr(train.lora, module).alpha / getattr(train.lora, module).rank
        for module, mode in train.modes.items()
        if mode == "lora"
    }


def initial_adapter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A: uniform in +-1/sqrt(inputs), which is what peft's kaiming_uniform_(a=sqrt(5)) is; B: zeros. fp32[shape]."""
    if ".lora_B." in name:
        return torch.zeros(*shape)
    bound = shape[1] ** -0.5
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
