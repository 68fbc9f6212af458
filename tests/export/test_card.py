"""The model card: licences as the recipe records them, never weaker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nvlm_train.errors import CheckpointError
from nvlm_train.export import card
from tiny_nvlm import make_recipe


def folder(license: str | None, source: str | None = None) -> dict[str, Any]:
    return {"path": "somewhere", "license": license, "source": source}


def write(recipe: dict[str, Any], earlier_run: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    text = card.model_card(recipe, step=20, recipe_hash="abc", dtype="bf16", earlier_run=earlier_run)
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_parts_and_training_facts_are_listed() -> None:
    recipe = make_recipe(Path("t"), **{
        "init_from.vision": folder("MIT", "OpenGVLab/InternViT-6B-448px-V1-5"),
        "init_from.language_model": folder("tongyi-qianwen", "https://huggingface.co/Qwen/Qwen2-72B-Instruct"),
        "license": "Apache-2.0",
    })  # fmt: skip
    head, body = write(recipe)
    assert head["base_model"] == ["OpenGVLab/InternViT-6B-448px-V1-5", "Qwen/Qwen2-72B-Instruct"]
    assert head["license"] == "apache-2.0" and head["pipeline_tag"] == "image-text-to-text"
    assert "| weights | language_model | tongyi-qianwen |" in body and "| data | digits | BSD-3-Clause |" in body
    assert "recipe hash: abc" in body and "steps: 20 of 20, 8 samples each" in body
    assert "Research only" not in body


def test_what_is_not_stated_is_said_to_be_not_stated() -> None:
    recipe = make_recipe(Path("t"), **{"init_from.vision": folder(None)})
    recipe["init_from"]["language_model"] = folder(None, "scripts/make_demo_backbones.py")  # ours, not a model's name
    head, body = write(recipe)
    assert "base_model" not in head
    assert head["license"] == "other" and head["license_name"] == "not-stated"
    assert "| weights | vision | not stated in the recipe | not stated |" in body


def test_research_only_weights_are_named_first_and_set_the_licence() -> None:
    recipe = make_recipe(Path("t"), **{"init_from.language_model": folder("CC-BY-NC-4.0", "nvidia/NVLM-D-72B")})
    head, body = write(recipe)
    assert head["license"] == "cc-by-nc-4.0"
    first = [line for line in body.splitlines() if line][1]
    assert first.startswith("**Research only. Commercial use is not allowed**") and "CC-BY-NC-4.0" in first


def test_a_weaker_label_is_refused() -> None:
    changes = {"init_from.vision": folder("CC-BY-NC-4.0"), "license": "Apache-2.0"}
    with pytest.raises(
        CheckpointError, match=r"'Apache-2\.0' allows more than init_from\.vision\.license 'CC-BY-NC-4\.0'"
    ):
        write(make_recipe(Path("t"), **changes))


def test_an_earlier_run_brings_its_parts_along() -> None:
    """Two stages back, from what recipe.json recorded: the folders of the earlier runs may be gone."""
    first = make_recipe(Path("t"), **{"init_from.vision": folder("CC-BY-NC-4.0")})
    first["data"]["mixture"] = {"captions": {"path": "c.jsonl", "license": None, "source": "web"}}
    run = {"path": "runs/gone/step_5", "license": None, "source": None}
    second = make_recipe(Path("t"), **{"init_from.run": run})
    third = make_recipe(Path("t"), **{"init_from.run": run})
    behind = {"path": "runs/gone/step_5", "recipe": first, "earlier_run": None}
    earlier = {"path": "runs/second/step_9", "recipe": second, "earlier_run": behind}
    _, body = write(third, earlier)
    assert "| data | captions | not stated in the recipe | web |" in body and "| data | digits |" in body
    assert "Research only" in body
    with pytest.raises(CheckpointError, match="allows more"):
        write(third | {"license": "MIT"}, earlier)
    with pytest.raises(CheckpointError, match="is not recorded in the run's recipe"):
        write(second)


@pytest.mark.parametrize("name", ["CC-BY-NC-4.0", "cc-by-nc-sa-4.0", "non-commercial", "Llama research licence"])
def test_names_of_research_licences(name: str) -> None:
    assert card.is_research_only(name)


@pytest.mark.parametrize("name", ["MIT", "Apache-2.0", "tongyi-qianwen", "CC-BY-4.0", "NCSA", None])
def test_names_of_other_licences(name: str | None) -> None:
    assert not card.is_research_only(name)


def test_data_that_was_left_out_is_told() -> None:
    first = {"path": "/runs/a/step_40", "step": 40, "recipe_hash": "abc", "skip_steps": [[41, 50]]}
    second = {"path": "/runs/b/step_90", "step": 90, "recipe_hash": "def", "skip_steps": [[41, 50], [93, 93]]}
    text = card.model_card(
        make_recipe(Path("t")),
        step=95,
        recipe_hash="abc",
        dtype="bf16",
        continued_from={**second, "continued_from": first},
    )
    assert (
        "- went on from step 90 of `b` (recipe hash def), never drawing the data of steps 41 to 50, 93 to 93\n" in text
    )
    assert "- went on from step 40 of `a` (recipe hash abc), never drawing the data of steps 41 to 50\n" in text
    assert "went on from" not in write(make_recipe(Path("t")))[1]
