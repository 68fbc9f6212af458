"""Answers of an export and of a plain Qwen2 folder."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nvlm_train.data.images import ImageOptions
from nvlm_train.errors import CheckpointError, DataError
from nvlm_train.infer.generate import Answerer, answer, generate_command, load_answerer


@pytest.fixture
def image(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def arguments(out: Path, **changes: Any) -> Namespace:
    return Namespace(
        **({"out": str(out), "image": [], "prompt": "What?", "max_new_tokens": 20, "json": False} | changes)
    )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_answers_with_and_without_images(
    folders: dict[str, Path], image: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_command(arguments(folders["nvlm"], image=[str(image)] * count)) == 0
    assert capsys.readouterr().out == "left digit\n"


def test_json_answer_says_whether_it_ended(
    folders: dict[str, Path], image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_command(arguments(folders["nvlm"], image=[str(image)], json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["answer"] == "left digit" and report["ended"] is True and report["images"] == [str(image)]
    generate_command(arguments(folders["nvlm"], max_new_tokens=1, json=True))
    assert json.loads(capsys.readouterr().out)["ended"] is False


def test_a_batch_of_unlike_prompts(folders: dict[str, Path], image: Path) -> None:
    answerer = load_answerer(folders["nvlm"])
    with Image.open(image) as opened:
        found = answer(answerer, ["a", "a longer question?", "<image>?"], [[], [opened], [opened]], 20)
    assert found == [("left digit", True)] * 3


def test_plain_qwen2_answers_text_and_refuses_images(
    folders: dict[str, Path], image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_command(arguments(folders["qwen2"])) == 0
    assert capsys.readouterr().out == "left digit\n"
    with pytest.raises(DataError, match="text-only"):
        generate_command(arguments(folders["qwen2"], image=[str(image)]))


def test_plain_qwen2_with_a_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen2"], tmp_path / "qwen2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    settings |= {"chat_template": template + "{{ '<|im_start|>assistant\n' }}", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    answerer = load_answerer(folder)
    conversation = [{"role": "user", "content": [{"type": "text", "text": "and a longer one?"}]}]
    assert answer(answerer, ["a", conversation], [[], []], 20) == [("left digit", True)] * 2


def test_bad_input(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        generate_command(arguments(folders["nvlm"], image=[str(tmp_path / "none.png")]))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    with pytest.raises(DataError, match=r"cut\.png cannot be"):
        generate_command(arguments(folders["nvlm"], image=[str(tmp_path / "cut.png")]))
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        generate_command(arguments(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        generate_command(arguments(tmp_path))


@pytest.mark.parametrize("with_template", [False, True])
def test_a_plain_folder_answers_a_batch_as_it_answers_one(
    folders: dict[str, Path], tmp_path: Path, with_template: bool
) -> None:
    """Prompts of different lengths are padded on the left: on the right the short ones would answer after padding."""
    folder = shutil.copytree(folders["qwen2"], tmp_path / "qwen2")
    generator = torch.Generator().manual_seed(5)  # weights that look at the prompt, unlike those of `folders`
    state = load_file(folder / "model.safetensors")
    noise = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    save_file(noise, folder / "model.safetensors", metadata={"format": "pt"})
    if with_template:
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_start|>"
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    answerer = load_answerer(folder)
    assert (answerer.tokenizer.chat_template is not None) == with_template
    prompts = ["a", "what is a b c d e f g?", "word and word"]
    batch = answer(answerer, prompts, [[], [], []], 6)
    assert batch == [answer(answerer, [prompt], [[]], 6)[0] for prompt in prompts]
    assert len(set(batch)) > 1


def test_a_mark_without_an_image_is_told_without_a_traceback(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"the prompt cannot be used: .* marks 1 images, but 0 are given"):
        generate_command(arguments(folders["nvlm"], prompt="what is <image>"))


def test_images_are_opened_as_in_training() -> None:
    settings = {"exif": "apply", "alpha": "white", "tile_size": 12}
    answerer = Answerer(None, SimpleNamespace(settings=settings), has_vision=True)
    assert answerer.images == ImageOptions("apply", "white", "clip")
    assert Answerer(None, SimpleNamespace(), has_vision=False).images == ImageOptions()
