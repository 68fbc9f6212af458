"""The model card: metadata that the Hub takes, licences in its first lines, facts of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvlm_train import provenance
from nvlm_train.export import card, licence
from nvlm_train.export.card import Training
from tiny_nvlm import make_recipe


def folder(license: str | None, source: str | None = None) -> dict[str, Any]:
    return {"path": "somewhere", "license": license, "source": source}


def write(
    recipe: dict[str, Any], training: Training | None = None, adapter: bool = False
) -> tuple[dict[str, Any], str]:
    """Metadata as huggingface_hub reads it, and the body."""
    from huggingface_hub import ModelCard

    earlier = training.earlier_run if training else None
    licences = licence.judge(provenance.parts_of(recipe, earlier), recipe.get("license"))
    text = card.model_card(recipe, licences, training, dtype="bf16", adapter=adapter)
    read = ModelCard(text)
    assert read.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    return read.data.to_dict(), read.text


def test_metadata_is_what_the_hub_takes(tmp_path: Path) -> None:
    from huggingface_hub import metadata_load

    recipe = make_recipe(Path("t"), **{
        "init_from.vision": folder("MIT", "OpenGVLab/InternViT-6B-448px-V1-5"),
        "init_from.language_model": folder("tongyi-qianwen", "https://huggingface.co/Qwen/Qwen2-72B-Instruct"),
    })  # fmt: skip
    more = {"path": "c", "license": "CC-BY-4.0", "source": "https://huggingface.co/datasets/some/captions"}
    recipe["data"]["mixture"]["captions"] = more
    head, body = write(recipe)
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "other",
        "license_name": "tongyi-qianwen",
        "license_link": "https://huggingface.co/Qwen/Qwen2-72B-Instruct/blob/main/LICENSE",
        "base_model": ["OpenGVLab/InternViT-6B-448px-V1-5", "Qwen/Qwen2-72B-Instruct"],
        "datasets": ["some/captions"],
        "tags": ["nvlm", "nvlm_d", "nvlm_train"],
    }
    assert "| weights | language_model | tongyi-qianwen |" in body and "| data | digits | BSD-3-Clause |" in body
    assert "research" not in body
    licences = licence.judge(provenance.parts_of(recipe), None)
    (tmp_path / "README.md").write_text(card.model_card(recipe, licences, dtype="bf16"))
    assert metadata_load(tmp_path / "README.md") == head  # type: ignore[comparison-overlap]


def test_nothing_is_stated_that_nobody_said() -> None:
    """Bases that ask for nothing give the weights no licence; a script is no base model."""
    recipe = make_recipe(Path("t"), **{"init_from.vision": folder("MIT")})
    recipe["init_from"]["language_model"] = folder("Apache-2.0", "scripts/make_demo_backbones.py")
    head, body = write(recipe)
    assert "base_model" not in head and "datasets" not in head
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "not-stated", "LICENSE")
    assert "Licence of these weights: not stated" in body and "| weights | vision | MIT | not stated |" in body
    assert write(recipe | {"license": "apache-2.0"})[0]["license"] == "apache-2.0"
    recipe["init_from"]["vision"]["license"] = "unknown"
    assert write(recipe)[0]["license"] == "unknown"


def test_research_only_weights_are_named_first_and_set_the_licence() -> None:
    recipe = make_recipe(Path("t"), **{"init_from.model": folder("CC-BY-NC-4.0", "nvidia/NVLM-D-72B")})
    head, body = write(recipe)
    assert head["license"] == "cc-by-nc-4.0" and "non-commercial-research" in head["tags"]
    first = [line for line in body.splitlines() if line][1]
    assert first.startswith("**For non-commercial research only (CC-BY-NC-4.0). Commercial use is not allowed: ")
    assert "weights `model` is under CC-BY-NC-4.0" in first
    # what the published model is made of, as far as it is known
    assert head["base_model"] == [
        "nvidia/NVLM-D-72B", "Qwen/Qwen2-72B-Instruct", "OpenGVLab/InternViT-6B-448px-V1-5",
    ]  # fmt: skip
    assert "| weights | model/Qwen2-72B-Instruct | tongyi-qianwen |" in body


def test_an_adapter_says_how_it_is_loaded() -> None:
    head, body = write(make_recipe(Path("t")), adapter=True)
    assert head["library_name"] == "peft" and "lora" in head["tags"] and "PeftModel.from_pretrained" in body


def test_facts_of_the_training(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps(record) + "\n"
            for record in (
                {"step": 10, "validation": {"held": 0.75, "all": 0.5}},
                {"step": 20, "loss": 0.25},
                {"step": 20, "validation": {"held": 0.5, "all": 0.375}},
                {"step": 30, "loss": 9.0},  # after the exported step
            )
        )
        + '{"step": 31, "lo'
    )
    progress = {
        "trained_tokens": 5000,
        "samples_by_source": {"digits": 160},
        "tokens_by_source": {"digits": 4000},
    }
    before = {"progress": {"trained_tokens": 77, "samples_by_source": {"captions": 9}, "tokens_by_source": {}}}
    attempts = (
        {"world_size": 8, "device": "NVIDIA H100 80GB HBM3", "host": "secret-host", "versions": {"torch": "2.11"}},
        {"world_size": 4, "device": "NVIDIA H100 80GB HBM3", "host": "secret-host", "versions": {"torch": "2.12"}},
    )
    run = {"path": "runs/before/step_5", "recipe": make_recipe(Path("t")), "earlier_run": None, **before}
    recipe = make_recipe(Path("/home/someone/tokenizer"), **{"init_from.run": {"path": "/home/someone/runs/before"}})
    training = Training(20, "abc", progress, card._last_losses(tmp_path / "metrics.jsonl", 20), attempts, run)
    _, body = write(recipe, training)
    for line in (
        "- recipe hash: abc",
        "- steps: 20 of 20, 8 samples each",
        "- trained: vision frozen, projector full, language_model full",
        "- training loss at step 20: 0.2500",
        "- validation loss at step 20: held 0.5000, all 0.3750",
        "- hardware: 8 x NVIDIA H100 80GB HBM3, then 4 x NVIDIA H100 80GB HBM3",
        "- software: torch 2.12",
        "| this run | digits | 160 | 4,000 |",
        "| this run | not counted by source | | 1,000 |",
        "| before it (1) | captions | 9 | 0 |",
        "| before it (1) | not counted by source | | 77 |",
    ):
        assert line in body.splitlines(), line
    assert "path: tokenizer" in body and "someone" not in body and "secret-host" not in body
    assert card._last_losses(tmp_path / "none.jsonl", 20) == {}


def test_data_that_was_left_out_is_told() -> None:
    first = {"path": "/runs/a/step_40", "step": 40, "recipe_hash": "abc", "skip_steps": [[41, 50]]}
    second = {"path": "/runs/b/step_90", "step": 90, "recipe_hash": "def", "skip_steps": [[41, 50], [93, 93]]}
    _, body = write(make_recipe(Path("t")), Training(95, "abc", continued_from={**second, "continued_from": first}))
    assert (
        "- went on from step 90 of `b` (recipe hash def), never drawing the data of steps 41 to 50, 93 to 93\n" in body
    )
    assert "- went on from step 40 of `a` (recipe hash abc), never drawing the data of steps 41 to 50\n" in body
    assert "went on from" not in write(make_recipe(Path("t")))[1]


@pytest.mark.parametrize("source", ["scripts/make.py", "https://example.org/a/b", "web", "a/b/c", None, "./a"])
def test_sources_that_are_no_repository_of_the_hub(source: str | None) -> None:
    assert licence.hub_name(source) is None
