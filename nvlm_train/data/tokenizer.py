"""The tokenizer of a run: text to ids, and the control tokens the chat format needs.

Text of a data set is never trusted with control tokens: `encode` treats `<|im_end|>` inside a text as the ten ordinary
characters it is, so that a sample cannot close its own turn. Control tokens enter a stream only by id, from `chat`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvlm_train.errors import DataError
from nvlm_train.hub import local_folder

IM_START, IM_END, PAD, IMAGE_TOKEN = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_pad|>"
UNKNOWN = "<unk>"  # holds an image token's place in Yi's tokenizer, which has no <|vision_pad|>; no text encodes to it
BOS = "<|startoftext|>"  # Yi's
_CONTROL = (IM_START, IM_END, PAD, IMAGE_TOKEN, UNKNOWN, BOS)

# How Qwen2's tokenizer splits text before the byte-level BPE: contractions, words with one leading sign, single digits,
# punctuation with the newlines after it, newlines with the blanks before them, blanks. Read from its published
# tokenizer.json; needed where a folder holds only vocab.json and merges.txt.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ChatTokenizer:
    """A BPE with the control tokens of the chat format.

    im_start, im_end: ids around every turn. pad: id of padding. image_token: id that holds an image token's place.
    bos: id of Yi's first token, None in tokenizers without it.
    vocab_size: one more than the largest id.
    fingerprint: hash of the files it was read from; part of the index's key.
    """

    def __init__(self, tokenizer: Any, fingerprint: str, where: str) -> None:
        image_token = next((t for t in (IMAGE_TOKEN, UNKNOWN) if tokenizer.token_to_id(t) is not None), IMAGE_TOKEN)
        missing = [token for token in (IM_START, IM_END, PAD, image_token) if tokenizer.token_to_id(token) is None]
        if missing:
            raise DataError(
                f"{where}: the tokenizer lacks {', '.join(missing)}; the chat format needs {IM_START}, {IM_END}, {PAD} "
                f"and {IMAGE_TOKEN} (all Qwen2 tokenizers have them; {UNKNOWN} does for the last, as in Yi's)."
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # control tokens written in a text are ordinary characters
        self._tokenizer = tokenizer
        self.im_start: int = tokenizer.token_to_id(IM_START)
        self.im_end: int = tokenizer.token_to_id(IM_END)
        self.pad: int = tokenizer.token_to_id(PAD)
        self.image_token: int = tokenizer.token_to_id(image_token)
        self.bos: int | None = tokenizer.token_to_id(BOS)
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = fingerprint

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Lost in pickling (on the way to the loader process); without it a text could hold control tokens.
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no control token comes out of it, whatever it says."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text has; in parallel outside the GIL."""
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; control tokens are spelt out unless skipped."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """Reads a tokenizer folder: tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json (as Qwen2 ships).

    Raises DataError when the folder or a file is missing or unreadable, or when a control token is missing.
    """
    folder = local_folder(path)
    if not folder.is_dir():
        raise DataError(
            f"tokenizer.path: no folder {folder}; give a folder with tokenizer.json (or vocab.json, merges.txt)."
        )
    whole = folder / "tokenizer.json"
    files = [whole] if whole.is_file() else [folder / n for n in ("vocab.json", "merges.txt", "tokenizer_config.json")]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise DataError(
            f"{folder}: neither tokenizer.json nor {', '.join(absent)}; a tokenizer folder holds the one or the others."
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    try:
        tokenizer = _from_json(whole) if len(files) == 1 else _from_vocab_and_merges(*files)
    except DataError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(
            f"{folder}: not a readable tokenizer ({error}); expected Qwen2's byte-level BPE files."
        ) from error
    return ChatTokenizer(tokenizer, digest.hexdigest(), str(folder))


def _from_json(file: Path) -> Any:
    from tokenizers import Tokenizer

    spec = json.loads(file.read_text(encoding="utf-8"))
    for added in spec.get("added_tokens") or []:
        if added.get("content") in _CONTROL:
            added["special"] = True  # only special tokens are left alone by encode_special_tokens
    return Tokenizer.from_str(json.dumps(spec))


def _from_vocab_and_merges(vocab: Path, merges: Path, config: Path) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    listed = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
    for wanted, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        content = entry["content"]
        special = bool(entry.get("special")) or content in _CONTROL
        token = AddedToken(
            content,
            special=special,
            normalized=bool(entry.get("normalized")),
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
            single_word=bool(entry.get("single_word")),
        )
        if special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(content) != int(wanted):
            raise DataError(
                f"{config}: {content} should have id {wanted} but comes to {tokenizer.token_to_id(content)}; "
                f"{vocab.name} and {config.name} are not of one tokenizer."
            )
    return tokenizer
