"""Questions for sources that bring none, and how a question, its options and hints are put together.

Which variant a sample gets follows from the hash of its content alone: the same on every rank, in every epoch and
after every restart, so that the length index holds. The kinds follow the prompt file of the released code; the words
are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

CAPTION = (
    "Write a caption for this image.",
    "What does this image show? Reply with a caption.",
    "Describe the picture in a sentence or two.",
    "Give a short description of what can be seen here.",
    "Caption the image above.",
    "Put into words what is in this picture.",
)
VQA = (
    "{question}\nReply with a single word or a short phrase.",
    "{question}\nKeep the answer to a word or a few words.",
    "Question: {question}\nShort answer:",
    "{question}\nAnswer as briefly as possible.",
)
OCR = (
    "Read out all text in this image.",
    "Which text does the image contain? Write it down as it stands.",
    "Copy every word that is visible in the picture.",
    "Transcribe the writing in this image.",
    "List the text in the image in reading order.",
)
DOCUMENT = (
    "Transcribe this document.",
    "Turn this page into plain text, keeping the order in which it is read.",
    "Write out the full text of the scanned page.",
    "Type up the contents of this document from top to bottom.",
)
MULTIPLE_CHOICE = (
    "{question}\n{options}\nReply with the letter of the right option only.",
    "{question}\n{options}\nWhich option is right? Give just its letter.",
    "{question}\nOptions:\n{options}\nAnswer with one letter.",
)

# Asked of an image alone; `vqa` and `multiple_choice` need a question and only say how to answer it.
ALONE: dict[str, Sequence[str]] = {"caption": CAPTION, "ocr": OCR, "document": DOCUMENT}

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choose(count: int, seed: int, purpose: str) -> int:
    """A number below `count`, fixed by the sample's hash `seed` and what it is for."""
    digest = hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def ask(preset: str, seed: int) -> str:
    """The request for a sample without a question: one of the preset's variants."""
    variants = ALONE[preset]
    return variants[choose(len(variants), seed, "prompt")]


def with_hint(question: str, seed: int) -> str:
    """A question with one of the wordings that ask for a short answer."""
    return VQA[choose(len(VQA), seed, "prompt")].replace("{question}", question)


def with_options(question: str, options: Sequence[str], seed: int) -> str:
    """A question followed by its lettered options and one of the wordings that ask for a letter.

    Example of options: ["red", "blue"] become "A. red" and "B. blue", a line each.
    """
    lines = "\n".join(f"{LETTERS[k]}. {option}" for k, option in enumerate(options))
    template = MULTIPLE_CHOICE[choose(len(MULTIPLE_CHOICE), seed, "prompt")]
    head, tail = template.split("{question}")
    return head + question + tail.replace("{options}", lines)
