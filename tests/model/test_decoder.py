"""The decoder against transformers' own Qwen2ForCausalLM and LlamaForCausalLM, its loss against cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model_cases import (
    LANGUAGE_MODEL,
    at_most,
    gradients,
    largest_difference,
    make_config,
    make_model,
    pack,
    randomise,
    segments,
    worst,
)
from nvlm_train.batch import IGNORE_INDEX, Batch
from nvlm_train.kernels import linear_cross_entropy
from nvlm_train.model.decoder import LanguageModel, LmHead
from nvlm_train.recipe import schema

torch.set_num_threads(1)

CASES = {
    "gqa 4:2": {},
    "no gqa": {"num_key_value_heads": 4, "rope_theta": 5e6},
    "one kv head": {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "tied": {"tie_word_embeddings": True, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    "llama": {"model_type": "llama", "rope_theta": 5e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 1},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 40, "num_attention_heads": 2},
    "deep, wide heads": {"num_hidden_layers": 6, "hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def reference(config: schema.LanguageModel) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    llama = config.model_type == "llama"
    theirs = (transformers.LlamaConfig if llama else transformers.Qwen2Config)(
        **{key: getattr(config, key) for key in LANGUAGE_MODEL},
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        attn_implementation="eager",
    )
    return (transformers.LlamaForCausalLM if llama else transformers.Qwen2ForCausalLM)(theirs)


def pair(scale: float = 3.0, **sizes: object) -> tuple[LanguageModel, torch.nn.Module]:
    """Our decoder and transformers', with the same random weights."""
    config = schema.LanguageModel.model_validate({**LANGUAGE_MODEL, **sizes})
    ours, theirs = LanguageModel(config), reference(config)
    randomise(ours, seed=3, scale=scale)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and not missing  # names are the published ones
    return ours, theirs


def run(model: LanguageModel, batch: Batch) -> torch.Tensor:
    x = model.model.embed_tokens(batch.input_ids)
    return model.model(x, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_logits_loss_and_every_gradient_equal_transformers(sizes: dict[str, object]) -> None:
    ours, theirs = pair(**sizes)
    batch = pack([[(23, 0)]], labelled=0.7)
    hidden = run(ours, batch)
    logits = ours.lm_head(hidden)
    expected = theirs(input_ids=batch.input_ids).logits
    at_most(largest_difference(logits, expected), 5e-6, "logits")  # worst seen 2.0e-6

    loss = ours.lm_head(hidden, batch.labels, batch.num_trained_tokens)
    wanted = F.cross_entropy(expected.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    assert loss.dtype == torch.float32 and loss.shape == ()
    at_most(largest_difference(loss, wanted), 5e-7, "loss")  # worst seen 1.3e-7
    loss.backward()
    wanted.backward()
    at_most(worst(gradients(ours), gradients(theirs)), 5e-6, "gradients")  # worst seen 2.2e-6


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_norm_or_bias_that_is_left_out_would_show(model_type: str) -> None:
    """The parity test has power: each kind of weight changes the logits by far more than its tolerance."""
    ours, theirs = pair(model_type=model_type)
    assert any("bias" in name for name in ours.state_dict()) == (model_type == "qwen2")
    batch = pack([[(23, 0)]])
    expected = theirs(input_ids=batch.input_ids).logits
    for name, parameter in ours.named_parameters():
        if "layers.1" in name and parameter.ndim == 1 and "k_proj" not in name:
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.copy_(torch.ones_like(kept) if "norm" in name else torch.zeros_like(kept))
                changed = (ours.lm_head(run(ours, batch)) - expected).abs().max() / expected.abs().max()
                parameter.copy_(kept)
            assert changed > 1e-3, name


def test_bf16_keeps_positions_exact() -> None:
    """bf16 weights, positions up to 28,500: with bf16 frequencies the angles would be off by whole turns."""
    ours, theirs = pair(scale=8.0, max_position_embeddings=32768)  # large weights: attention looks at few tokens
    batch = pack([[(20, 0)]])
    far = Batch(**{**vars(batch), "position_ids": batch.position_ids * 1500})
    everything = torch.ones(1, 20, dtype=torch.int64)  # else transformers takes jumps in position for packed samples

    def reference_logits(frequencies: torch.Tensor) -> torch.Tensor:
        theirs.model.rotary_emb.inv_freq = frequencies
        return theirs(input_ids=far.input_ids, position_ids=far.position_ids, attention_mask=everything).logits

    frequencies = 1.0 / (1e6 ** (torch.arange(0, 8, 2).float() / 8))
    exact = ours.lm_head(run(ours, far))
    at_most(largest_difference(exact, reference_logits(frequencies)), 3e-6, "fp32 far")  # worst seen 8.8e-7
    ours.bfloat16()
    theirs.bfloat16()
    logits = ours.lm_head(run(ours, far))
    assert logits.dtype == torch.bfloat16
    # one bf16 step is 0.008; worst seen 0.035 and 0.043
    at_most(largest_difference(logits, reference_logits(frequencies)), 0.08, "bf16 far")
    at_most(largest_difference(logits, exact), 0.08, "bf16 against fp32")
    wrong = largest_difference(reference_logits(frequencies.bfloat16().float()), exact)
    # rounded frequencies, as a bf16 buffer would hold them, are visibly wrong: the test has power
    assert wrong > 0.2, float(wrong)


def test_packed_equals_one_sample_at_a_time() -> None:
    model = make_model(with_vision=False)
    lm = model.language_model
    batch = pack([[(7, 0), (1, 0), (12, 0)], [(16, 0)]], pad=3)
    together = lm.lm_head(run(lm, batch)).flatten(0, 1)
    apart = torch.cat([lm.lm_head(run(lm, part))[0] for part in segments(batch)])
    at_most(largest_difference(together, apart), 2e-6, "packed logits")  # worst seen 4.2e-7
    lm.lm_head(run(lm, batch), batch.labels, batch.num_trained_tokens).backward()
    own = gradients(lm)
    for part in segments(batch):
        lm.lm_head(run(lm, part), part.labels, part.num_trained_tokens).backward()
    at_most(worst(own, gradients(lm)), 2e-6, "packed gradients")  # worst seen 3.5e-7


def test_no_gradient_crosses_a_segment() -> None:
    lm = make_model(with_vision=False).language_model
    batch = pack([[(6, 0), (9, 0), (4, 0)]], pad=2)
    x = lm.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    hidden = lm.model(x, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    hidden[0, 6:15].square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0, :6], torch.zeros(6, 32)) and torch.equal(x.grad[0, 15:], torch.zeros(6, 32))
    assert (x.grad[0, 6:15].norm(dim=-1) > 0).all()
    x.grad = None
    lm.model(x, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)[0, 8].sum().backward()
    assert torch.equal(x.grad[0, 9:], torch.zeros(12, 32)), "a token saw what comes after it"


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen decoder"])
def test_checkpointing_changes_nothing(trained: bool) -> None:
    results = []
    for mode in ("none", "selective", "full"):
        model = make_model(activation_checkpointing=mode)
        model.language_model.requires_grad_(trained)
        batch = pack([[(11, 1), (9, 0)]])
        calls: list[int] = []
        model.language_model.model.layers[1].register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        loss = model(batch)
        assert len(calls) == 1
        loss.backward()
        assert len(calls) == (1 if mode == "none" else 2), "run again once in backward, and only when asked"
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    for loss, found in results[1:]:
        assert torch.equal(results[0][0], loss)
        for name, grad in results[0][1].items():
            assert grad is not None and torch.equal(grad, found[name]), name
    assert float(results[0][1]["projector.fc1.weight"].norm()) > 0  # passes through a frozen decoder


def test_selective_recompute_minds_only_what_it_keeps() -> None:
    """ZeRO-3 gathers inside a layer's second run what may have been there already in the first."""
    model = make_model(activation_checkpointing="selective")
    layer, calls = model.language_model.model.layers[1], [0]

    def gather(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 2:  # operators that the first run did not have, and more of one that it had
            torch.zeros(32 * 32).view(32, 32).tril().view(-1)

    layer.mlp.register_forward_pre_hook(gather)
    model(pack([[(11, 1), (9, 0)]])).backward()
    assert calls == [2] and all(p.grad is not None for p in layer.parameters())


def head_and_rows(labelled: int) -> tuple[LmHead, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    head = LmHead(make_config().language_model)
    hidden = torch.randn(2, 9, 32, generator=generator, requires_grad=True)
    labels = torch.full((2, 9), IGNORE_INDEX)
    places = torch.randperm(18, generator=generator)[:labelled]
    labels.view(-1)[places] = torch.randint(0, 67, (labelled,), generator=generator)
    return head, hidden, labels


@pytest.mark.parametrize("labelled", [1, 5, 18])
@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
def test_the_loss_is_the_plain_cross_entropy_in_pieces_too(
    labelled: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 67 * rows_at_once)
    head, hidden, labels = head_and_rows(labelled)
    loss = head(hidden, labels)
    loss.backward()
    own = {"weight": head.weight.grad, "hidden": hidden.grad}
    head.weight.grad = hidden.grad = None
    wanted = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    wanted.backward()
    at_most(largest_difference(loss, wanted), 5e-7, "loss")  # worst seen 1.1e-7
    at_most(worst(own, {"weight": head.weight.grad, "hidden": hidden.grad}), 1e-6, "gradients")  # worst seen 1.8e-7
    with torch.no_grad():
        assert torch.equal(head(hidden, labels), loss)


def test_no_label_gives_zero_loss_and_zero_gradients() -> None:
    head, hidden, labels = head_and_rows(0)
    loss = head(hidden, labels, 0)
    assert torch.equal(loss, torch.tensor(0.0))
    loss.backward()
    assert head.weight.grad is not None and hidden.grad is not None
    assert not head.weight.grad.any() and not hidden.grad.any()


def test_a_wrong_count_of_labels_is_refused() -> None:
    head, hidden, labels = head_and_rows(5)
    with pytest.raises(ValueError, match="num_trained_tokens is 6, but 5 labels carry a loss"):
        head(hidden, labels, 6)


def test_bf16_logits_are_summed_in_fp32() -> None:
    head, hidden, labels = head_and_rows(18)
    head.bfloat16()
    loss = head(hidden.bfloat16(), labels)
    logits = F.linear(hidden.bfloat16(), head.weight).float().flatten(0, 1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits, labels.flatten(), reduction="sum"))


def test_tied_heads_are_one_parameter() -> None:
    lm = LanguageModel(make_config(tie_word_embeddings=True).language_model)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(lm.named_parameters())
    assert lm.lm_head.weight.shape == (67, 32)
