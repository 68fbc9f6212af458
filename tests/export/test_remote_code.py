"""The code that travels with an export, through transformers, against our model and our data pipeline."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm_train.batch import IGNORE_INDEX
from nvlm_train.data import chat, images, tiling
from nvlm_train.data.tokenizer import load_tokenizer
from nvlm_train.export import hf, verify
from nvlm_train.model.key_map import model_from_recipe
from nvlm_train.model.nvlm import NvlmD
from nvlm_train.model.pretrained import load_into
from nvlm_train.recipe.schema import Tiling
from tiny_nvlm import MemoryWeights, make_recipe, random_weights

CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"image": 0}, {"text": "\nWhat is the left digit? <|im_end|> is text"}]},
    {"role": "assistant", "content": [{"text": "\nseven"}]},
    {"role": "user", "content": [{"text": "and in "}, {"image": 1}, {"text": "?"}]},
]
CONVERSATION_TEXT = "left <image> and <image>?"


def as_hf(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": part["text"]} if "text" in part else {"type": "image"}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def ours(recipe: dict[str, Any], weights: MemoryWeights) -> NvlmD:
    model = NvlmD(model_from_recipe(recipe)).eval()
    load_into(model, weights, model.config, seed=0)
    return model


@pytest.fixture(scope="module")
def processor(exported: Path) -> Any:
    import transformers

    return transformers.AutoProcessor.from_pretrained(exported, trust_remote_code=True)


# ---------------------------------------------------------------------------------------------------------- processing


@pytest.mark.parametrize("template", ["nvlm_qwen2", "hf_nvlm"])
@pytest.mark.parametrize("system", [None, "", "Be brief."])
@pytest.mark.parametrize(("thumbnail", "tags"), [(True, "one_d"), (False, "one_d"), (True, "none")])
def test_prompts_equal_the_training_stream_token_for_token(
    tokenizer_folder: Path, template: str, system: str | None, thumbnail: bool, tags: str, tmp_path: Path
) -> None:
    changes = {"tokenizer.template": template, "tokenizer.system": system,
               "data.tiling": {"max_tiles": 6, "thumbnail": thumbnail, "tags": tags}}  # fmt: skip
    recipe = make_recipe(tokenizer_folder, **changes)
    hf._write_tokenizer(tokenizer_folder, tmp_path, recipe)
    same_prompts(recipe, tokenizer_folder, tmp_path)


def same_prompts(recipe: dict[str, Any], folder: Path, hf_folder: Path) -> None:
    import transformers

    from nvlm_train.export.remote_code.processing_nvlm import NVLM_Processor

    settings = hf.processor_config(model_from_recipe(recipe), recipe)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_folder)
    processor = NVLM_Processor(tokenizer, settings)
    tiles = Tiling.model_validate(recipe["data"]["tiling"])
    for messages, counts in [
        (CONVERSATION, [3, 1]),
        (CONVERSATION, [1, 5]),
        (CONVERSATION[:1], [7]),
        ([{"role": "user", "content": [{"text": "  a+b=\n"}]}], []),
        ([{"role": "system", "content": [{"text": "Own."}]}, {"role": "user", "content": [{"text": "hi"}]}], []),
    ]:
        expected = chat.render_prompt(
            messages, counts, load_tokenizer(folder), recipe["tokenizer"]["template"], tiles,
            settings["image_tokens_per_tile"], recipe["tokenizer"]["system"],
        )  # fmt: skip
        assert processor.encode_prompt(as_hf(messages), counts) == expected.input_ids.tolist()


@pytest.mark.parametrize("template", ["nvlm_qwen2", "hf_nvlm"])
def test_prompts_equal_the_training_stream_with_qwens_tokenizer(template: str, tmp_path: Path) -> None:
    fixtures = os.environ.get("NVLM_FIXTURES")
    if not fixtures:
        pytest.skip("NVLM_FIXTURES is not set: Qwen2's tokenizer is not at hand")
    folder = Path(fixtures) / "qwen2-tokenizer"
    recipe = make_recipe(folder, **{"tokenizer.template": template, "model.language_model.vocab_size": 151936})
    hf._write_tokenizer(folder, tmp_path, recipe)  # as an export would hold it
    assert hf.special_token_ids(folder, 151936)["image"] == 151654
    same_prompts(recipe, folder, tmp_path)


def test_system_texts_of_the_templates_are_those_of_training() -> None:
    assert {name: template.system for name, template in chat.TEMPLATES.items()} == hf.TEMPLATE_SYSTEM


@pytest.mark.parametrize("template", ["nvlm_qwen2", "hf_nvlm"])
@pytest.mark.parametrize("system", [None, "", 'It\'s "fine"\n\u00e9.'])
def test_chat_template_equals_the_training_stream_for_text(
    tokenizer_folder: Path, tmp_path: Path, template: str, system: str | None
) -> None:
    import transformers

    recipe = make_recipe(tokenizer_folder, **{"tokenizer.template": template, "tokenizer.system": system})
    hf._write_tokenizer(tokenizer_folder, tmp_path, recipe)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own_system = {"role": "system", "content": [{"text": "Own."}]}
    question = {"role": "user", "content": [{"text": "left?"}]}
    done = {"role": "assistant", "content": [{"text": "7"}]}
    for messages in ([question], [own_system, question], [question, done, question]):
        found = tokenizer.apply_chat_template(as_hf(messages), add_generation_prompt=True, return_dict=False)
        rendered = chat.render_prompt(messages, [], load_tokenizer(tokenizer_folder), template, Tiling(), 4, system)
        assert found == rendered.input_ids.tolist()


def test_tiles_equal_the_training_pipelines_on_many_sizes(processor: Any) -> None:
    from nvlm_train.export.remote_code import processing_nvlm as remote

    sizes = random.Random(0)
    for _ in range(500):
        width, height, most = sizes.randint(1, 3000), sizes.randint(1, 3000), sizes.choice([1, 2, 4, 6, 12])
        assert remote.choose_grid(width, height, most, 448) == tiling.choose_grid(width, height, most, 448)
    for edge in (633, 634, 640, 896):  # ties
        assert remote.choose_grid(edge, edge, 6, 448) == tiling.choose_grid(edge, edge, 6, 448)
    for number, (width, height) in enumerate([(12, 12), (40, 24), (24, 40), (61, 7), (5, 5)]):
        image = picture(width, height, number)
        for thumbnail in (True, False):
            theirs = remote.cut_tiles(image, 6, 12, thumbnail)
            assert np.array_equal(theirs, tiling.cut(image, 6, 12, thumbnail))
        assert np.array_equal(
            remote.cut_tiles(image, 6, 12, True, fast=True), tiling.cut(image, 6, 12, True, fast=True)
        )
    pixels = processor("?", images=[picture(40, 24)])["pixel_values"]
    assert torch.equal(pixels, verify._normalised(torch.from_numpy(tiling.cut(picture(40, 24), 6, 12, True))))


def test_tiles_are_shared_over_the_images_of_a_prompt_as_in_training() -> None:
    from nvlm_train.export.remote_code import processing_nvlm as remote

    draw = random.Random(4)
    lowered = 0
    for _ in range(200):
        sizes = [(draw.randint(1, 90), draw.randint(1, 90)) for _ in range(draw.randint(1, 5))]
        budget, thumbnail = draw.choice([None, *range(1, 30)]), draw.random() < 0.5
        settings = {"max_tiles": 6, "tile_size": 12, "thumbnail": thumbnail, "max_tiles_per_sample": budget}
        ours = tiling.shared_limit(sizes, 6, budget, 12, thumbnail)
        theirs = remote.shared_max_tiles([Image.new("RGB", size) for size in sizes], settings)
        assert theirs == max(ours, 1)  # in training 0 means that the sample is left out
        lowered += theirs < 6
    assert lowered > 20


def test_images_without_a_mark_come_first_and_wrong_counts_are_refused(processor: Any) -> None:
    plain = processor("What?", images=[picture(12, 12), picture(24, 12)])
    marked = processor("<image>\n<image>\nWhat?", images=[picture(12, 12), picture(24, 12)])
    assert torch.equal(plain["input_ids"], marked["input_ids"])
    assert int((plain["input_ids"] == processor.image_token_id).sum()) == 4 * len(plain["pixel_values"]) == 16
    with pytest.raises(ValueError, match="marks 2 images, but 1"):
        processor("<image> <image>", images=[picture(12, 12)])
    with pytest.raises(ValueError, match="2 prompts, but images holds 1"):
        processor(["a", "b"], images=[picture(12, 12)])


def test_files_become_rgb_as_in_training(recipe: dict[str, Any], processor: Any, tmp_path: Path) -> None:
    """Turning marks, transparency, 16-bit greys and the resizing that the recipe says, from files and PIL images."""
    draw = np.random.default_rng(5)
    marks = Image.Exif()
    marks[0x0112] = 6  # a quarter turn
    rgba = Image.fromarray(draw.integers(0, 256, (24, 40, 4), dtype=np.uint8))
    deep = Image.fromarray(draw.integers(0, 65536, (24, 40), dtype=np.uint16))
    files = {"turned.jpg": picture(40, 24), "clear.png": rgba, "deep.png": deep, "palette.gif": picture(24, 40)}
    for name, image in files.items():
        image.save(tmp_path / name, **({"exif": marks} if name == "turned.jpg" else {}))
    seen = set()
    for data in (
        {}, {"exif": "apply"}, {"alpha": "white"}, {"sixteen_bit": "scale"}, {"decode": "fast"},
        {"exif": "apply", "alpha": "white", "sixteen_bit": "scale", "decode": "fast"},
    ):  # fmt: skip
        changed = {**recipe, "data": {**recipe["data"], **data}}
        remote = type(processor)(processor.tokenizer, hf.processor_config(model_from_recipe(recipe), changed))
        options = images.ImageOptions(**{key: value for key, value in data.items() if key != "decode"})
        for name in files:
            opened = images.open_image(tmp_path / name, options=options)
            expected = verify._normalised(
                torch.from_numpy(tiling.cut(opened, 6, 12, True, fast=data.get("decode") == "fast"))
            )
            with Image.open(tmp_path / name) as stored:
                for given in (tmp_path / name, str(tmp_path / name), stored, opened):
                    assert torch.equal(remote("?", images=given)["pixel_values"], expected), (name, data)
            seen.add((name, expected.numpy().tobytes()))
    assert len(seen) == 4 + 4 + 3 + 2  # its own option and decode change each; the clipped grey is white either way


def test_any_images_in_any_batch_are_laid_out_as_in_training(
    recipe: dict[str, Any], processor: Any, tokenizer_folder: Path
) -> None:
    """Random sizes, none to three images a row, brought by the messages or given beside them, both paddings."""
    draw = random.Random(1)
    words = load_tokenizer(tokenizer_folder)
    tiles = Tiling.model_validate(recipe["data"]["tiling"])
    for number in range(12):
        rows, expected, pixels = [], [], []
        for row in range(draw.randint(1, 4)):
            chosen = [
                picture(draw.randint(1, 90), draw.randint(1, 90), number + row) for _ in range(draw.randint(0, 3))
            ]
            parts: list[dict[str, Any]] = [{"image": k} for k in range(len(chosen))]
            for text in ("What", " <|im_end|> in", "\n?"):
                parts.insert(draw.randint(0, len(parts)), {"text": text})
            messages = [{"role": "user", "content": parts}]
            if draw.random() < 0.3:
                messages += [{"role": "assistant", "content": [{"text": "seven"}]}]
                messages += [{"role": "user", "content": [{"text": "sum"}]}]
            cut = [tiling.cut(image, 6, 12, True) for image in chosen]
            rendered = chat.render_prompt(
                messages, [len(part) for part in cut], words, recipe["tokenizer"]["template"], tiles, 4,
                recipe["tokenizer"]["system"],
            )  # fmt: skip
            pixels += cut
            expected.append(rendered.input_ids.tolist())
            rows.append((as_hf(messages), chosen))
        brought = [with_images(messages, chosen) for messages, chosen in rows]
        batches = {
            side: processor.apply_chat_template(brought, tokenize=True, add_generation_prompt=True, padding_side=side)
            for side in ("left", "right")
        }
        beside = processor([messages for messages, _ in rows], images=[chosen for _, chosen in rows])
        assert all(torch.equal(beside[key], value) for key, value in batches["left"].items())
        longest = max(map(len, expected))
        for row, ids in enumerate(expected):
            fill = [processor.tokenizer.pad_token_id] * (longest - len(ids))
            mask = [0] * len(fill)
            assert batches["left"]["input_ids"][row].tolist() == fill + ids
            assert batches["right"]["input_ids"][row].tolist() == ids + fill
            assert batches["left"]["attention_mask"][row].tolist() == mask + [1] * len(ids)
            assert batches["right"]["attention_mask"][row].tolist() == [1] * len(ids) + mask
        for batch in batches.values():
            assert ("pixel_values" in batch) == bool(pixels)
            if pixels:
                assert torch.equal(batch["pixel_values"], verify._normalised(torch.from_numpy(np.concatenate(pixels))))


def with_images(messages: list[dict[str, Any]], chosen: list[Image.Image]) -> list[dict[str, Any]]:
    left = iter(chosen)
    return [
        {**m, "content": [{**p, "image": next(left)} if p["type"] == "image" else p for p in m["content"]]}
        for m in messages
    ]


def test_a_whole_conversation_is_the_training_sample(
    processor: Any, recipe: dict[str, Any], tokenizer_folder: Path
) -> None:
    found = processor.apply_chat_template(
        with_images(as_hf(CONVERSATION[:2]), [picture(40, 24)]), tokenize=True, add_generation_prompt=False
    )
    sample = chat.render(
        CONVERSATION[:2], [7], load_tokenizer(tokenizer_folder), recipe["tokenizer"]["template"],
        Tiling.model_validate(recipe["data"]["tiling"]), 4, recipe["tokenizer"]["system"],
    )  # fmt: skip
    assert found["input_ids"][0].tolist() == sample.input_ids.tolist()


def test_what_a_processor_cannot_use_is_named(processor: Any, tmp_path: Path) -> None:
    def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(parts)}]

    own = {"type": "image", "image": picture(12, 12)}
    rendered = processor.apply_chat_template(user(own), add_generation_prompt=True)
    assert rendered == "<|im_start|>system\nAnswer the questions.<|im_end|>\n<|im_start|>user\n<image><|im_end|>\n" \
        "<|im_start|>assistant\n"  # fmt: skip
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for prompt, given, message in [
        (rendered, [picture(12, 12)], "was rendered to text"),
        (user({"type": "video"}), None, "type 'video'; known are 'text' and 'image'"),
        (user(own, {"type": "image"}), None, "marks 2 images and brings 1 of them, but 0 are given besides"),
        (user(own), [picture(12, 12)], "brings 1 of them, but 1 are given besides"),
        (user({"type": "image", "url": "https://example.com/a.png"}), None, "nothing is fetched here"),
        ("?", [3], "an image is a int"),
        ("?", [tmp_path / "a.eps"], "is EPS, which is not decoded"),
        ([], None, "no prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(prompt, images=given)
    with pytest.raises(ValueError, match="padding_side 'up'"):
        processor("?", padding_side="up")
    with pytest.raises(ValueError, match="return_tensors='pt'"):
        processor.apply_chat_template(user(own), tokenize=True, return_tensors="np")


def test_a_processor_saved_alone_is_loaded_again(processor: Any, tmp_path: Path) -> None:
    import transformers

    processor.save_pretrained(tmp_path / "new" / "folder")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "new" / "folder", trust_remote_code=True)
    assert again.settings == processor.settings and again.chat_template == processor.chat_template
    again.save_pretrained(tmp_path / "new" / "folder")  # onto itself
    inputs = [p(CONVERSATION_TEXT, images=[picture(40, 24), picture(12, 12)]) for p in (processor, again)]
    assert inputs[0].keys() == inputs[1].keys() and all(torch.equal(inputs[0][k], inputs[1][k]) for k in inputs[0])
    assert again.batch_decode([[again.image_token_id], again.tokenizer("seven")["input_ids"]]) == ["", "seven"]


# ---------------------------------------------------------------------------------------------------------------- model


def greedy(
    model: NvlmD, ids: list[int], tiles: torch.Tensor, image_token: int, stop: set[int], steps: int
) -> list[int]:
    new: list[int] = []
    while len(new) < steps and not (new and new[-1] in stop):
        batch = verify.as_batch(verify.Prompt(torch.tensor(ids + new), tiles), model.config, image_token)
        with torch.no_grad():
            new.append(int(model.logits(batch)[0, -1].argmax()))
    return new


def cases() -> list[tuple[Any, list[Image.Image]]]:
    return [
        ("a+b=", []),
        ("What is the left digit?", [picture(12, 12, 1)]),
        ("sum", [picture(40, 24, 2)]),
        ("rev <image> and <image>?", [picture(24, 12, 3), picture(12, 12, 4)]),
    ]


def test_generation_equals_greedy_on_our_model_single_and_batched(loaded: Any, processor: Any, ours: NvlmD) -> None:
    eos = set(loaded.generation_config.eos_token_id)
    prompts, images = [p for p, _ in cases()], [i for _, i in cases()]
    batch = processor(prompts, images=images)
    together = loaded.generate(**batch, max_new_tokens=12)
    right = {}  # the same rows padded on the right
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    for key in ("input_ids", "attention_mask"):
        right[key] = batch[key].gather(1, order)
    assert torch.equal(loaded.generate(**right, pixel_values=batch["pixel_values"], max_new_tokens=12), together)
    different = set()
    for row, (prompt, own) in enumerate(cases()):
        inputs = processor(prompt, images=own)
        alone = loaded.generate(**inputs, max_new_tokens=12)[0].tolist()
        tiles = [torch.from_numpy(tiling.cut(image, 6, 12, True)) for image in own]
        stacked = torch.cat(tiles) if tiles else torch.zeros(0, 3, 12, 12, dtype=torch.uint8)
        expected = greedy(ours, inputs["input_ids"][0].tolist(), stacked, processor.image_token_id, eos, 12)
        assert alone[: len(expected)] == expected
        assert together[row].tolist()[: len(expected)] == expected
        different.add(tuple(expected))
    assert len(different) == len(cases())  # the images and prompts do matter


def test_loss_equals_ours(loaded: Any, ours: NvlmD, processor: Any) -> None:
    inputs = processor("sum", images=[picture(40, 24, 2)])
    ids = inputs["input_ids"]
    labels = torch.where(ids == processor.image_token_id, IGNORE_INDEX, ids)
    with torch.no_grad():
        theirs = loaded(**inputs, labels=labels).loss
        tiles = torch.from_numpy(tiling.cut(picture(40, 24, 2), 6, 12, True))
        batch = verify.as_batch(verify.Prompt(ids[0], tiles), ours.config, processor.image_token_id)
        shifted = torch.full_like(labels, IGNORE_INDEX)
        shifted[:, :-1] = labels[:, 1:]
        count = int((shifted != IGNORE_INDEX).sum())
        loss = ours(type(batch)(**{**vars(batch), "labels": shifted, "num_trained_tokens": count})) / count
    torch.testing.assert_close(theirs, loss, rtol=2e-6, atol=0)  # worst case 2e-7


def test_wrong_number_of_tiles_is_an_error(loaded: Any, processor: Any) -> None:
    inputs = processor("sum", images=[picture(12, 12)])
    with pytest.raises(ValueError, match="but no pixel_values"):
        loaded(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="4 image tokens in input_ids, but pixel_values holds 2 tiles of 4 tokens"):
        loaded(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


def test_a_tile_flagged_as_filler_is_left_out(loaded: Any, processor: Any) -> None:
    inputs = processor("sum", images=[picture(12, 12)])
    filled = torch.cat([torch.zeros(1, 3, 12, 12), inputs["pixel_values"]])
    with torch.no_grad():
        flagged = loaded(filled, inputs["input_ids"], image_flags=torch.tensor([0, 1])).logits
        alone = loaded(inputs["pixel_values"], inputs["input_ids"]).logits
    # not bit for bit: the copy lies elsewhere in memory, and kernels sum by alignment; worst case 7e-7
    torch.testing.assert_close(flagged, alone, rtol=0, atol=1e-5)


def test_dummy_heads_are_ignored_whatever_they_hold(loaded: Any, processor: Any) -> None:
    inputs = processor("sum", images=[picture(12, 12)])
    attention = loaded.vision_model.encoder.layers[0].attn
    kept = {name: parameter.detach().clone() for name, parameter in attention.named_parameters()}
    with torch.no_grad():
        before = loaded(**inputs).logits
        try:
            attention.qkv.weight.view(3, 48, 20)[:, 20:] = 3.0
            attention.q_norm.weight[20:] = 2.0
            attention.proj.weight[:, 20:] = 1.0
            assert torch.equal(loaded(**inputs).logits, before)
        finally:
            for name, parameter in attention.named_parameters():
                parameter.copy_(kept[name])


def test_save_and_load_again(loaded: Any, processor: Any, tmp_path: Path) -> None:
    import json

    import transformers

    loaded.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = hf.load_exported(tmp_path / "again")
    inputs = processor("sum", images=[picture(40, 24)])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, loaded(**inputs).logits)
    assert again.generation_config.eos_token_id == loaded.generation_config.eos_token_id
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["NVLM_D"] and config["llm_config"]["rope_theta"] == 5000.0
    assert "rope_parameters" not in config["llm_config"] and config["torch_dtype"] == "float32"
    assert config["llm_config"]["model_type"] == "qwen2" and config["llm_config"].get("rope_scaling") is None
    assert "tiny/" not in (tmp_path / "again" / "config.json").read_text()  # no path of where it was
    reread = transformers.AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert json.loads(json.dumps(reread.to_dict())) == config


def test_every_way_in_gives_the_same_model(exported: Path, loaded: Any, processor: Any) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    assert type(model).__name__ == "NVLM_D_Model" and model.dtype == torch.float32
    eager = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True, attn_implementation="eager").eval()
    assert eager.language_model.config._attn_implementation == "eager"
    inputs = processor(["sum", "a+b="], images=[picture(12, 12), None])
    with torch.no_grad():
        expected = loaded(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(eager(**inputs).logits[real], expected[real], rtol=0, atol=2e-5)  # worst case 1e-6


def test_configuration_without_arguments_and_printing(loaded: Any) -> None:
    config = type(loaded.config)()
    assert config.vision_config.num_attention_heads == 25 and config.get_text_config() is config.llm_config
    assert "NVLM_D" in repr(config) and "NVLM_D" in repr(loaded.config)


def test_remote_code_imports_nothing_of_ours_and_nothing_heavy() -> None:
    import ast

    allowed = {"__future__", "json", "os", "shutil", "pathlib", "typing", "numpy", "torch", "PIL", "transformers"}
    own = {"configuration_nvlm_d", "configuration_nvlm_xh", "modeling_nvlm_d"}
    for name in hf.REMOTE_CODE:
        tree = ast.parse((Path(hf.__file__).with_name("remote_code") / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert (node.level == 1 and node.module in own) or (
                    node.level == 0 and str(node.module).split(".")[0] in allowed
                )
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names)


def test_training_from_the_export_reaches_every_real_weight(loaded: Any, processor: Any) -> None:
    loaded.train()
    inputs = processor("sum", images=[picture(40, 24)])
    loaded(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [name for name, parameter in loaded.named_parameters() if parameter.grad is None]
    loaded.zero_grad(set_to_none=True)
    loaded.eval()
    assert without == []


def test_tied_model_stays_tied(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = make_recipe(tokenizer_folder, **{"model.language_model.tie_word_embeddings": True})
    out = hf.export(random_weights(recipe, seed=5), recipe, tmp_path / "out")
    model = hf.load_exported(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "again")
    again = hf.load_exported(tmp_path / "again")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
