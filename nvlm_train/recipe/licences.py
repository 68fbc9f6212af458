"""Names of licences as recipes, cards and exports write them."""

from __future__ import annotations

import re
from typing import NamedTuple

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

UNKNOWN, OWN = "unknown", "own"


class Named(NamedTuple):
    """A licence without an SPDX identifier.

    link: its text. notice: a line that its terms ask to keep. copy: they ask to pass on the text itself.
    """

    link: str | None = None
    notice: str | None = None
    research: bool = False
    copy: bool = False


_QWEN = "https://huggingface.co/Qwen/"
NAMED = {
    "tongyi-qianwen": Named(
        _QWEN + "Qwen2-72B-Instruct/blob/main/LICENSE",
        "Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All "
        "Rights Reserved.",
        copy=True,
    ),
    "qwen": Named(_QWEN + "Qwen2.5-72B-Instruct/blob/main/LICENSE"),
    "qwen-research": Named(_QWEN + "Qwen2.5-3B-Instruct/blob/main/LICENSE", research=True),
    **dict.fromkeys(("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma"), Named()),
    **dict.fromkeys(("openrail", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m"), Named()),
    **dict.fromkeys(("fair-noncommercial-research-license", "research-only"), Named(research=True)),
}


def canonical(name: str) -> str | None:
    """A licence as it is written properly: `apache-2.0` is Apache-2.0, `Tongyi Qianwen` tongyi-qianwen. None: no SPDX
    identifier or expression, no LicenseRef-NAME, and none of `NAMED`, unknown and own."""
    plain = name.strip().lower().replace(" ", "-").replace("_", "-")
    if plain in (*NAMED, UNKNOWN, OWN):
        return plain
    words = re.split(r"([\s()]+)", name.strip())
    spelled = "".join(f"LicenseRef-{word.lower()}" if word.lower() in NAMED else word for word in words)
    try:
        found = str(canonicalize_license_expression(spelled))
    except InvalidLicenseExpression:
        return None
    return re.sub(r"LicenseRef-([\w.-]+)", lambda m: m[1].lower() if m[1].lower() in NAMED else m[0], found)
