"""QLoRA's frozen weights: the decoder's linear layers in 4 bits, through bitsandbytes (Dettmers et al., 2023).

NF4 keeps a weight as one of 16 values, the quantiles of a normal distribution, times the largest absolute value of its
block of 64. The scales are kept in 8 bits, with one in 32 bits for 256 of them: 4 + 8/64 + 32/(64*256) = 4.127 bits.
Products are computed in the run's precision from weights that are unpacked for the moment of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_train.errors import SetupError


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise SetupError(
            f"train.quantize is nf4, which needs bitsandbytes ({error}); pip install 'nvlm_train[qlora]'"
        ) from None
    return bitsandbytes


def quantized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of every linear layer of the decoder's layers, LoRA's own left out."""
    decoder: Any = model.language_model
    for parent in decoder.model.layers.modules():
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and not name.startswith("default"):  # of ModuleDicts lora_A and lora_B
                yield parent, name, layer


def hold_in_nf4(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[[nn.Parameter, Tensor], bool]:
    """Prepares a model that was built on the meta device: its decoder's linear layers for NF4, all else as it is.

    Returns what writes a value into a parameter: it quantises the value where the parameter is one of those, one tensor
    at a time on `device`, and says whether it was. Raises SetupError without bitsandbytes.
    """
    bnb = _bitsandbytes()
    owner: dict[int, nn.Module] = {}
    for parent, name, layer in list(quantized_layers(model)):
        with torch.device("meta"):
            four = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype,
                quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
        four.weight = layer.weight  # a placeholder with the shape of the weight
        four.bias = layer.bias
        four.requires_grad_(False)
        # On CPUs with AVX512-BF16 the first product outside training would repack the weight for good, which some
        # widths do not allow, and training would go on with other arithmetic: validation would change it.
        four.support_avx512bf16_for_cpu = False
        setattr(parent, name, four)
        owner[id(four.weight)] = four
    _make_real(model, set(owner), device, dtype)

    def write(parameter: nn.Parameter, value: Tensor) -> bool:
        layer = owner.get(id(parameter))
        if layer is None:
            return False
        whole = value.view(parameter.shape).to(device=device, dtype=dtype)
        four = bnb.nn.Params4bit(whole, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
        layer.weight = four.to(device)  # quantises
        return True

    return write


def _make_real(model: nn.Module, left_out: set[int], device: torch.device, dtype: torch.dtype) -> None:
    """Gives every other parameter on the meta device memory of its own; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and id(parameter) not in left_out:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, device=device, dtype=dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, made[id(parameter)])
