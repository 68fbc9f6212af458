"""Every key of a recipe: its type, its default, what it does, and whether it may change on resume.

Defaults live here and nowhere else. `resume` of a key says what a later start of the same run may do with it:

    free   may differ: it changes where, how fast or how visibly the run goes, never its trajectory
    ask    may differ with `--accept KEY`: length, schedule and data, which users extend on purpose
    fixed  is refused with the diff: the trajectory depends on it

Imports neither torch nor deepspeed, so that checking a recipe takes under a second on a login node.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Resume = Literal["free", "ask", "fixed"]


def key(default: Any = ..., *, doc: str, resume: Resume = "fixed", path: bool = False, **limits: Any) -> Any:
    """A recipe key. `doc` is its one documentation; `path` keys expand `~` and `${VAR}`; `limits` are pydantic's."""
    extra: Any = {"resume": resume, "path": path}
    return Field(default, description=doc, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A mapping of a recipe: unknown keys refused, types exact (no "1" for 1), never changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    shorthand: ClassVar[str | None] = None  # the key that a bare string stands for: `vision: NAME` is {preset: NAME}


class Misfit(ValueError):
    """Keys that are each fine but do not fit together; raised by the validators of sections, located by `load`.

    problems: (key relative to the section, what is wrong and what would be right). All that were found, not the first.
    """

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {message}" for name, message in problems))
        self.problems = problems


def _integers_are_numbers(value: Any) -> Any:
    """`lr: 1` means 1.0; `lr: "1"` and `lr: true` stay errors."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Number = Annotated[float, BeforeValidator(_integers_are_numbers)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # of a source: no dots, which separate keys


# ------------------------------------------------------------------------------------------------------------- model

VISION_PRESETS: dict[str, dict[str, Any]] = {
    # InternViT-6B-448px-V1-5 as in the published config.json; 5,536,496,000 parameters
    "internvit_6b_448px_v1_5": dict(
        hidden_size=3200, intermediate_size=12800, num_hidden_layers=45, num_attention_heads=25, image_size=448,
        patch_size=14, layer_norm_eps=1e-6,
    ),
    # InternViT-300M-448px, distilled from the one above; 304,012,288 parameters
    "internvit_300m_448px": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=448,
        patch_size=14, layer_norm_eps=1e-6, norm_type="layer_norm", qk_normalization=False, qkv_bias=True,
    ),
}  # fmt: skip

LANGUAGE_MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "qwen2_0_5b_instruct": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "qwen2_1_5b_instruct": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "qwen2_7b_instruct": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064,
    ),
    "qwen2_72b_instruct": dict(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=152064,
    ),
    # Yi-34B and Nous-Hermes-2-Yi-34B; 34,388,917,248 parameters
    "yi_34b": dict(
        model_type="llama", hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
        num_key_value_heads=8, vocab_size=64000, rms_norm_eps=1e-5, rope_theta=5000000.0, max_position_embeddings=4096,
    ),
}  # fmt: skip


def _fill_from_preset(presets: dict[str, dict[str, Any]]) -> BeforeValidator:
    def fill(value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if isinstance(value, dict) and value.get("preset") in presets:
            return {**presets[value["preset"]], **value}
        return value

    return BeforeValidator(fill)


class Vision(Section):
    """The vision tower: InternViT with learned positions, a class token and LayerScale."""

    shorthand = "preset"
    presets: ClassVar[dict[str, dict[str, Any]]] = VISION_PRESETS

    preset: Literal["internvit_6b_448px_v1_5", "internvit_300m_448px"] | None = key(
        None, doc="Sizes of a published tower; single sizes given beside it win.", resume="free"
    )
    hidden_size: int = key(doc="Width E of the tower.", gt=0)
    intermediate_size: int = key(doc="Width of its feed-forward layers.", gt=0)
    num_hidden_layers: int = key(doc="Number of transformer layers; all are used.", gt=0)
    num_attention_heads: int = key(
        doc="Number of real attention heads (25 for the 6B tower, padding not counted).", gt=0
    )
    image_size: int = key(doc="Edge of a tile in pixels.", gt=0)
    patch_size: int = key(doc="Edge of a patch in pixels.", gt=0)
    layer_norm_eps: Number = key(1e-6, doc="Epsilon of the tower's norms.", gt=0)
    norm_type: Literal["rms_norm", "layer_norm"] = key(
        "rms_norm", doc="Norm before attention and feed-forward: rms_norm in the 6B tower, layer_norm in the 300M one."
    )
    qk_normalization: bool = key(
        True, doc="Whether queries and keys get an RMSNorm over the full width: in the 6B tower, not in the 300M one."
    )
    qkv_bias: bool = key(False, doc="Whether q, k and v have biases: in the 300M tower, not in the 6B one.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Vision:
        problems = []
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                (
                    "hidden_size",
                    f"is not a multiple of num_attention_heads {self.num_attention_heads}; "
                    + nearest_multiples(self.hidden_size, self.num_attention_heads),
                )
            )
        if self.image_size % (2 * self.patch_size):
            problems.append(
                (
                    "image_size",
                    f"is not a multiple of 2 x patch_size {self.patch_size} (the pixel shuffle joins patches "
                    "two by two); " + nearest_multiples(self.image_size, 2 * self.patch_size),
                )
            )
        if problems:
            raise Misfit(problems)
        return self


class Projector(Section):
    """From the shuffled patches (4 x vision width) to the decoder's width: LayerNorm, Linear, GELU, Linear; in nvlm_x
    LayerNorm, Linear."""

    norm: Literal["layer_norm", "none"] = key(
        "layer_norm", doc="The projector's first step; the published nvlm_d has layer_norm."
    )
    layer_norm_eps: Number = key(1e-5, doc="Epsilon of the input LayerNorm; the published code has 1e-5.", gt=0)
    initializer_std: Number = key(
        0.014, doc="Standard deviation of a new projector's weights; 0.014 in the released scripts.", gt=0
    )


class LanguageModel(Section):
    """The decoder, of Qwen2's or Llama's kind: grouped-query attention, RoPE, SwiGLU, RMSNorm."""

    shorthand = "preset"
    presets: ClassVar[dict[str, dict[str, Any]]] = LANGUAGE_MODEL_PRESETS

    preset: (
        Literal["qwen2_0_5b_instruct", "qwen2_1_5b_instruct", "qwen2_7b_instruct", "qwen2_72b_instruct", "yi_34b"]
        | None
    ) = key(None, doc="Sizes of a published decoder; single sizes given beside it win.", resume="free")
    model_type: Literal["qwen2", "llama"] = key(
        "qwen2", doc="qwen2: biases on q, k and v. llama: no biases at all (Yi is of this kind)."
    )
    hidden_size: int = key(doc="Width D of the decoder.", gt=0)
    intermediate_size: int = key(doc="Width F of its feed-forward layers; also the projector's hidden width.", gt=0)
    num_hidden_layers: int = key(doc="Number of transformer layers.", gt=0)
    num_attention_heads: int = key(doc="Number N of query heads.", gt=0)
    num_key_value_heads: int = key(doc="Number K of key/value heads.", gt=0)
    vocab_size: int = key(doc="Rows of the embedding, padding rows included.", gt=0)
    tie_word_embeddings: bool = key(False, doc="Whether the output head is the embedding matrix.")
    rms_norm_eps: Number = key(1e-6, doc="Epsilon of the RMSNorms.", gt=0)
    rope_theta: Number = key(1000000.0, doc="Base of the rotary position frequencies.", gt=0)
    max_position_embeddings: int = key(32768, doc="Longest sample the decoder is made for, in tokens.", gt=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> LanguageModel:
        problems = []
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            problems.append(
                (
                    "hidden_size",
                    f"is not a multiple of num_attention_heads {heads}; " + nearest_multiples(self.hidden_size, heads),
                )
            )
        elif (self.hidden_size // heads) % 2:
            problems.append(
                (
                    "hidden_size",
                    f"gives a head size of {self.hidden_size // heads}, which is odd, but rotary positions turn "
                    "pairs of channels; " + nearest_multiples(self.hidden_size, 2 * heads),
                )
            )
        if heads % groups:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            problems.append(
                (
                    "num_key_value_heads",
                    f"does not divide num_attention_heads {heads}; use one of " + ", ".join(map(str, divisors)),
                )
            )
        if problems:
            raise Misfit(problems)
        return self


class CrossAttention(Section):
    """Gated cross-attention of nvlm_x and nvlm_h. The paper is silent on what is inside: each default is our choice."""

    every_layers: int | None = key(
        None,
        doc="One cross-attention layer for so many decoder layers, at the last of them; default: a tenth of the "
        "decoder's, so that there are about ten (8 of 80 and 6 of 60, as in the paper).",
        gt=0,
    )
    place: Literal["before", "between", "after"] = key(
        "between",
        doc="Where in its decoder layer: before it, between self-attention and feed-forward, or after it.",
    )
    num_attention_heads: int | None = key(None, doc="Query heads; default: the decoder's.", gt=0)
    num_key_value_heads: int | None = key(None, doc="Key/value heads; default: the decoder's.", gt=0)
    gate: Literal["tanh", "none"] = key(
        "tanh", doc="What a layer adds is multiplied by tanh of one learned number, or added as it is."
    )
    gate_init: Number = key(0.0, doc="Where the gates start; 0: the decoder's output is the plain decoder's at first.")
    feed_forward: bool = key(False, doc="Whether each layer has a gated feed-forward part of its own.")
    memory_norm: Literal["rms_norm", "none"] = key(
        "rms_norm", doc="Norm of what keys and values are made of, in each layer."
    )
    text_reads: Literal["preceding_images", "last_image", "tags_only"] = key(
        "preceding_images",
        doc="Which tiles ordinary text sees: those of all images before it in its sample, of the last of them, or none "
        "(nvlm_x: only a tile's tag sees it). A tag sees its own tile in any case.",
    )
    thumbnail_reads_tiles: bool = key(
        True, doc="nvlm_h: whether a thumbnail's own tokens see the tiles of its image; the text after it does."
    )
    initializer_std: Number = key(0.02, doc="Standard deviation of new weights.", gt=0)


class Model(Section):
    """The architecture and its sizes. Weights come from `init_from`."""

    architecture: Literal["nvlm_d", "nvlm_x", "nvlm_h"] = key(
        "nvlm_d",
        doc="nvlm_d: all image tokens enter the decoder's sequence. nvlm_x: none does, cross-attention layers read "
        "them. nvlm_h: those of thumbnails do, cross-attention reads the other tiles.",
    )
    vision: Annotated[Vision, _fill_from_preset(VISION_PRESETS)] = key(
        doc="Vision tower: a preset's name or its sizes."
    )
    projector: Projector = key(Projector(), doc="Projector between tower and decoder.")
    language_model: Annotated[LanguageModel, _fill_from_preset(LANGUAGE_MODEL_PRESETS)] = key(
        doc="Decoder: a preset's name or its sizes."
    )
    cross_attention: CrossAttention = key(CrossAttention(), doc="Cross-attention layers of nvlm_x and nvlm_h.")

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Numbers, from 0, of the decoder layers that have cross-attention; 7, 15, ... 79 for every 8th of 80."""
        layers = self.language_model.num_hidden_layers
        every = self.cross_attention.every_layers or max(1, round(layers / 10))
        return () if self.architecture == "nvlm_d" else tuple(range(every - 1, layers, every))

    @property
    def cross_attention_heads(self) -> tuple[int, int]:
        """Query heads and key/value heads of cross-attention."""
        own, lm = self.cross_attention, self.language_model
        return own.num_attention_heads or lm.num_attention_heads, own.num_key_value_heads or lm.num_key_value_heads

    @model_validator(mode="after")
    def _cross_attention_fits(self) -> Model:
        own, lm, problems = self.cross_attention, self.language_model, []
        default = CrossAttention()
        if self.architecture == "nvlm_d":
            changed = [name for name in CrossAttention.model_fields if getattr(own, name) != getattr(default, name)]
            problems += [
                (f"cross_attention.{name}", "has no effect in nvlm_d, which has no cross-attention; remove it")
                for name in changed
            ]
        else:
            heads, groups = self.cross_attention_heads
            if (own.every_layers or 1) > lm.num_hidden_layers:
                problems.append(
                    (
                        "cross_attention.every_layers",
                        f"is more than the {lm.num_hidden_layers} layers of the decoder, so there would be no "
                        f"cross-attention; use at most {lm.num_hidden_layers}",
                    )
                )
            if lm.hidden_size % heads:
                problems.append(
                    (
                        "cross_attention.num_attention_heads",
                        f"does not divide the decoder's hidden_size {lm.hidden_size}; use one of "
                        + ", ".join(str(n) for n in range(1, lm.num_attention_heads + 1) if lm.hidden_size % n == 0),
                    )
                )
            elif heads % groups and own.num_key_value_heads is None:
                problems.append(
                    (
                        "cross_attention.num_attention_heads",
                        f"is not a multiple of the decoder's {groups} key/value heads; give num_key_value_heads too",
                    )
                )
            elif heads % groups:
                problems.append(
                    (
                        "cross_attention.num_key_value_heads",
                        f"does not divide the {heads} query heads; use one of "
                        + ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0),
                    )
                )
            if own.gate == "none" and own.gate_init != 0:
                problems.append(("cross_attention.gate_init", "has no effect, because gate is none; remove it"))
            if self.architecture == "nvlm_h" and own.text_reads == "tags_only":
                problems.append(
                    (
                        "cross_attention.text_reads",
                        "leaves nothing that reads in nvlm_h, whose tags are not in the sequence; use preceding_images "
                        "or last_image",
                    )
                )
            if self.architecture == "nvlm_x" and not own.thumbnail_reads_tiles:
                problems.append(
                    (
                        "cross_attention.thumbnail_reads_tiles",
                        "has no effect in nvlm_x, which has no thumbnail in its sequence; remove it",
                    )
                )
        if problems:
            raise Misfit(problems)
        return self


_LICENCE = (
    "Its licence, which travels with every export: an SPDX identifier (Apache-2.0), LicenseRef-NAME, a name such as "
    "tongyi-qianwen or llama3, `own` (made by yourselves) or `unknown`. An export asks for it."
)
HUB_PREFIX = "hf://"
HUB_PATH = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def _check_hub_path(path: str) -> None:
    """Misfit for an `hf://` path that is not a repository with a revision."""
    if path.startswith(HUB_PREFIX) and not HUB_PATH.fullmatch(path):
        missing = "has no revision" if "@" not in path else "is not a repository of the Hub"
        raise Misfit([("path", f"{missing}; write hf://organisation/name@revision (a commit, a tag, or @main)")])


class Weights(Section):
    """A folder of weights and where it comes from."""

    shorthand = "path"

    path: str = key(
        doc="Folder in the published format of this part, or a run directory; or hf://organisation/name@revision, "
        "which `nvlm-train fetch` downloads.",
        resume="free",
        path=True,
    )
    license: str | None = key(None, doc=_LICENCE, resume="free")
    source: str | None = key(
        None,
        doc="Where the weights come from, for example a model's page; default: the repository of an hf:// path.",
        resume="free",
    )

    @model_validator(mode="after")
    def _path_is_good(self) -> Weights:
        _check_hub_path(self.path)
        return self


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


WeightsOrPath = Annotated[Weights, BeforeValidator(_path_alone)]


class InitFrom(Section):
    """Where a new run's weights come from. What nothing covers is initialised from the seed and listed."""

    model: WeightsOrPath | None = key(
        None,
        doc="Folder of a whole model: the published NVLM-D-72B, or an export of ours, of the recipe's architecture.",
        resume="free",
    )
    vision: WeightsOrPath | None = key(None, doc="InternViT folder (config.json and safetensors).", resume="free")
    language_model: WeightsOrPath | None = key(
        None, doc="Qwen2 or Llama folder (config.json and safetensors).", resume="free"
    )
    run: WeightsOrPath | None = key(
        None,
        doc="Run directory or RUN/step_N of ours: its trained modules replace those of the folders above.",
        resume="free",
    )
    adapters: Literal["merge", "continue"] = key(
        "merge",
        doc="What becomes of the LoRA adapters of `run`. merge: they go into its weights. continue: they stay adapters "
        "and are trained on, where `train` asks for the same rank, alpha and targets.",
    )

    @model_validator(mode="after")
    def _adapters_come_from_a_run(self) -> InitFrom:
        if self.adapters == "continue" and self.run is None:
            raise Misfit([("adapters", "has no effect without init_from.run; name the run whose adapters are meant")])
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> InitFrom:
        beside = [name for name in ("vision", "language_model") if getattr(self, name) is not None]
        if self.model is not None and beside:
            raise Misfit(
                [
                    (
                        name,
                        "stands beside init_from.model, which brings this part already; remove one of the two "
                        f"(`{name}: null` takes back what a parent recipe says)",
                    )
                    for name in beside
                ]
            )
        return self


# -------------------------------------------------------------------------------------------------------------- data


class Tokenizer(Section):
    """Tokenizer and chat format."""

    path: str = key(
        doc="Folder with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json; or "
        "hf://organisation/name@revision.",
        path=True,
        resume="free",
    )
    template: Literal["nvlm_qwen2", "hf_nvlm", "nvlm_yi"] = key(
        "nvlm_qwen2",
        doc="nvlm_qwen2: the stream the released Megatron code trains on (tags tokenised apart, a newline after "
        "<|im_end|>, trained). hf_nvlm: the stream of the published chat() (tags merge with their neighbours). "
        "nvlm_yi: nvlm_qwen2 for Yi's tokenizer (<|startoftext|> first, the thumbnail's tag <tile_global>).",
        resume="ask",
    )
    system: str | None = key(
        None,
        doc="System text put before a sample that brings none. The released SFT has: Answer the questions.",
        resume="ask",
    )

    @model_validator(mode="after")
    def _path_is_good(self) -> Tokenizer:
        _check_hub_path(self.path)
        return self


class Tiling(Section):
    """Dynamic high-resolution tiling (paper section 4.1): the grid nearest in aspect, plus a thumbnail."""

    max_tiles: int = key(
        6, doc="Largest number of tiles an image is cut into, thumbnail not counted; 1: no tiling.", ge=1, le=12
    )
    thumbnail: bool = key(True, doc="Whether an image of more than one tile is followed by a thumbnail of the whole.")
    tags: Literal["one_d", "none"] = key(
        "one_d",
        doc="one_d: <tile_k> before each tile, <tile_global_thumbnail> before the last. none: image tokens only.",
    )
    max_tiles_per_sample: int | None = key(
        None,
        doc="Most tiles of all images of a sample together, thumbnails counted (documents of many pages): all its "
        "images get the largest tile maximum that keeps within it. Default: no such limit.",
        ge=1,
        le=65535,
        resume="ask",
    )

    @property
    def tiles_of_image(self) -> int:
        """The most tiles that one image can have, its thumbnail counted."""
        return self.max_tiles + (1 if self.thumbnail and self.max_tiles > 1 else 0)


class Columns(Section):
    """What a source calls its fields, where it is not what we call them. In tars: a member's extension, or a place in
    one: `txt`, `json[caption]`, `json[0][value]`, `jpg,png` (the first that is there)."""

    messages: str | None = key(None, doc="Conversation; else messages or conversations.", resume="ask")
    role: str | None = key(None, doc="A turn's role; else role or from.", resume="ask")
    content: str | None = key(None, doc="A turn's content; else content or value.", resume="ask")
    texts: str | None = key(
        None, doc="Pairs of user and assistant (the_cauldron, FineVision); else texts.", resume="ask"
    )
    images: str | None = key(None, doc="Image or list of images; else image or images.", resume="ask")
    system: str | None = key(None, doc="A row's system text; else system.", resume="ask")
    question: str | None = key(None, doc="Question; else question.", resume="ask")
    choices: str | None = key(None, doc="Options of a multiple-choice question; else choices.", resume="ask")
    answer: str | None = key(
        None,
        doc="Answer, or a list of which one is chosen by the sample's hash; with choices its number from 0, its letter "
        "or its text; else answer or answers.",
        resume="ask",
    )
    caption: str | None = key(None, doc="Caption; else caption, or text beside an image.", resume="ask")
    text: str | None = key(None, doc="A plain text that is trained as a whole; else text.", resume="ask")


class Ratings(Section):
    """Least ratings of the pairs of a FineVision row; pairs below are left out, unrated ones stay."""

    relevance: int | None = key(None, doc="Least of relevance_ratings.", resume="ask")
    image_correspondence: int | None = key(None, doc="Least of image_correspondence_ratings.", resume="ask")
    visual_dependency: int | None = key(None, doc="Least of visual_dependency_ratings.", resume="ask")
    formatting: int | None = key(None, doc="Least of formatting_ratings.", resume="ask")


class Source(Section):
    """One source of the mixture."""

    kind: Literal["jsonl", "json", "internvl", "hf", "webdataset", "energon", "text"] = key(
        "jsonl",
        doc="jsonl: one sample a line, with `messages` or `conversations`. json: one array of them. internvl: a meta "
        "file; each of its annotations becomes a source. hf: parquet files or a folder of save_to_disk. webdataset: "
        "tars. energon: a blend; each of its data sets becomes a source. text: plain texts (.txt; {text} in .jsonl, "
        ".json or .parquet), trained as a whole and ended by <|endoftext|>.",
        resume="ask",
    )
    path: str = key(
        doc="File, folder, glob, files by braces (a-{000..010}.tar), or a URL that fsspec knows (s3://, gs://, http://).",
        path=True,
        resume="free",
    )
    image_root: str | None = key(
        None, doc="Folder that image paths are relative to; default: the file's own folder.", path=True, resume="free"
    )
    columns: Columns | None = key(None, doc="What the source calls its fields; absent: as we do.", resume="ask")
    roles: dict[str, Literal["user", "assistant", "system"]] = key(
        {}, doc="Roles beside user, human, assistant, gpt, system: {observation: user}.", resume="ask"
    )
    system: str | None = key(None, doc="System text of rows that bring none; default: tokenizer.system.", resume="ask")
    train_on: Literal["all_turns", "last_turn"] = key(
        "all_turns",
        doc="Assistant turns that are trained on; a message with `loss: false` never is.",
        resume="ask",
    )
    prompt: Literal["caption", "vqa", "ocr", "document", "multiple_choice"] | None = key(
        None,
        doc="Wording of the request, one of several by the sample's hash. caption, ocr, document: for images with a "
        "text but no question (default: caption). vqa: asks for a short answer. multiple_choice: needs `choices`.",
        resume="ask",
    )
    min_ratings: Ratings | None = key(None, doc="FineVision: least ratings; absent: all pairs.", resume="ask")
    split: str = key("train", doc="Split of a saved DatasetDict, of an Energon folder or blend.", resume="ask")
    max_samples: int | None = key(
        None, doc="Only the first so many usable samples, for a quick trial; default: all.", gt=0, resume="ask"
    )
    max_tiles: int | None = key(
        None, doc="Tile maximum of this source's images; default: data.tiling.max_tiles.", ge=1, le=12, resume="ask"
    )
    max_tiles_shared: bool = key(
        False,
        doc="Whether a sample's images share the tile maximum, each getting max(1, max_tiles // images), as InternVL "
        "does.",
        resume="ask",
    )
    shuffle: Literal["auto", "rows", "shard_groups"] = key(
        "auto",
        doc="rows: an epoch mixes all samples. shard_groups: it mixes those of shards_per_group shards (files; of "
        "parquet, row groups), then of the next, in an order drawn anew for each epoch, so that few shards are read at "
        "a time. auto: shard_groups behind a URL, else rows. The same for a source of no more shards than a group has.",
        resume="ask",
    )
    shards_per_group: int = key(16, doc="Shards mixed with each other by shard_groups.", ge=1, resume="ask")
    weight: Number = key(
        1.0, doc="Share of samples (or of tokens: data.weight_unit), relative to the other sources.", gt=0, resume="ask"
    )
    max_epochs: Number | None = key(
        None,
        doc="Times that its samples may come in a run (0.5: half of them); from then on the other sources share its "
        "part by their weights. Over the block of 1024 samples in which the limit is reached, what is left is spread "
        "evenly, so its share is below its weight there: all through, for a source that small. Default: no limit.",
        gt=0,
        resume="ask",
    )
    license: str | None = key(None, doc=_LICENCE, resume="free")
    source: str | None = key(None, doc="Where the data comes from, for example its page on the Hub.", resume="free")


class RemoteCache(Section):
    """Ranges of remote files kept on a disk of this machine, in blocks of 1 MiB."""

    path: str = key(
        doc="Folder on a local disk; the ranks of a machine, and runs, may share it.", path=True, resume="free"
    )
    max_gib: Number = key(doc="Above this size the blocks used longest ago are removed.", gt=0, resume="free")


class Data(Section):
    """What is trained on, and how it is cut and packed."""

    mixture: dict[Name, Source] = key(doc="The sources by name.", resume="ask", min_length=1)
    weight_unit: Literal["samples", "tokens"] = key(
        "samples",
        doc="What a source's weight is its share of. tokens: of the model's tokens, by the mean length of its samples.",
        resume="ask",
    )
    tiling: Tiling = key(Tiling(), doc="How images are cut into tiles.", resume="ask")
    max_tokens_per_sample: int = key(doc="A longer sample is handled by `overlong`.", gt=0, resume="ask")
    pack_tokens: int = key(doc="Tokens in one pack: what one row of a micro batch holds.", gt=0, resume="ask")
    pack_tiles: int | None = key(
        None,
        doc="Tiles in one pack at most, beside pack_tokens; a sample with more is dropped and counted. Default: as "
        "many as the tokens allow.",
        gt=0,
        resume="ask",
    )
    overlong: Literal["drop", "truncate_text", "fewer_tiles", "error"] = key(
        "fewer_tiles",
        doc="A sample longer than max_tokens_per_sample: drop it; cut off text at its end, as far as its last image "
        "and something to train on stay whole; cut its images into fewer tiles (8, 6, 4, 2, 1) and drop it only "
        "when that is not enough; or stop. Never cut through an image.",
        resume="ask",
    )
    decode: Literal["exact", "fast"] = key(
        "exact",
        doc="exact: Pillow's bicubic, the reference's pixels bit by bit. fast: torch's bicubic on the same decoded "
        "image, about twice as fast; 2 % of the pixels differ by one, which is less than rounding to bf16 does.",
        resume="ask",
    )
    exif: Literal["ignore", "apply"] = key(
        "ignore",
        doc="Turning marks of cameras: ignore them, as the reference does, or turn the picture upright.",
        resume="ask",
    )
    alpha: Literal["ignore", "white"] = key(
        "ignore",
        doc="Transparent pixels: ignore shows the colour stored beneath, mostly black, as the reference does; white "
        "lays the picture on white paper.",
        resume="ask",
    )
    sixteen_bit: Literal["clip", "scale"] = key(
        "clip",
        doc="Grey pictures of 16 bits or more: clip cuts off at 255, as the reference does, which turns most of them "
        "white; scale brings 0..65535 to 0..255.",
        resume="ask",
    )
    augment: Literal["none", "jpeg"] = key(
        "none",
        doc="jpeg: training images are compressed once more at a quality of 75 to 100, drawn anew for each sample and "
        "epoch from the seed. Held-out samples are left alone.",
        resume="ask",
    )
    max_bad_share: Number = key(
        0.01,
        doc="Unusable samples are dropped and counted; above this share of a source, in its index or among its last "
        "10,000 samples in training, the run stops, and also when the first 8 of a source are all unusable.",
        ge=0,
        le=1,
        resume="free",
    )
    num_threads: int = key(
        2,
        doc="Threads per rank that decode images and build packs. 0: none, training waits for each sample.",
        ge=0,
        resume="free",
    )
    prefetch_steps: int = key(2, doc="Whole steps prepared ahead of the one in training.", ge=1, resume="free")
    prefetch_bytes: int = key(
        4 << 30,
        doc="Bytes a rank may hold in prepared steps; fewer than prefetch_steps are prepared where they would take "
        "more, but always one.",
        gt=0,
        resume="free",
    )
    loader: Literal["inprocess", "process"] = key(
        "inprocess",
        doc="Where a rank decodes: in threads of the trainer, or in threads of a process beside it that hands tiles "
        "over in shared memory and is started again when it dies.",
        resume="free",
    )
    slow_read_s: Number = key(
        30.0, doc="A file read that takes longer is named in the log, with the seconds so far.", gt=0, resume="free"
    )
    remote_cache: RemoteCache | None = key(
        None,
        doc="Where samples behind URLs are kept once read, a block of 1 MiB around each; default: nowhere, a sample is "
        "one request of its own bytes.",
        resume="free",
    )
    index_workers: int = key(
        0,
        doc="Processes that build the length index; 0: one for small sources, else one for each core that may be used.",
        ge=0,
        resume="free",
    )
    index_dir: str | None = key(
        None, doc="Folder of the length index; default: OUTPUT_DIR/data_index.", path=True, resume="free"
    )

    @model_validator(mode="after")
    def _image_fits_pack(self) -> Data:
        tiles = self.tiling.tiles_of_image
        if self.pack_tiles is not None and self.pack_tiles < tiles:
            raise Misfit(
                [
                    (
                        "pack_tiles",
                        f"is less than the {tiles} tiles that one image may have (tiling.max_tiles "
                        f"{self.tiling.max_tiles}{', and a thumbnail' if tiles > self.tiling.max_tiles else ''}); use "
                        f"{tiles} or more, or lower tiling.max_tiles",
                    )
                ]
            )
        return self

    @model_validator(mode="after")
    def _sample_fits_pack(self) -> Data:
        if self.max_tokens_per_sample > self.pack_tokens:
            raise Misfit(
                [
                    (
                        "max_tokens_per_sample",
                        f"is more than pack_tokens {self.pack_tokens}: the longest sample must fit into "
                        f"a pack; use at most {self.pack_tokens}, or raise pack_tokens",
                    )
                ]
            )
        return self


# ---------------------------------------------------------------------------------------------------------- training

Mode = Literal["frozen", "full", "lora"]

# What LoRA can be put on: the linear layers of each module, by the last part of their name.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "vision": ("qkv", "proj", "fc1", "fc2"),
    "projector": ("fc1", "fc2", "fc"),
    "cross_attention": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
_NO_LORA = {
    "lm_head": "the output matrix computes the loss from its own weight, which an adapter beside it would miss",
    "embed_tokens": "an embedding is a table, not a product",
    "patch_embedding": "it is a convolution; train.vision: full trains it",
    "position_embedding": "it is a table; train.vision: full trains it",
    "class_embedding": "it is a vector; train.vision: full trains it",
}


class Lora(Section):
    """Adapters beside linear layers whose own weights stay frozen: `y = W x + alpha / rank * B A x`."""

    rank: int = key(16, doc="Rows of A and columns of B.", gt=0)
    alpha: Number = key(32.0, doc="The adapters' output is scaled by alpha / rank.", gt=0)
    dropout: Number = key(
        0.0,
        doc="Share of the adapters' inputs set to zero in training, drawn anew for each sample and step.",
        ge=0,
        lt=1,
    )
    targets: list[str] | None = key(
        None,
        doc="Linear layers that get adapters, by the last part of their name: "
        + "; ".join(f"{module}: {', '.join(names)}" for module, names in LORA_TARGETS.items())
        + ". Default: all that the module has.",
        min_length=1,
    )


class LoraOptions(Section):
    """LoRA by module, for those that `train` sets to lora."""

    vision: Lora = key(Lora(), doc="The vision tower's adapters.")
    projector: Lora = key(Lora(), doc="The projector's adapters.")
    cross_attention: Lora = key(Lora(), doc="The cross-attention layers' adapters.")
    language_model: Lora = key(Lora(), doc="The decoder's adapters.")


class Train(Section):
    """Which modules are trained."""

    vision: Mode = key(
        "frozen", doc="The vision tower: frozen, as in every stage of the paper; full; or lora, adapters alone."
    )
    projector: Mode = key("full", doc="The projector: frozen, full or lora.")
    cross_attention: Mode = key("full", doc="The cross-attention layers of nvlm_x and nvlm_h: frozen, full or lora.")
    language_model: Mode = key(
        "full", doc="The decoder: full; lora, adapters alone; or frozen, as in the paper's pretraining."
    )
    lora: LoraOptions = key(LoraOptions(), doc="Rank, alpha, dropout and targets of the modules set to lora.")
    quantize: Literal["none", "nf4"] = key(
        "none",
        doc="nf4: the frozen weights of the decoder's linear layers are kept in 4 bits (QLoRA, bitsandbytes), a "
        "quarter of bf16; embedding, head, norms, adapters and exports stay as they are.",
    )

    @property
    def modes(self) -> dict[str, Mode]:
        """The mode of each module."""
        return {module: getattr(self, module) for module in LORA_TARGETS}

    @model_validator(mode="after")
    def _lora_fits(self) -> Train:
        problems = []
        for module, mode in self.modes.items():
            options: Lora = getattr(self.lora, module)
            if mode != "lora" and options != Lora():
                problems.append(
                    (
                        f"lora.{module}",
                        f"has no effect, because train.{module} is {mode}; remove it, or set train.{module}: lora",
                    )
                )
        if self.quantize != "none" and self.language_model == "full":
            problems.append(
                (
                    "quantize",
                    "keeps frozen weights in 4 bits, but train.language_model is full; set train.language_model: lora, "
                    "or remove it",
                )
            )
        if problems:
            raise Misfit(problems)
        return self


def lora_targets(model: Model, module: str) -> tuple[str, ...]:
    """The linear layers of a module of this model, by the last part of their name."""
    names = LORA_TARGETS[module]
    if module == "projector":
        return ("fc",) if model.architecture == "nvlm_x" else ("fc1", "fc2")
    if module == "cross_attention" and not model.cross_attention.feed_forward:
        return names[:4]
    return names


def _no_target(target: str, module: str, targets: tuple[str, ...]) -> str:
    """Why LoRA cannot be put on a layer of a module, and what it can be put on."""
    last = target.rsplit(".", 1)[-1]
    if last in _NO_LORA:
        why = f"names {last}, which takes no adapter: {_NO_LORA[last]}"
    elif "norm" in last or last in ("ls1", "ls2"):
        why = f"names {last}, which takes no adapter: it is a vector"
    else:
        near = difflib.get_close_matches(target, targets, n=1, cutoff=0.5)
        why = f"names {target!r}, which the {module} does not have" + (f"; did you mean {near[0]}?" if near else "")
    return f"{why}; its linear layers are {', '.join(targets)}"


class GlobalBatch(Section):
    """What one optimizer step is made of. Gradient accumulation follows from it and is never set."""

    samples: int | None = key(
        None,
        doc="Samples in one optimizer step, over all ranks; exact on any number of ranks. Learning rates of papers "
        "belong to a number of samples.",
        gt=0,
    )
    packs: int | None = key(
        None,
        doc="Instead of samples: packs of data.pack_tokens in one optimizer step, over all ranks; exact on any number "
        "of ranks. A multiple of ranks x micro_batch_size leaves no rank idle.",
        gt=0,
    )

    @model_validator(mode="after")
    def _one_unit(self) -> GlobalBatch:
        if (self.samples is None) == (self.packs is None):
            both = self.samples is not None
            raise Misfit(
                [
                    (
                        "packs" if both else "",
                        f"stands beside samples {self.samples}, but a step has one unit; remove one of the two "
                        "(`samples: null` takes back what a parent recipe says)"
                        if both
                        else "has no unit; give samples: N (exact learning-rate arithmetic) or packs: N (throughput)",
                    )
                ]
            )
        return self


class ModuleLr(Section):
    """Peak learning rates of single modules; those not named use `optimizer.lr`."""

    vision: Number | None = key(None, doc="The vision tower's.", gt=0)
    projector: Number | None = key(None, doc="The projector's.", gt=0)
    cross_attention: Number | None = key(None, doc="The cross-attention layers'.", gt=0)
    language_model: Number | None = key(None, doc="The decoder's.", gt=0)


class Optimizer(Section):
    """AdamW. Weight decay is off for norms, biases and LayerScale."""

    lr: Number = key(doc="Peak learning rate.", gt=0)
    module_lr: ModuleLr = key(ModuleLr(), doc="Peak learning rates by module.")
    betas: list[Number] = key([0.9, 0.95], doc="AdamW's two betas.", min_length=2, max_length=2)
    eps: Number = key(1e-8, doc="AdamW's epsilon.", gt=0)
    weight_decay: Number = key(0.1, doc="Decoupled weight decay.", ge=0)
    max_grad_norm: Number = key(1.0, doc="Gradients are scaled down to this global norm; 0: never.", ge=0)


class Schedule(Section):
    """Learning rate over the run, a factor on every group's peak."""

    name: Literal["cosine", "constant"] = key("cosine", doc="Shape after the warm-up.", resume="ask")
    warmup_steps: int | float = key(
        0, doc="Steps of linear warm-up from 0; a number below 1 is a share of the run's steps.", ge=0, resume="ask"
    )
    min_lr: Number = key(
        0.0, doc="Where cosine ends, for `optimizer.lr`; other groups end at the same share.", ge=0, resume="ask"
    )
    decay_steps: int | None = key(
        None, doc="Step at which min_lr is reached, warm-up included; default: the last.", gt=0, resume="ask"
    )

    @field_validator("warmup_steps", mode="after")
    @classmethod
    def _no_share_is_no_step(cls, steps: int | float) -> int | float:
        return 0 if steps == 0 else steps  # 0.0 means the same, so it must hash the same

    @model_validator(mode="after")
    def _warmup_is_a_count_or_a_share(self) -> Schedule:
        if isinstance(self.warmup_steps, float) and self.warmup_steps >= 1:
            raise Misfit(
                [
                    (
                        "warmup_steps",
                        f"is neither a whole number of steps nor a share below 1; use {round(self.warmup_steps)}",
                    )
                ]
            )
        return self


class ZeroExperimental(Section):
    """ZeRO options that we cannot vouch for. README, "ZeRO options", says what of them has ever run."""

    hpz_partition_size: int = key(
        1,
        doc="hpZ: ranks (of one node) that hold a second copy of the weights together, so that backward gathers inside "
        "the node; 1: off. The first step's loss is compared with hpZ off.",
        ge=1,
        resume="free",
    )


class Zero(Section):
    """DeepSpeed ZeRO. The DeepSpeed configuration follows from the recipe; `recipe show` prints it."""

    stage: Literal[0, 1, 2, 3] = key(
        3, doc="0 replicates all; 1 shards optimizer states, 2 gradients too, 3 weights too.", resume="free"
    )
    reduce_bucket_size: int = key(500_000_000, doc="Elements reduced at once.", gt=0, resume="free")
    prefetch_bucket_size: int = key(50_000_000, doc="Elements gathered ahead (stage 3).", ge=0, resume="free")
    param_persistence_threshold: int = key(
        100_000, doc="Parameters smaller than this stay gathered (stage 3).", ge=0, resume="free"
    )
    max_live_parameters: int = key(
        1_000_000_000, doc="Elements gathered at the same time (stage 3).", ge=0, resume="free"
    )
    max_reuse_distance: int = key(
        1_000_000_000, doc="Keep a parameter that is used again within so many elements (stage 3).", ge=0, resume="free"
    )
    communication_data_type: Literal["fp32", "bf16"] = key(
        "fp32", doc="Type in which gradients are reduced.", resume="fixed"
    )
    tower: Literal["replicated", "partitioned"] | None = key(
        None,
        doc="Where the vision tower's weights live. replicated: whole on every rank, outside the engine; only where "
        "train.vision is frozen. partitioned: inside the engine, each rank a share (stage 3). Default: replicated "
        "where it is frozen, inside where it is trained.",
        resume="free",
    )
    offload_optimizer: Literal["none", "cpu"] = key(
        "none",
        doc="Where fp32 masters, moments and accumulated gradients live. cpu: in host memory, where torch's AdamW runs "
        "too.",
        resume="free",
    )
    offload_param: Literal["none", "cpu"] = key(
        "none", doc="Where a rank's share of the weights lives (stage 3); needs offload_optimizer.", resume="free"
    )
    experimental: ZeroExperimental = key(
        ZeroExperimental(), doc="Options without our guarantee: see each.", resume="free"
    )

    @field_validator("offload_optimizer", "offload_param", mode="before")
    @classmethod
    def _no_nvme(cls, device: Any) -> Any:
        if device == "nvme":
            raise Misfit(
                [
                    (
                        "",
                        "is not supported: DeepSpeed keeps such weights and states in files of its own, where loading, "
                        "saving and resuming cannot reach them; use cpu, or more ranks",
                    )
                ]
            )
        return device

    @model_validator(mode="after")
    def _options_fit(self) -> Zero:
        problems = []
        if self.tower == "partitioned" and self.stage != 3:
            problems.append(
                (
                    "tower",
                    f"shares weights out, which zero.stage {self.stage} does not: they are whole on every rank; use "
                    "zero.stage=3, or remove it",
                )
            )
        if self.offload_optimizer != "none" and self.stage == 0:
            problems.append(
                ("offload_optimizer", "needs optimizer states that are shared out; use zero.stage=1, 2 or 3, or none")
            )
        if self.offload_param != "none" and self.stage != 3:
            problems.append(
                (
                    "offload_param",
                    f"needs weights that are shared out, which zero.stage {self.stage} does not; use zero.stage=3, or "
                    "none",
                )
            )
        elif self.offload_param != "none" and self.offload_optimizer == "none":
            problems.append(
                ("offload_param", "needs the optimizer beside it; set zero.offload_optimizer=cpu, or use none")
            )
        if self.experimental.hpz_partition_size > 1 and self.stage != 3:
            problems.append(
                (
                    "experimental.hpz_partition_size",
                    f"needs weights that are shared out, which zero.stage {self.stage} does not; use 1, or "
                    "zero.stage=3",
                )
            )
        if problems:
            raise Misfit(problems)
        return self


class Debug(Section):
    """Checks that cost time, for finding out why something goes wrong."""

    collectives: bool = key(
        False,
        doc="Before each module call that uses weights, forward or backward, the ranks compare which one it is. The "
        "first difference, which would hang or corrupt the run, ends it with the ranks and the modules by name.",
        resume="free",
    )
    collectives_timeout_s: int = key(
        60,
        doc="Seconds a rank waits with a module call for the others before the run ends and says who is missing.",
        gt=0,
        resume="free",
    )


class Checkpoint(Section):
    """When the run is saved and what is kept."""

    every_steps: int = key(
        500, doc="Steps between checkpoints; 0: none by steps. The last step is always saved.", ge=0, resume="free"
    )
    every_minutes: Number | None = key(
        None, doc="Minutes between the beginnings of saves, by rank 0's clock, besides.", gt=0, resume="free"
    )
    keep_last: int = key(
        2, doc="Newest checkpoints kept; the best one of validation is kept besides.", ge=1, resume="free"
    )
    keep_every_steps: int | None = key(
        None, doc="At multiples of so many steps a checkpoint is saved and kept for good.", gt=0, resume="free"
    )
    weights_every: int | None = key(
        None,
        doc="Steps between milestones RUN/weights_N, kept for good: the trained weights in bf16, 2 bytes a parameter. "
        "They can be exported and started from, not resumed.",
        gt=0,
        resume="free",
    )
    asynchronous: bool = key(
        False,
        doc="Write checkpoints beside the training, from a copy in host memory (12 bytes a trained parameter over all "
        "ranks). The same guarantees; a checkpoint exists some steps later.",
        resume="free",
    )
    timeout_s: int = key(
        1800,
        doc="Seconds a save may take before the run ends and names who has not finished.",
        gt=0,
        resume="free",
    )
    base: Literal["reference", "copy"] = key(
        "reference",
        doc="Frozen weights are named in RUN/base.json, with checksums; copy: copied to RUN/base once besides, so that "
        "the run needs no other folder.",
        resume="free",
    )
    signal: Literal["USR1", "USR2"] = key(
        "USR2", doc="Signal that means: finish the step, save, exit 0 (SIGTERM and SIGINT always do).", resume="free"
    )

    @model_validator(mode="after")
    def _is_saved_at_all(self) -> Checkpoint:
        if not self.every_steps and self.every_minutes is None and self.keep_every_steps is None:
            raise Misfit(
                [
                    (
                        "every_steps",
                        "is 0 and every_minutes is not given, so a crash would lose the whole run; give one of them",
                    )
                ]
            )
        return self


class Distributed(Section):
    """How long ranks wait for each other."""

    rendezvous_s: int = key(
        300,
        doc="Seconds to wait at the start for ranks that have not come yet; then the run ends and names them.",
        gt=0,
        resume="free",
    )
    timeout_s: int = key(
        600,
        doc="Seconds a collective may wait before the run ends with an error; loading and saving included.",
        gt=0,
        resume="free",
    )
    hang_s: int = key(
        1800,
        doc="Seconds without the end of a step, a validation or a save after which every rank writes the stacks of its "
        "threads, and the run ends with exit 1 and names the rank that the others wait for.",
        gt=0,
        resume="free",
    )
    silent_s: int = key(
        120,
        doc="Seconds without a heartbeat (one a second, sent by a thread) after which a rank counts as stopped or cut "
        "off and the run ends with exit 1.",
        gt=0,
        resume="free",
    )
    agree_s: int = key(
        300,
        doc="Seconds that ranks asked to stop have for finishing the step and agreeing; then the run ends without a "
        "save and names the missing ranks. Longer than a step.",
        gt=0,
        resume="free",
    )


class EarlyStop(Section):
    """Stop when validation no longer improves."""

    patience: int = key(doc="Validations without improvement before the run stops.", ge=1, resume="ask")


class Validation(Section):
    """Held-out loss. Changes nothing in training but where `early_stop` ends it."""

    every_steps: int = key(
        500, doc="Steps between validations; the last step is always validated.", gt=0, resume="free"
    )
    sources: dict[Name, Source] = key({}, doc="Sources of their own, by name.", resume="free")
    held_out_share: Number = key(
        0.0,
        doc="Share of every source of the mixture kept out of training, chosen by a hash of the sample.",
        ge=0,
        lt=1,
        resume="fixed",
    )
    max_samples: int = key(512, doc="Samples used per source, the first in file order.", gt=0, resume="free")
    best: str | None = key(
        None,
        doc="Source whose loss marks the best checkpoint; default: the mean over all trained tokens.",
        resume="free",
    )
    early_stop: EarlyStop | None = key(
        None, doc="Stop when the loss that marks the best no longer improves.", resume="ask"
    )


class VisionFeatureCache(Section):
    """Features of the frozen tower kept on disk: a tile that was seen before is read instead of computed."""

    path: str = key(
        doc="Folder; ranks, nodes and runs may share it. About 6.5 MB a tile for the 6B tower in bf16.",
        path=True,
        resume="free",
    )
    max_gib: Number = key(doc="Above this size the entries used longest ago are removed.", gt=0, resume="free")
    dtype: Literal["as_computed", "bf16"] = key(
        "as_computed",
        doc="as_computed: in the recipe's precision, nothing is lost. bf16: half the size where precision is fp32; "
        "features are rounded the first time already.",
        resume="ask",
    )


class Log(Section):
    """What is shown and recorded. metrics.jsonl in the run directory is always written."""

    every_steps: int = key(1, doc="Steps between lines of metrics.jsonl and of the console.", gt=0, resume="free")
    to: list[Literal["wandb", "tensorboard"]] = key([], doc="Besides: wandb, tensorboard.", resume="free")
    wandb_project: str = key("nvlm_train", doc="Project name for wandb.", resume="free")


RUN_LENGTHS = ("max_steps", "max_samples", "max_tokens", "num_epochs")  # exactly one of them is given
ONE_OF = (*((name,) for name in RUN_LENGTHS), ("global_batch", "samples"), ("global_batch", "packs"))


class Recipe(Section):
    """A whole run, as it was written."""

    run_name: str = key(doc="Name of the run.", resume="free", pattern=r"^[A-Za-z0-9._-]+$")
    output_dir: str = key(doc="Run directory: checkpoints, metrics, logs.", path=True, resume="free")
    seed: int = key(1234, doc="Seed of data order, initialisation and every random draw.", ge=0)
    license: str | None = key(
        None,
        doc="Licence of the trained weights: an SPDX identifier or LicenseRef-NAME. An export refuses one that allows "
        "more than the weights and data behind it do. Default: what those ask for.",
        resume="free",
    )
    model: Model = key(doc="Architecture and sizes.")
    init_from: InitFrom = key(InitFrom(), doc="Weights to start from.", resume="free")
    tokenizer: Tokenizer = key(doc="Tokenizer and chat format.")
    data: Data = key(doc="Mixture, tiling and packing.")
    train: Train = key(Train(), doc="Which modules are trained.")
    global_batch: GlobalBatch = key(doc="What one optimizer step is made of.")
    micro_batch_size: int = key(1, doc="Packs per rank in one forward and backward.", gt=0, resume="free")
    max_steps: int | None = key(
        None, doc="Length of the run: optimizer steps. One of the four lengths is given.", gt=0, resume="ask"
    )
    max_samples: int | None = key(
        None, doc="Length of the run: as many steps as it takes to hold so many samples.", gt=0, resume="ask"
    )
    max_tokens: int | None = key(
        None,
        doc="Length of the run: as many steps as it takes to hold so many tokens of samples, padding not counted.",
        gt=0,
        resume="ask",
    )
    num_epochs: Number | None = key(
        None,
        doc="Length of the run: so many times the number of samples of all sources together (so a sample comes "
        "num_epochs times on average; a source's weight says how often its own do).",
        gt=0,
        resume="ask",
    )
    optimizer: Optimizer = key(doc="AdamW and its learning rates.")
    schedule: Schedule = key(Schedule(), doc="Learning-rate schedule.", resume="ask")
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop",
        doc="What a step with a loss or gradient that is not finite does, on all ranks alike; it never changes a "
        "weight. stop: save the state before it and end. skip: go on with the next one.",
        resume="free",
    )
    max_nonfinite_steps: int = key(
        5, doc="With on_nonfinite: skip, so many such steps in a row stop the run all the same.", ge=1, resume="free"
    )
    worst_case_first: bool = key(
        True,
        doc="Run the heaviest packs of the plan forward and backward before the first step, and discard them: what "
        "does not fit into memory shows in the first minute.",
        resume="free",
    )
    precision: Literal["bf16", "fp32"] = key("bf16", doc="Type of weights and activations; master weights are fp32.")
    activation_checkpointing: Literal["none", "selective", "full"] = key(
        "none",
        doc="What is computed again in the backward pass instead of kept. full: every layer of the decoder and of a "
        "trained tower. selective: the same layers, but matrix products and attention are kept.",
        resume="free",
    )
    vision_tiles_per_chunk: int = key(
        16, doc="Tiles that go through the tower at once, so that memory does not grow with tiles.", gt=0, resume="free"
    )
    vision_feature_cache: VisionFeatureCache | None = key(
        None, doc="Keeps the frozen tower's features on disk; absent: no cache.", resume="free"
    )
    kernels: Literal["auto", "torch", "triton", "liger"] = key(
        "auto",
        doc="auto: the fastest that runs here. torch: plain PyTorch. triton: our own kernels, or an error where they "
        "cannot run; liger: Liger's loss, the others as auto.",
        resume="free",
    )
    zero: Zero = key(Zero(), doc="DeepSpeed ZeRO.", resume="free")
    checkpoint: Checkpoint = key(Checkpoint(), doc="Saving.", resume="free")
    validation: Validation | None = key(None, doc="Held-out loss; absent: none.", resume="free")
    log: Log = key(Log(), doc="Console, wandb, tensorboard.", resume="free")
    distributed: Distributed = key(Distributed(), doc="Time limits of a run on several ranks.", resume="free")
    debug: Debug = key(Debug(), doc="Checks that cost time.", resume="free")

    @property
    def tower_is_replicated(self) -> bool:
        """The vision tower is whole on every rank, outside the engine."""
        return self.train.vision == "frozen" and self.zero.tower != "partitioned"

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        problems = []
        lengths = [name for name in RUN_LENGTHS if getattr(self, name) is not None]
        if not lengths:
            problems.append(
                ("max_steps", "is not given, but a run needs a length; give one of " + ", ".join(RUN_LENGTHS))
            )
        for name in lengths[1:]:
            problems.append(
                (
                    name,
                    f"stands beside {lengths[0]}, but a run has one length; remove one of the two "
                    f"(`{lengths[0]}: null` takes back what a parent recipe says)",
                )
            )
        longest = self.model.language_model.max_position_embeddings
        if self.data.max_tokens_per_sample > longest:
            problems.append(
                (
                    "data.max_tokens_per_sample",
                    f"is more than model.language_model.max_position_embeddings {longest}; use at most {longest}",
                )
            )
        if self.train.quantize != "none" and self.zero.stage == 3:
            problems.append(
                (
                    "zero.stage",
                    f"shares weights out, but train.quantize is {self.train.quantize}: 4-bit weights are whole on "
                    "every rank; use zero.stage=2, or train.quantize=none",
                )
            )
        problems += self._modules_misfits()
        if self.zero.stage == 0 and self.precision == "bf16":
            problems.append(
                ("zero.stage", "has no fp32 masters for bf16 weights in DeepSpeed; use zero.stage=1 or precision=fp32")
            )
        if self.zero.tower == "replicated" and self.train.vision != "frozen":
            problems.append(
                (
                    "zero.tower",
                    f"needs a frozen tower, but train.vision is {self.train.vision}: copies outside the engine would "
                    "drift apart; use partitioned, or remove it",
                )
            )
        if self.vision_feature_cache is not None and self.zero.tower == "partitioned":
            problems.append(
                (
                    "vision_feature_cache",
                    "needs a tower that a rank can run alone, but zero.tower is partitioned: every rank must run it "
                    "when any does; remove the cache, or use zero.tower=replicated",
                )
            )
        if self.vision_feature_cache is not None and self.train.vision != "frozen":
            problems.append(
                (
                    "vision_feature_cache",
                    f"needs a frozen tower, but train.vision is {self.train.vision}: its features change with every "
                    "step; remove the cache, or set train.vision: frozen",
                )
            )
        if self.schedule.min_lr > self.optimizer.lr:
            problems.append(
                (
                    "schedule.min_lr",
                    f"is above optimizer.lr {self.optimizer.lr}; use a value from 0 to {self.optimizer.lr}",
                )
            )
        for module, lr in self.optimizer.module_lr:
            if lr is not None and getattr(self.train, module) == "frozen":
                problems.append(
                    (
                        f"optimizer.module_lr.{module}",
                        f"has no effect, because train.{module} is frozen; remove it, or set train.{module}: full "
                        "or lora",
                    )
                )
        warmup, end = self.schedule.warmup_steps, self.schedule.decay_steps
        if isinstance(warmup, int) and end is not None and warmup > end:
            problems.append(("schedule.warmup_steps", f"is more than schedule.decay_steps {end}; use at most {end}"))
        if self.validation is not None:
            for name in sorted(set(self.validation.sources) & set(self.data.mixture)):
                problems.append(
                    (
                        f"validation.sources.{name}",
                        "is the name of a source of data.mixture too; give it a name of its own",
                    )
                )
            known = [*self.validation.sources, *(self.data.mixture if self.validation.held_out_share else ())]
            if self.validation.best is not None and self.validation.best not in known:
                problems.append(
                    (
                        "validation.best",
                        "is not the name of a validated source; "
                        + (f"use one of {', '.join(known)}" if known else "nothing is validated by this recipe"),
                    )
                )
        if problems:
            raise Misfit(problems)
        return self

    def _modules_misfits(self) -> list[tuple[str, str]]:
        """What of the architecture does not fit the data or the trained modules."""
        problems = []
        architecture, tiling, cross = self.model.architecture, self.data.tiling, self.model.cross_attention
        names = [name for name in self.train.modes if name != "cross_attention" or architecture != "nvlm_d"]
        if all(self.train.modes[name] == "frozen" for name in names):
            problems.append(
                (
                    "train",
                    f"freezes every module, so nothing would be trained; set one of {', '.join(names)} to full or lora",
                )
            )
        for module in names:
            fitting = lora_targets(self.model, module)
            for target in getattr(self.train.lora, module).targets or ():
                if target not in fitting:
                    problems.append((f"train.lora.{module}.targets", _no_target(target, module, fitting)))
        if architecture == "nvlm_d":
            for name, given in (
                ("train.cross_attention", self.train.cross_attention != "full"),
                ("optimizer.module_lr.cross_attention", self.optimizer.module_lr.cross_attention is not None),
            ):
                if given:
                    problems.append((name, "has no effect in nvlm_d, which has no cross-attention; remove it"))
            return problems
        if self.data.pack_tiles is None:
            problems.append(
                (
                    "data.pack_tiles",
                    f"is not given, but tiles are not in the token count of {architecture}, so nothing else bounds "
                    "them; give the tiles that one pack may hold",
                )
            )
        if architecture == "nvlm_h" and tiling.max_tiles > 1 and not tiling.thumbnail:
            problems.append(
                ("data.tiling.thumbnail", "must be true in nvlm_h, whose sequence holds thumbnails; or max_tiles: 1")
            )
        if cross.text_reads == "tags_only" and tiling.tags == "none":
            problems.append(
                ("data.tiling.tags", "is none, but only tags read (model.cross_attention.text_reads); use one_d")
            )
        return problems


# ------------------------------------------------------------------------------------- what can be asked of the schema


class Key(NamedTuple):
    """One key of a recipe, as `recipe keys` lists it. A name the user chooses is `*`: data.mixture.*.path."""

    path: str
    kind: str  # the type in a user's words
    default: Any  # REQUIRED where the recipe must give it
    doc: str
    resume: Resume
    is_path: bool
    nullable: bool
    section: type[Section] | None  # of a section, or of what stands behind each name
    named: bool  # a mapping whose names are the user's


REQUIRED = "required"


@cache
def all_keys(section: type[Section] | None = None, prefix: str = "") -> dict[str, Key]:
    """Every key below `section` (default: the whole recipe) by dotted path, in the order of the file."""
    keys: dict[str, Key] = {}
    for name, field in (section or Recipe).model_fields.items():
        path = prefix + name
        extra = field.json_schema_extra
        assert isinstance(extra, dict), f"{path} is not declared with key()"
        inner, named, nullable = _inside(field.annotation)
        default = REQUIRED if field.is_required() else field.get_default()
        resume: Any = extra["resume"]
        keys[path] = Key(
            path,
            type_text(field.annotation, field.metadata),
            default,
            field.description or "",
            resume,
            bool(extra["path"]),
            nullable,
            inner,
            named,
        )
        if inner is not None:
            keys.update(all_keys(inner, f"{path}.*." if named else f"{path}."))
    return keys


def _inside(annotation: Any) -> tuple[type[Section] | None, bool, bool]:
    """(section class inside an annotation or None, whether it stands behind names, whether null is allowed)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False, False
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _inside(args[0])
    if origin is dict:
        return _inside(args[1])[0], True, False
    if origin in (Union, UnionType):
        found = [_inside(arg) for arg in args if arg is not type(None)]
        section = next((inner for inner in found if inner[0] is not None), (None, False, False))
        return section[0], section[1], type(None) in args
    return None, False, False


def type_text(annotation: Any, metadata: Any = ()) -> str:
    """The type in a user's words: `whole number > 0`, `one of: a, b`, `list of one of: a, b`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(args[0], args[1:])
    if origin in (Union, UnionType):
        words = " or ".join(type_text(arg) for arg in args if arg is not type(None)) + _limits(metadata)
        return words + (" or null" if type(None) in args else "")
    if origin is Literal:
        return "one of: " + ", ".join(str(arg) for arg in args)
    if origin is list:
        return f"list of {type_text(args[0])}"
    if origin is dict:
        return f"mapping of names to {type_text(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section" + (f", or its {annotation.shorthand} alone" if annotation.shorthand else "")
    names = {int: "whole number", float: "number", bool: "true or false", str: "string"}
    return names[annotation] + _limits(metadata)


def _limits(metadata: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(m, attribute)}"
        for m in metadata
        for attribute, sign in signs.items()
        if hasattr(m, attribute)
    ]
    return (" " + " and ".join(found)) if found else ""


def nearest_multiples(value: int, step: int) -> str:
    """`use 96 or 128`: the multiples of `step` around `value`."""
    below, above = value // step * step, -(-value // step) * step
    return f"use {below} or {above}" if below else f"use {above}"
