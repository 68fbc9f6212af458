"""Adapters beside the model's linear layers, dropout by keys, and the decoder in 4 bits; all in one process."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from helpers import TESTS
from nvlm_train.checkpoint import merged
from nvlm_train.errors import SetupError
from nvlm_train.model import lora
from nvlm_train.model.dropout import Draws, Dropout
from nvlm_train.model.flops import trainable_parameters
from nvlm_train.model.nvlm import Nvlm, NvlmD, class_of
from nvlm_train.recipe import schema
from tiny import make_batch, model_config, seeded_model, seeded_value

sys.path.insert(0, str(TESTS / "engine"))
from zero_jobs import join  # imports no deepspeed by itself

MODULES = ("vision", "projector", "cross_attention", "language_model")
ARCHITECTURES = ("nvlm_d", "nvlm_x", "nvlm_h")
SAMPLES = [(9, 1), (7, 2), (5, 0)]


def options(dropout: float = 0.3, architecture: str = "nvlm_d") -> schema.Train:
    """LoRA on every module of the architecture."""
    ranks = dict(zip(MODULES, (2, 5, 4, 3), strict=True))
    if architecture == "nvlm_d":
        del ranks["cross_attention"]
    settings = {module: {"rank": rank, "alpha": 7, "dropout": dropout} for module, rank in ranks.items()}
    return schema.Train.model_validate({**dict.fromkeys(ranks, "lora"), "lora": settings})


def adapted(
    train: schema.Train, mode: str = "none", zero_b: bool = False, architecture: str = "nvlm_d"
) -> tuple[Nvlm, Draws | None]:
    config = model_config(architecture)
    model = class_of(config)(config, activation_checkpointing=mode, tiles_per_chunk=2)
    draws = lora.add_adapters(model, config, train)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = seeded_value(lora.base_name(name), tuple(parameter.shape), 3)
            parameter.copy_(torch.zeros_like(value) if zero_b and ".lora_B." in name else value)
            parameter.requires_grad_(lora.is_adapter(name))
    if draws is not None:
        draws.start_step(1, 0)
    return model, draws


def gradients(model: Nvlm, batch: Any) -> dict[str, torch.Tensor]:
    model(batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_stand_where_they_are_counted_and_begin_as_nothing(architecture: str) -> None:
    train, config = options(0.0, architecture), model_config(architecture)
    model, draws = adapted(train, zero_b=True, architecture=architecture)
    assert draws is None
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if lora.is_adapter(name)}
    assert shapes == lora.adapter_shapes(config, train)
    counted = sum(trainable_parameters(config, train).values())
    assert counted == sum(torch.Size(shape).numel() for shape in shapes.values())
    plain = seeded_model(config)
    assert {lora.base_name(n) for n, _ in model.named_parameters() if not lora.is_adapter(n)} == {
        name for name, _ in plain.named_parameters()
    }
    batch = make_batch(SAMPLES, 1, architecture=architecture)
    # B is zero, so nothing is added. Bit for bit with AVX2; with AVX-512 a product's rounding depends on where its
    # inputs lie: worst 1.0e-7.
    assert float(model(batch)) == pytest.approx(float(plain(batch)), rel=1e-6)


def test_merged_weights_are_the_adapted_model() -> None:
    """`W + alpha / rank * B A` in every target gives the adapted model's loss: what is exported is what was trained."""
    model, _ = adapted(options(0.0))
    weights = dict(model.named_parameters())
    plain = seeded_model(model_config())
    scales = lora.scales(options(0.0))
    changed = 0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            a, b = lora.adapter_names(name)
            if a in weights:
                parameter.copy_(merged(parameter, weights[a], weights[b], scales[name.split(".")[0]]))
                changed += 1
    assert changed == 2 * 4 + 2 + 3 * 7
    batch = make_batch([(9, 1), (7, 2), (5, 0)], 1)
    with torch.no_grad():
        found, expected, untrained = (float(m(batch)) for m in (plain, model, seeded_model(model_config())))
    assert abs(found - expected) < 2e-5 * expected  # worst seen 2e-7
    assert abs(untrained - expected) > 1e-3 * expected, "adapters do nothing"


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recompute_drops_the_same_values(mode: str, architecture: str) -> None:
    """Every gradient bit for bit, of each module, with dropout on and several chunks of tiles."""
    batch = make_batch(SAMPLES, 1, architecture=architecture)
    expected, found = (
        gradients(adapted(options(0.3, architecture), m, False, architecture)[0], batch) for m in ("none", mode)
    )
    assert set(expected) == set(found) and all(lora.is_adapter(name) for name in found)
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(found[name], gradient), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_follows_the_sample_and_changes_with_the_step(architecture: str) -> None:
    """Samples in one pack, in packs of their own, in another order: the same sum of gradients; in another step not."""
    kinds = enumerate([(9, 1), (7, 2), (6, 0)])
    samples = [make_batch([sample], 7 + number, architecture=architecture) for number, sample in kinds]
    together = gradients(adapted(options(0.3, architecture), architecture=architecture)[0], join(samples))
    backwards = gradients(adapted(options(0.3, architecture), architecture=architecture)[0], join(samples[::-1]))
    model, _ = adapted(options(0.3, architecture), architecture=architecture)
    for sample in samples:
        alone = gradients(model, sample)
    model, draws = adapted(options(0.3, architecture), architecture=architecture)
    assert draws is not None
    draws.start_step(1, 1)
    later = gradients(model, join(samples))
    for name, gradient in together.items():
        size = gradient.norm()
        # Worst case measured: 1.1e-6, the order of sums
        assert (alone[name] - gradient).norm() < 2e-5 * size and (backwards[name] - gradient).norm() < 2e-5 * size, name
        assert (later[name] - gradient).norm() > 1e-2 * size, name


def test_dropout_keeps_the_mean_and_layers_differ() -> None:
    draws = Draws(4)
    draws.start_step(3, 5)
    batch = make_batch([(300, 0), (200, 0)], 2)
    draws.look_at(batch)
    x = torch.ones(1, 500, 200, requires_grad=True)
    first, second = (Dropout(0.2, name, "tokens", draws) for name in ("a", "b"))
    out = first(x)
    assert set(out.unique().tolist()) == {0.0, 1.25}
    dropped = out.detach() == 0
    # 100,000 draws: a standard deviation of 0.0013; rows and columns of 200 and 500: of 0.028 and 0.018
    assert abs(dropped.float().mean() - 0.2) < 0.006
    assert (dropped.float().mean(-1) - 0.2).abs().max() < 0.15 and (dropped.float().mean(1) - 0.2).abs().max() < 0.1
    other = second(x).detach() == 0
    assert abs((dropped & other).float().mean() - 0.04) < 0.004, "two layers drop the same places"
    neighbours = dropped[:, 1:] & dropped[:, :-1]
    assert abs(neighbours.float().mean() - 0.04) < 0.004, "neighbouring tokens drop the same places"
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())
    assert torch.equal(first.eval()(x), x)
    with pytest.raises(RuntimeError, match="batch's tokens are"):
        first.train()(x[:, 1:])


def test_half_precision_keeps_its_type() -> None:
    draws = Draws(4)
    draws.start_step(0, 0)
    draws.look_at(make_batch([(5, 0)], 1))
    assert Dropout(0.5, "a", "tokens", draws)(torch.ones(1, 5, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_four_bits(device: str) -> None:
    """The decoder in NF4: close to the model it was made of, and only adapters get gradients."""
    pytest.importorskip("bitsandbytes")
    from nvlm_train.model.quantize import hold_in_nf4

    config = model_config(tie_word_embeddings=True)
    train = schema.Train.model_validate(
        {"projector": "frozen", "language_model": "lora", "quantize": "nf4", "lora": {"language_model": {"rank": 3}}}
    )
    with torch.device("meta"):
        model = NvlmD(config)
        lora.add_adapters(model, config, train)
    write = hold_in_nf4(model, torch.device(device), torch.float32)
    with torch.device(device):
        plain = NvlmD(config)
        lora.add_adapters(plain, config, train)
    quantized = 0
    with torch.no_grad():
        for made in (model, plain):
            for name, parameter in made.named_parameters():
                parameter.requires_grad_(lora.is_adapter(name))
                value = seeded_value(lora.base_name(name), tuple(parameter.shape), 3)
                if made is model and write(parameter, value):
                    quantized += 1
                else:
                    parameter.copy_(value)
    assert quantized == 3 * 7
    stored = dict(model.named_parameters())
    assert stored["language_model.model.layers.0.mlp.up_proj.base_layer.weight"].dtype == torch.uint8
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    batch = make_batch([(9, 1), (7, 2), (5, 0)], 1).to(device)
    found, expected = gradients(model, batch), gradients(plain, batch)
    assert set(found) == set(expected) == {name for name in stored if lora.is_adapter(name)}
    with torch.no_grad():
        loss, exact = float(model(batch)), float(plain(batch))
    # Worst case measured: 1.9e-3 of the loss; random weights of 4 bits are off by 9 % each
    assert 1e-6 < abs(loss - exact) / exact < 2e-2
    angle = torch.nn.functional.cosine_similarity(
        torch.cat([g.flatten() for g in found.values()]), torch.cat([g.flatten() for g in expected.values()]), dim=0
    )
    assert angle > 0.75  # measured 0.88: so few and so small matrices leave rounding little to average over


def test_four_bits_without_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvlm_train.model.quantize import hold_in_nf4

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SetupError, match=r"train.quantize is nf4, which needs bitsandbytes .*nvlm_train\[qlora\]"):
        hold_in_nf4(torch.nn.Module(), torch.device("cpu"), torch.float32)
