"""NVLM-X, NVLM-H and an NVLM-D of Yi's kind: exported, verified, generating, and the same as ours in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nvlm_train.batch import IGNORE_INDEX, Batch, Memory
from nvlm_train.data import chat, tiling
from nvlm_train.data.memory import lay_out_memory, runs_of
from nvlm_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nvlm_train.errors import CheckpointError
from nvlm_train.export import hf, verify
from nvlm_train.model.key_map import model_from_recipe
from nvlm_train.model.nvlm import Nvlm, class_of
from nvlm_train.model.pretrained import account, expected_shapes, load_into, open_model_folder
from nvlm_train.recipe.schema import Tiling
from test_remote_code import as_hf, picture
from tiny_nvlm import CONTROL, YI_CONTROL, MemoryWeights, make_recipe, make_tokenizer, random_weights

Q = 4  # image tokens a tile
YI = {
    "model.language_model": {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 417, "rms_norm_eps": 1e-5,
        "rope_theta": 9000.0, "max_position_embeddings": 512,
    },
    "tokenizer.template": "nvlm_yi",
}  # fmt: skip
SMALL_TOWER = {
    "model.vision": {
        "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 12,
        "patch_size": 3, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
    },
}  # fmt: skip
MEMBERS: dict[str, dict[str, Any]] = {
    "x": {"model.architecture": "nvlm_x", "model.cross_attention": {"every_layers": 2, "feed_forward": True}},
    "h": {"model.architecture": "nvlm_h", "model.cross_attention": {"num_key_value_heads": 3, "place": "after"}},
    "h_yi": {
        "model.architecture": "nvlm_h", **YI,
        "model.cross_attention": {"gate": "none", "memory_norm": "none", "place": "before", "text_reads": "last_image"},
        "model.projector": {"norm": "none"},
    },
    "d_yi_300m": {**YI, **SMALL_TOWER},
}  # fmt: skip
IMAGES = [picture(40, 24, 2), picture(12, 12, 1), picture(24, 12, 3)]  # of 7, 1 and 3 tiles
CASES: list[tuple[list[dict[str, Any]], list[int]]] = [
    ([{"role": "user", "content": [{"text": "a+b="}]}], []),
    ([{"role": "user", "content": [{"image": 0}, {"text": "\nWhat is the left digit?"}]}], [1]),
    ([{"role": "user", "content": [{"text": "sum "}, {"image": 0}]}], [0]),
    (
        [
            {"role": "user", "content": [{"image": 0}, {"text": "\nleft <|im_end|> is text"}]},
            {"role": "assistant", "content": [{"text": "seven"}]},
            {"role": "user", "content": [{"text": "and in "}, {"image": 1}, {"image": 2}, {"text": "?"}]},
        ],
        [2, 1, 0],
    ),
]


class Member(NamedTuple):
    recipe: dict[str, Any]
    weights: MemoryWeights
    folder: Path
    ours: Nvlm
    loaded: Any
    processor: Any
    tokenizer: ChatTokenizer


@pytest.fixture(scope="module", params=MEMBERS)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    import transformers

    torch.set_num_threads(1)
    changes = MEMBERS[request.param]
    yi = changes.get("tokenizer.template") == "nvlm_yi"
    words = make_tokenizer(tmp_path_factory.mktemp("words"), YI_CONTROL if yi else CONTROL)
    recipe = make_recipe(words, **changes)
    weights = random_weights(recipe, seed=7)
    folder = hf.export(weights, recipe, tmp_path_factory.mktemp("exports") / "out", max_shard_size="80KB", step=3)
    model = model_from_recipe(recipe)
    ours = class_of(model)(model).eval()
    load_into(ours, weights, model, seed=0)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return Member(recipe, weights, folder, ours, hf.load_exported(folder), processor, load_tokenizer(words))


def rendered(member: Member, messages: list[dict[str, Any]], counts: list[int]) -> chat.Rendered:
    return chat.render_prompt(
        messages, counts, member.tokenizer, member.recipe["tokenizer"]["template"],
        Tiling.model_validate(member.recipe["data"]["tiling"]), Q, member.recipe["tokenizer"]["system"],
        architecture=member.ours.config.architecture,
    )  # fmt: skip


def as_batch(member: Member, prompt: chat.Rendered, new: list[int], tiles: torch.Tensor) -> Batch:
    """A prompt and what was generated after it, laid out as the training data are."""
    ids = np.concatenate([prompt.input_ids, np.asarray(new, dtype=np.int32)])
    whole = chat.Rendered(ids, np.full(len(ids), IGNORE_INDEX, dtype=np.int32), prompt.tile_starts, prompt.reads)
    slots = np.full(len(ids), -1)
    for k, start in enumerate(prompt.tile_starts):
        if start >= 0:
            slots[start : start + Q] = np.arange(k * Q, (k + 1) * Q)
    model, memory = member.ours.config, None
    if model.architecture != "nvlm_d":
        arrays = lay_out_memory(model, [(0, whole)], Q, member.tokenizer.pad)
        memory = Memory(**{n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in arrays.items()})
    return Batch(
        input_ids=torch.from_numpy(ids.astype(np.int64))[None],
        labels=torch.from_numpy(whole.labels.astype(np.int64))[None],
        position_ids=torch.arange(len(ids))[None],
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        tiles=tiles,
        image_slots=torch.from_numpy(slots)[None],
        num_trained_tokens=0,
        num_tile_chunks=1 if len(tiles) else 0,
        memory=memory,
    )


def cut(images: list[Image.Image]) -> list[torch.Tensor]:
    return [torch.from_numpy(tiling.cut(image, 6, 12, True)) for image in images]


def test_the_export_is_verified(member: Member) -> None:
    report = verify.verify(member.folder, member.weights, member.recipe)
    assert report["ok"] and report["problems"] == [], report["problems"]
    member_name = member.ours.config.architecture
    card = (member.folder / "README.md").read_text()
    assert f"- {member_name}\n" in card and ("all-zero heads" in card) == (member_name == "nvlm_d")
    assert len(report["logits"]) == 5 and all(check["ok"] for check in report["checks"])
    # worst case here 6 % of the tolerance of 2e-5 of the largest logit
    assert all(result["max_difference"] <= result["tolerance"] / 4 for result in report["logits"].values())


def test_layer_by_layer_the_logits_are_the_same(member: Member) -> None:
    config = json.loads((member.folder / "config.json").read_text())
    results = verify.compare_logits(member.folder, member.weights, member.ours.config, config, streamed=True)
    assert len(results) == 5  # worst case here 6 % of the tolerance
    assert all(result["max_difference"] <= result["tolerance"] / 4 for result in results.values())


def test_prompts_and_reads_are_those_of_training(member: Member) -> None:
    model = member.ours.config
    for messages, chosen in CASES:
        for counts in ([len(c) for c in cut([IMAGES[i] for i in chosen])], [1] * len(chosen), [2] * len(chosen)):
            expected = rendered(member, messages, counts)
            ids, tiles = member.processor.lay_out(as_hf(messages), counts)
            assert ids == expected.input_ids.tolist()
            if model.architecture == "nvlm_d":
                continue
            if not expected.reads:  # nothing is in the memory
                assert not any(tile.in_memory for tile in tiles) and not member.processor.runs(tiles)
                continue
            assert [tile.in_memory for tile in tiles] == [tile.in_memory for tile in expected.reads]
            assert [tuple(tile.tag) for tile in tiles] == [tile.tag_ids for tile in expected.reads]
            runs = [(a, min(b, len(ids)), c, d) for a, b, c, d in member.processor.runs(tiles)]
            assert runs == [tuple(run) for run in runs_of(expected, Q, model)]


def test_answers_equal_greedy_on_our_model_single_and_batched(member: Member) -> None:
    conversations = [as_hf(messages) for messages, _ in CASES]
    images = [[IMAGES[i] for i in chosen] for _, chosen in CASES]
    together = member.loaded.generate(**member.processor(conversations, images=images), max_new_tokens=6)
    batch = member.processor(conversations, images=images)
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)  # padded on the right
    batch["input_ids"], batch["attention_mask"] = (batch[k].gather(1, order) for k in ("input_ids", "attention_mask"))
    assert torch.equal(member.loaded.generate(**batch, max_new_tokens=6), together)
    stop = set(member.loaded.generation_config.eos_token_id)
    different = set()
    for row, (messages, chosen) in enumerate(CASES):
        tiles = cut([IMAGES[i] for i in chosen])
        prompt = rendered(member, messages, [len(part) for part in tiles])
        stacked = torch.cat(tiles) if tiles else torch.zeros(0, 3, 12, 12, dtype=torch.uint8)
        expected: list[int] = []
        while len(expected) < 6 and not (expected and expected[-1] in stop):
            with torch.no_grad():
                logits = member.ours.logits(as_batch(member, prompt, expected, stacked))
            expected.append(int(logits[0, -1].argmax()))
        alone = member.loaded.generate(**member.processor(conversations[row], images=images[row]), max_new_tokens=6)
        assert alone[0].tolist()[: len(expected)] == expected
        assert together[row].tolist()[: len(expected)] == expected
        different.add(tuple(expected))
    assert len(different) == len(CASES)  # the images and prompts do matter


def test_several_answers_and_beams_share_the_memory(member: Member) -> None:
    messages, chosen = CASES[3]
    inputs = member.processor(as_hf(messages), images=[IMAGES[i] for i in chosen])
    one = member.loaded.generate(**inputs, max_new_tokens=4)
    beams = member.loaded.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=3)
    assert beams.shape[0] == 3 and one.shape[0] == 1
    with torch.no_grad():  # without the cache every step reads the memory anew
        assert torch.equal(member.loaded.generate(**inputs, max_new_tokens=4, use_cache=False), one)


def test_saved_and_imported_again_it_is_the_same_bit_for_bit(member: Member, tmp_path: Path) -> None:
    model = member.ours.config
    again = open_model_folder(member.folder, model)
    found = account(expected_shapes(model), again)
    assert found.loaded == sorted(member.weights.names()) and not found.initialised
    for name in again.names():
        assert torch.equal(again.read(name), member.weights.read(name)), name
    if model.architecture != "nvlm_d":  # the same shapes, read by other layers
        other = model.cross_attention.model_copy(
            update={"place": "between" if model.cross_attention.place != "between" else "after"}
        )
        with pytest.raises(CheckpointError, match=r"cross_attention_config\.place is '.*', but the recipe's"):
            open_model_folder(member.folder, model.model_copy(update={"cross_attention": other}))
    member.loaded.save_pretrained(tmp_path)
    member.processor.save_pretrained(tmp_path)
    reloaded = hf.load_exported(tmp_path)
    inputs = member.processor("sum", images=[IMAGES[0]])
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, member.loaded(**inputs).logits)
    before, after = (json.loads((f / "config.json").read_text()) for f in (member.folder, tmp_path))
    assert after["llm_config"]["rope_theta"] == before["llm_config"]["rope_theta"]
    assert after["architectures"] == before["architectures"]
    assert after["llm_config"]["architectures"] == before["llm_config"]["architectures"]
    assert after.get("cross_attention_config") == before.get("cross_attention_config")


def test_a_change_of_any_new_tensor_shows_in_values_and_logits(member: Member, tmp_path: Path) -> None:
    """Cross-attention and projector of X and H, and what the other backbones have more."""
    model = member.ours.config
    config = json.loads((member.folder / "config.json").read_text())
    prompts = verify.fixed_prompts(model, config["image_token_id"])
    with torch.no_grad():
        expected = {
            n: member.ours.logits(verify.as_batch(p, model, config["image_token_id"])) for n, p in prompts.items()
        }
    parameters = dict(member.loaded.named_parameters())
    new = [n for n in parameters if n.startswith(("cross_attention.", "mlp1.")) or ".bias" in n or "norm" in n]
    assert len(new) > 20
    with torch.no_grad():
        for name in new:
            kept = parameters[name].detach().clone()
            parameters[name].mul_(1.5).add_(0.05)
            worst = max(
                float((member.loaded(**verify.as_inputs([prompts[n]], model)).logits - expected[n]).abs().max())
                for n in ("several tiles", "two images")
            )
            parameters[name].copy_(kept)
            largest = max(float(e.abs().max()) for e in expected.values())
            silent = name.endswith("k_proj.bias") or "attn.qkv.bias" in name  # a bias of all keys moves no softmax
            assert silent or worst > 10 * verify.LOGIT_TOLERANCE * largest, (name, worst)
    file = next(f for f in sorted(member.folder.glob("*.safetensors")) if new[0] in load_file(f))
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in member.folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    tensors = load_file(file)
    tensors[new[0]].view(-1)[0] += 1e-3
    save_file(tensors, copied / file.name, metadata={"format": "pt"})
    report = verify.verify(copied, member.weights, member.recipe, logits=False)
    assert not report["ok"] and f"values: {new[0]}: 1 of" in report["problems"][1]


def test_text_alone_is_the_plain_decoder(member: Member) -> None:
    inputs = member.processor("a+b=")
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        expected = member.loaded.language_model(**inputs).logits
        assert torch.equal(member.loaded(**inputs).logits, expected)


def test_training_from_the_export_reaches_every_weight(member: Member) -> None:
    member.loaded.train()
    inputs = member.processor("sum", images=[IMAGES[0]])
    member.loaded(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [name for name, parameter in member.loaded.named_parameters() if parameter.grad is None]
    member.loaded.zero_grad(set_to_none=True)
    member.loaded.eval()
    assert without == []


def test_layouts(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = make_recipe(tokenizer_folder)
    weights = random_weights(recipe)
    out = hf.export(weights, recipe, tmp_path / "unpadded", layout="unpadded")
    assert load_file(out / "model-00001-of-00001.safetensors")[
        "vision_model.encoder.layers.0.attn.qkv.weight"
    ].shape == (60, 20)
    assert verify.verify(out, weights, recipe)["ok"]
    again = open_model_folder(out, model_from_recipe(recipe))
    assert all(torch.equal(again.read(name), weights.read(name)) for name in weights.names())
    padded = hf.export(weights, recipe, tmp_path / "published", layout="published")
    again = open_model_folder(padded, model_from_recipe(recipe))
    assert all(torch.equal(again.read(name), weights.read(name)) for name in weights.names())
    x = make_recipe(tokenizer_folder, **MEMBERS["x"])
    with pytest.raises(CheckpointError, match="nvlm_x was never published"):
        hf.export(random_weights(x), x, tmp_path / "x", layout="published")
