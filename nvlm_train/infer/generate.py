"""Answers from an exported folder, or a run, through transformers and the exported code, as any user would get them.

A plain Qwen2 folder (a text-only model) answers too; it is what the decoder could do before it learned to see.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.data.images import ImageOptions
from nvlm_train.errors import CheckpointError, DataError
from nvlm_train.export.hf import export, load_exported
from nvlm_train.export.licence import unjudged
from nvlm_train.log import get_logger

log = get_logger(__name__)

STOP = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Answerer:
    """A loaded model with what turns questions into its inputs.

    processor: the folder's, or for a plain Qwen2 one that only knows text. has_vision: whether images are allowed.
    """

    model: Any
    processor: Any
    has_vision: bool

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return self.processor.tokenizer

    @property
    def images(self) -> ImageOptions:
        """How training made RGB of an image file."""
        settings = self.processor.settings if self.has_vision else {}
        return ImageOptions(**{key: settings[key] for key in ImageOptions._fields if key in settings})


def load_answerer(folder: str | Path) -> Answerer:
    """Loads an export, a run or a plain Qwen2 folder: on a GPU as stored; without one on the CPU in fp32 (bf16 is slow
    there). Of a run, RUN or RUN/step_N, an export is made for the time of loading, so that both answer alike.

    CheckpointError when the folder is none of them.
    """
    folder = Path(folder)
    import torch

    from nvlm_train.checkpoint import is_run, open_checkpoint

    if is_run(folder):
        run = open_checkpoint(folder)
        about: dict[str, Any] = {"step": run.step, "licences": unjudged(run.recipe)}  # nobody keeps it
        with tempfile.TemporaryDirectory() as parent:
            log.info("exporting step %d of %s for the time of loading", run.step, folder)
            return load_answerer(export(run, run.recipe, Path(parent) / folder.name, **about))

    on_gpu = torch.cuda.is_available()
    model = load_exported(folder, None if on_gpu else "fp32").to("cuda" if on_gpu else "cpu")
    import transformers

    try:
        if (folder / "processor_config.json").is_file():
            processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            return Answerer(model, processor, has_vision=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever is wrong in the folder, transformers raises its own for it
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    if any(tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id) for token in STOP[:1]):
        raise CheckpointError(f"{folder}: its tokenizer has no {STOP[0]}; right would be a Qwen2 tokenizer")
    return Answerer(model, _TextProcessor(tokenizer), has_vision=False)


class _TextProcessor:
    """For a plain Qwen2 folder: its chat template, or ChatML where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        from nvlm_train.export.remote_code.processing_nvlm import NVLM_Processor

        self.tokenizer = tokenizer
        self.tokenizer.pad_token = self.tokenizer.pad_token or STOP[1]
        self.tokenizer.padding_side = "left"  # as an argument of apply_chat_template it is ignored by transformers 5
        settings = {"image_token": "<|vision_pad|>", "prompt_template": "nvlm_qwen2", "system": None}
        self._chatml = NVLM_Processor(tokenizer, settings)

    def __call__(self, prompts: list[Any], images: Any = None) -> Any:
        if self.tokenizer.chat_template is None:
            return self._chatml(prompts)
        messages = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [_as_text(m) for m in prompt]
            for prompt in prompts
        ]
        return self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )

    def decode(self, ids: Any) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _as_text(message: dict[str, Any]) -> dict[str, str]:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": message["role"], "content": text}


def answer(
    answerer: Answerer, prompts: list[Any], images: list[list[Any]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy answers to a batch: (text, whether it ended by itself within max_new_tokens).

    prompts: a question or a conversation each, as the processor takes them. images: PIL images of each prompt.
    """
    import torch

    if not answerer.has_vision and any(images):
        raise DataError(
            "this model is text-only (a plain Qwen2 folder), but images were given; use an export or a run of ours"
        )
    device = answerer.model.device
    try:
        inputs = answerer.processor(prompts, images=images if answerer.has_vision else None)
    except ValueError as error:  # marks and images that do not match, a role it does not know
        raise DataError(
            f"the prompt cannot be used: {error}; give one image for each <image> mark, or no mark"
        ) from None
    inputs = {key: value.to(device) for key, value in inputs.items()}
    stop = [answerer.tokenizer.convert_tokens_to_ids(token) for token in STOP]
    with torch.no_grad():
        tokens = answerer.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop[1]
        )
    if not answerer.has_vision:  # a plain model repeats the prompt
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(tokens, torch.tensor(stop, device=tokens.device)).any(dim=1).tolist()
    return [(answerer.processor.decode(row), done) for row, done in zip(tokens.tolist(), ended, strict=True)]


def generate_command(args: Namespace) -> int:
    """`nvlm-train generate OUT [--image a.png ...] --prompt TEXT`: the greedy answer on stdout."""
    from nvlm_train.data.images import open_image

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    paths = list(getattr(args, "image", None) or [])
    for path in paths:  # before the model: a wrong path shows at once
        open_image(path)
    answerer = load_answerer(args.out)
    images = [open_image(path, options=answerer.images) for path in paths]
    started = time.monotonic()
    [(text, ended)] = answer(answerer, [args.prompt], [images], getattr(args, "max_new_tokens", None) or 128)
    seconds = time.monotonic() - started
    if getattr(args, "json", False):
        report = {"prompt": args.prompt, "images": paths, "answer": text, "ended": ended, "seconds": round(seconds, 3)}
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(text)
    return 0
