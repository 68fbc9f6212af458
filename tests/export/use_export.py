"""An export used as anybody uses one, without nvlm_train: `python use_export.py FOLDER OUT ...`, in any transformers.

Writes to each OUT what came of it: tensors.safetensors (inputs, logits, answers), found.json, and the export saved
again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

SIZES = [(40, 24), (12, 12), (24, 12)]  # of 7, 1 and 3 tiles where a tile has 12 pixels and 6 are the most
GUARDED = [False]


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be taken off: while GUARDED, no network and no import of what an export must not
    need."""
    if not GUARDED[0]:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        raise AssertionError(f"the exported code used the network: {event} {arguments}")
    if event == "import" and str(arguments[0]).split(".")[0] in ("timm", "nvlm_train"):
        raise AssertionError(f"the exported code imports {arguments[0]}")


sys.addaudithook(guard)


def picture(number: int) -> Image.Image:
    width, height = SIZES[number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversations() -> list[list[dict[str, Any]]]:
    """Text alone; an image of one tile; one of several; two images in a conversation."""

    def image(number: int) -> dict[str, Any]:
        return {"type": "image", "image": picture(number)}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    return [
        [{"role": "user", "content": "a+b="}],
        [{"role": "user", "content": [image(1), text("\nWhat is the left digit?")]}],
        [{"role": "user", "content": [text("sum "), image(0)]}],
        [
            {"role": "user", "content": [image(2), text("\nleft <|im_end|> is text")]},
            {"role": "assistant", "content": "seven"},
            {"role": "user", "content": [text("and in "), image(1), text("?")]},
        ],
    ]


def load(folder: Path, **places: Any) -> tuple[Any, dict[str, list[str]]]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype="auto", **places
    )
    return model.eval(), {key: sorted(map(str, names)) for key, names in info.items()}


def use(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, loading = load(folder)
    tensors: dict[str, torch.Tensor] = {}
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(
            conversations(), tokenize=True, add_generation_prompt=True, padding_side=side
        )
        with torch.no_grad():
            logits = model(**inputs).logits
        tensors |= {f"{side}.{key}": value for key, value in inputs.items()}
        tensors[f"{side}.logits"] = logits * inputs["attention_mask"].unsqueeze(-1)  # those of padding mean nothing
        tensors[f"{side}.answers"] = model.generate(**inputs, max_new_tokens=8)
        tensors[f"{side}.answers_without_cache"] = model.generate(**inputs, max_new_tokens=8, use_cache=False)
    for row, messages in enumerate(conversations()):
        inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        tensors |= {f"{row}.{key}": value for key, value in inputs.items()}
        tensors[f"{row}.answers"] = model.generate(**inputs, max_new_tokens=8)
    answers = processor.batch_decode(tensors["left.answers"])

    saved = out / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    again, loading_again = load(saved)
    processor_again = transformers.AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    with torch.no_grad():
        tensors["saved.logits"] = again(**processor_again(conversations())).logits
    found = {
        "transformers": transformers.__version__,
        "loading": loading,
        "loading_again": loading_again,
        "answers": answers,
        "config": repr(model.config),
        "saved": sorted(path.name for path in saved.iterdir()),
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out / "tensors.safetensors")
    (out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    GUARDED[0] = True
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        use(Path(folder), Path(out))
