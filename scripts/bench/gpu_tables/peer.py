"""The peer's way to the same step: what a trainer on transformers does with the same samples, weights and optimizer.

transformers' Qwen2 with Liger's kernels where they can run, the tower in plain PyTorch with gradients off, samples
padded to the longest of four, image features put in by a masked scatter, a head and loss over all positions, gradient
accumulation over the micro-batches, the same ZeRO stage and the same AdamW. The tower stays outside the engine, as ours
does, which is kind to the peer.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpu_tables import shapes
from nvlm_train.batch import IGNORE_INDEX, Batch
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.optim import build_optimizer, parameter_groups
from nvlm_train.kernels import KERNELS
from nvlm_train.model.nvlm import encode_tiles
from nvlm_train.model.projector import Projector
from nvlm_train.model.vision import InternVit
from nvlm_train.recipe import schema
from nvlm_train.recipe.resolve import Resolved
from nvlm_train.train import state


@dataclass
class Padded:
    """A micro-batch: ids, mask, labels (not shifted), image: [B, L]; tiles: u8[T, 3, px, px]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    image: Tensor
    tiles: Tensor

    def to(self, device: torch.device) -> Padded:
        return Padded(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def padded(batch: Batch) -> list[Padded]:
    """The samples of a pack in fours, each padded on the right to the longest of its four."""
    bounds = batch.cu_seqlens.tolist()
    samples = list(zip(bounds[:-1], bounds[1:], strict=True))
    per_tile = int((batch.image_slots >= 0).sum()) // len(batch.tiles)
    found, tile = [], 0
    for first in range(0, len(samples), shapes.PEER_SAMPLES):
        own = samples[first : first + shapes.PEER_SAMPLES]
        shape = (len(own), max(end - begin for begin, end in own))
        ids, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        labels, image = torch.full(shape, IGNORE_INDEX), torch.zeros(shape, dtype=torch.bool)
        for i, (begin, end) in enumerate(own):
            ids[i, : end - begin] = batch.input_ids[0, begin:end]
            mask[i, : end - begin] = 1
            labels[i, 1 : end - begin] = batch.labels[0, begin : end - 1]  # transformers shifts them itself
            image[i, : end - begin] = batch.image_slots[0, begin:end] >= 0
        tiles = int(image.sum()) // per_tile
        part = Padded(ids, mask, labels, image, batch.tiles[tile : tile + tiles])
        if batch.tiles.is_pinned():
            part = Padded(*(getattr(part, name).pin_memory() for name in part.__dataclass_fields__))
        found.append(part)
        tile += tiles
    return found


class Peer(nn.Module):
    """Projector and transformers' decoder; returns the sum of the loss over the labelled positions."""

    def __init__(self, config: schema.Model, attention: str) -> None:
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM, __version__

        lm = config.language_model
        own = lm.model_dump(exclude={"preset", "rope_theta"})
        rope: dict[str, Any] = {"rope_theta": lm.rope_theta}
        if int(__version__.split(".")[0]) >= 5:
            rope = {"rope_parameters": {"rope_type": "default", **rope}}
        made = Qwen2Config(**own, **rope, use_cache=False)
        made._attn_implementation = attention
        self.projector = Projector(config, "torch")
        self.language_model = Qwen2ForCausalLM(made)

    def forward(self, batch: Padded, features: Tensor) -> Tensor:
        embeds = self.language_model.get_input_embeddings()(batch.ids)  # [B, L, D]
        image_tokens = self.projector(features)  # [T*Q, D], or one row that nothing takes
        if len(batch.tiles):
            embeds = embeds.masked_scatter(batch.image.unsqueeze(-1), image_tokens.to(embeds.dtype))
        else:
            embeds = embeds + 0.0 * image_tokens.sum()
        # num_items_in_batch: the sum instead of the mean
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=batch.mask, labels=batch.labels, num_items_in_batch=1
        )
        loss: Tensor = out.loss
        return loss.float()


@dataclass
class BuiltPeer:
    engine: zero.Engine
    tower: InternVit
    dtype: torch.dtype
    empty: int  # width of a joined patch


def build(
    recipe: schema.Recipe, resolved: Resolved, world: dist.World, weights: Any
) -> tuple[BuiltPeer, dict[str, Any]]:
    """The peer's engine with the same weights, and what it is made of."""
    from transformers import __version__

    dtype, device = state.DTYPES[recipe.precision], world.device
    obstacle = KERNELS["linear_cross_entropy"]["liger"].obstacle(device.type)
    if obstacle is None:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Peer(recipe.model, attention)
            tower = InternVit(recipe.model.vision, kernels="torch")
    finally:
        torch.set_default_dtype(before)
    fill(model, "", weights)
    fill(tower, "vision_model.", weights)
    tower.requires_grad_(False).eval()
    if recipe.activation_checkpointing != "none":
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    groups = parameter_groups(model.named_parameters(), recipe.optimizer, resolved.module_lr)
    optimizer = build_optimizer(groups, recipe.optimizer, device.type)
    engine = zero.build(model, optimizer, resolved.deepspeed, world)
    if obstacle is None and engine.stage == 3:
        import deepspeed

        # Liger's loss reads the head's weight outside of the head's forward, where ZeRO-3 has released it
        deepspeed.zero.register_external_parameter(model, model.language_model.lm_head.weight)
    about = {
        "peer": f"transformers {__version__}, {attention}, "
        + ("Liger's kernels" if obstacle is None else f"without Liger ({obstacle})"),
        "kernels": {},
    }
    return BuiltPeer(engine, tower, dtype, 4 * recipe.model.vision.hidden_size), about


@torch.no_grad()
def fill(module: nn.Module, prefix: str, weights: Any) -> None:
    """Values by our names, which are the published ones."""
    for name, parameter in module.named_parameters():
        parameter.copy_(weights.read(prefix + name))


def train(world: dist.World, built: BuiltPeer, batches: list[Padded], trained_tokens: int) -> tuple[list[float], float]:
    """One optimizer step; see `nvlm_train.train.step.train`."""
    losses = []
    for number, host in enumerate(batches, start=1):
        batch = host.to(world.device)
        if len(batch.tiles):
            features = encode_tiles(built.tower, batch.tiles, built.dtype, tiles_per_chunk=len(batch.tiles))
        else:
            features = torch.zeros(1, built.empty, dtype=built.dtype, device=world.device)
        loss_sum = zero.forward(built.engine, batch, features, last=number == len(batches))
        zero.backward(built.engine, loss_sum, trained_tokens)
        losses.append(loss_sum.detach())
    norm = zero.step(built.engine)
    return torch.stack(losses).double().tolist(), norm
