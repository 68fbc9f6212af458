"""What an export writes, and what it refuses."""

from __future__ import annotations

import errno
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nvlm_train.errors import CheckpointError, SetupError
from nvlm_train.export import hf, shards, verify
from nvlm_train.model import key_map
from tiny_nvlm import MemoryWeights, make_recipe, make_tokenizer, random_weights


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            keys = list(shard.keys())
            assert keys == sorted(keys)
            tensors |= {name: shard.get_tensor(name) for name in keys}
    return tensors


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_index_and_shards(exported: Path) -> None:
    shards = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    tensors = read_all(exported)
    assert set(index["weight_map"]) == set(tensors) and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    others = {path.name for path in exported.iterdir()} - set(shards)
    assert others == {
        "LICENSE", "LICENSE.Apache-2.0", "NOTICE", "README.md", "SHA256SUMS", "config.json", "configuration_nvlm_d.py",
        "generation_config.json", "model.safetensors.index.json", "provenance.json",
        "modeling_nvlm_d.py", "preprocessor_config.json", "processing_nvlm.py", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_no_shard_is_larger_than_asked(exported: Path) -> None:
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]
        assert sum(sizes) <= 40_000 or len(sizes) == 1


def test_exported_tensors_come_back_bit_for_bit(exported: Path, recipe: dict[str, Any], weights: MemoryWeights) -> None:
    model = key_map.model_from_recipe(recipe)
    back = {}
    for name, tensor in read_all(exported).items():
        ours = key_map.from_published(name)
        back[ours] = key_map.unpad(ours, tensor, model.vision)
    assert sorted(back) == weights.names()
    assert all(torch.equal(back[name], weights.read(name)) for name in back)


def test_bf16_export_rounds_once(tmp_path: Path, recipe: dict[str, Any], weights: MemoryWeights) -> None:
    out = hf.export(weights, recipe, tmp_path / "out", dtype="bf16")
    tensors = read_all(out)
    assert len(list(out.glob("*.safetensors"))) == 1 and {tensor.dtype for tensor in tensors.values()} == {
        torch.bfloat16
    }
    assert torch.equal(tensors["mlp1.1.weight"], weights.read("projector.fc1.weight").bfloat16())
    assert json.loads((out / "config.json").read_text())["llm_config"]["torch_dtype"] == "bfloat16"


def test_config_says_what_published_readers_look_for(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["NVLM_D"] and config["model_type"] == "NVLM_D"
    assert config["llm_config"]["rope_theta"] == 5000.0 and "rope_scaling" not in config["llm_config"]
    assert config["llm_config"]["model_type"] == "qwen2" and config["torch_dtype"] == "float32"
    assert config["vision_config"]["num_attention_heads"] == 5  # the real ones
    # keys without a fallback in serving programs
    for key in ("select_layer", "ps_version", "downsample_ratio", "force_image_size", "min_dynamic_patch",
                "max_dynamic_patch", "dynamic_image_size", "use_thumbnail"):  # fmt: skip
        assert key in config
    for key in ("norm_type", "qk_normalization", "qkv_bias", "hidden_act", "layer_norm_eps", "initializer_factor"):
        assert key in config["vision_config"]
    assert str(exported) not in (exported / "config.json").read_text()


def test_config_keys_cover_the_published_ones_that_describe_the_model(exported: Path) -> None:
    """Twin of the check against the published config.json: the names, from the reference sheet."""
    config = json.loads((exported / "config.json").read_text())
    top = {"architectures", "auto_map", "downsample_ratio", "dynamic_image_size", "force_image_size", "llm_config",
           "max_dynamic_patch", "min_dynamic_patch", "model_type", "ps_version", "select_layer", "template",
           "torch_dtype", "use_backbone_lora", "use_llm_lora", "use_thumbnail", "vision_config"}  # fmt: skip
    assert top <= set(config)


def test_config_against_the_published_file() -> None:
    import os

    fixtures = os.environ.get("NVLM_FIXTURES")
    if not fixtures:
        pytest.skip("NVLM_FIXTURES is not set: the published config.json is not at hand")
    from test_key_map import FULL_SIZE

    theirs = json.loads((Path(fixtures) / "nvlm-d-72b/config.json").read_text())
    recipe = make_recipe(Path("none"))
    ids = {"im_start": 151644, "im_end": 151645, "pad": 151643, "image": 151654}
    ours = hf.model_config(FULL_SIZE, recipe, ids, "bf16")
    ignored = {"model_type", "rope_scaling", "pad_token_id", "initializer_range"}  # deliberately other, or of no effect
    for section in (None, "llm_config", "vision_config"):
        mine, published = (ours, theirs) if section is None else (ours[section], theirs[section])
        for key in set(mine) & set(published) - ignored - {"llm_config", "vision_config"}:
            assert mine[key] == published[key], (section, key)
    assert json.loads((Path(fixtures) / "nvlm-d-72b/preprocessor_config.json").read_text()) == hf.preprocessor_config(
        FULL_SIZE
    )


def test_tied_heads_are_left_out_and_said_so(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = make_recipe(tokenizer_folder, **{"model.language_model.tie_word_embeddings": True})
    tied = random_weights(recipe, seed=5)
    tied.tensors[key_map.LM_HEAD] = tied.tensors[
        "language_model.model.embed_tokens.weight"
    ]  # some checkpoints name both
    out = hf.export(tied, recipe, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert key_map.LM_HEAD not in read_all(out)
    assert config["tie_word_embeddings"] is True and config["llm_config"]["tie_word_embeddings"] is True
    report = verify.verify(out, tied, recipe)
    assert report["ok"] and report["logits"], report["problems"]
    results = verify.compare_logits(out, tied, key_map.model_from_recipe(recipe), config, streamed=True)
    assert all(result["max_difference"] <= result["tolerance"] / 4 for result in results.values())


def test_out_that_holds_something_is_refused(tmp_path: Path, recipe: dict[str, Any], weights: MemoryWeights) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        hf.export(weights, recipe, out)
    assert leftovers(tmp_path) == ["out"] and leftovers(out) == ["mine.txt"]


def test_an_empty_out_is_filled(tmp_path: Path, recipe: dict[str, Any], weights: MemoryWeights) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.incomplete").mkdir()  # an export that was killed
    (tmp_path / ".out.incomplete" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    hf.export(weights, recipe, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(tmp_path: Path, recipe: dict[str, Any]) -> None:
    bad = random_weights(recipe)
    del bad.tensors["projector.norm.bias"]
    bad.tensors["vision_model.extra"] = torch.zeros(1)
    bad.tensors["projector.fc2.weight"] = bad.tensors["projector.fc2.weight"].T.contiguous()
    with pytest.raises(CheckpointError) as error:
        hf.export(bad, recipe, tmp_path / "out")
    for words in (
        "missing: projector.norm.bias [80]",
        "unexpected: vision_model.extra",
        "projector.fc2.weight is [56, 48]",
    ):
        assert words in str(error.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, recipe: dict[str, Any], value: float) -> None:
    bad = random_weights(recipe)
    bad.tensors["language_model.model.norm.weight"][7] = value
    with pytest.raises(CheckpointError, match=r"language_model\.model\.norm\.weight .* NaN or infinite"):
        hf.export(bad, recipe, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, recipe: dict[str, Any], weights: MemoryWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(SetupError, match="free"):
        hf.export(weights, recipe, tmp_path / "new" / "out")
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, recipe: dict[str, Any], weights: MemoryWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shards.write_safetensors, []

    def fill_up(*args: Any) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(shards, "write_safetensors", fill_up)
    with pytest.raises(SetupError, match="no space left"):
        hf.export(weights, recipe, tmp_path / "out", max_shard_size="40KB")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("size", "count"), [("4GB", 4 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), (77, 77)])
def test_shard_sizes(size: str | int, count: int) -> None:
    assert shards.parse_size(size) == count


@pytest.mark.parametrize("size", ["large", "-1GB", "0", "4TB"])
def test_shard_sizes_that_are_none(size: str) -> None:
    with pytest.raises(CheckpointError, match="max-shard-size"):
        shards.parse_size(size)


def test_unknown_dtype(tmp_path: Path, recipe: dict[str, Any], weights: MemoryWeights) -> None:
    with pytest.raises(CheckpointError, match="fp16"):
        hf.export(weights, recipe, tmp_path / "out", dtype="fp16")


class TestTokenizer:
    def test_nothing_there(self, tmp_path: Path, recipe: dict[str, Any], weights: MemoryWeights) -> None:
        with pytest.raises(CheckpointError, match="holds no tokenizer"):
            hf.export(weights, recipe, tmp_path / "out", tokenizer_path=tmp_path / "nowhere")

    def test_missing_token_is_named(self, tmp_path: Path) -> None:
        folder = make_tokenizer(tmp_path / "tokenizer")
        text = (folder / "tokenizer.json").read_text().replace("<|vision_pad|>", "<|vision_pat|>")
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"no token <\|vision_pad\|>"):
            hf.special_token_ids(folder, 1000)

    def test_more_ids_than_the_embedding_has_rows(self, tokenizer_folder: Path) -> None:
        with pytest.raises(CheckpointError, match="vocab_size is 200"):
            hf.special_token_ids(tokenizer_folder, 200)

    def test_not_json(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="cannot be read"):
            hf.special_token_ids(tmp_path, 1000)

    def test_files_of_vocabulary_and_merges(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
        decoder = {str(i): {"content": token} for i, token in enumerate(tokens, 2)}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        assert hf.special_token_ids(tmp_path, 6) == {"pad": 2, "im_start": 3, "im_end": 4, "image": 5}


def test_code_of_others_is_not_run(exported: Path, tmp_path: Path) -> None:
    assert hf.foreign_code(exported) == []
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "modeling_nvlm_d.py").write_text("raise SystemExit('ran')")
    (copy / "more.py").write_text("")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["someone/else--tokenization.Tokenizer", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as error:
        hf.load_exported(copy)
    for words in ("modeling_nvlm_d.py", "more.py", "someone/else--tokenization"):
        assert words in str(error.value)


def test_export_command_verifies_and_reports(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint: Any = random_weights(recipe)
    checkpoint.earlier_run = checkpoint.continued_from = checkpoint.parts = None
    checkpoint.checkpoint = Namespace(run=tmp_path)  # nothing but its recipe.json
    (tmp_path / "recipe.json").write_text(json.dumps({"format": 1, "recipe": recipe}))
    checkpoint.identity = "a hash"
    checkpoint.recipe, checkpoint.step, checkpoint.state = recipe, 12, {"recipe_hash": "0123456789abcdef"}
    monkeypatch.setattr("nvlm_train.checkpoint.open_checkpoint", lambda path, checksums: checkpoint)
    args = Namespace(
        run="runs/tiny", out=str(tmp_path / "out"), no_verify=False, dtype="bf16", max_shard_size="4GB", json=False
    )
    assert hf.export_command(args) == 0
    assert "verified" in capsys.readouterr().out
    assert "0123456789abcdef" in (tmp_path / "out" / "README.md").read_text()

    verify_args = Namespace(out=str(tmp_path / "out"), against="runs/tiny", json=True)
    assert verify.verify_command(verify_args) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and set(report["logits"]) == {"text only", "one tile", "several tiles", "two images", "batch"}

    checkpoint.tensors["projector.norm.bias"] = checkpoint.tensors["projector.norm.bias"] + 1
    assert verify.verify_command(Namespace(out=str(tmp_path / "out"), against="runs/tiny", json=False)) == 1
    assert "mlp1.0.bias: 80 of 80 values are not the checkpoint's" in capsys.readouterr().out

    with pytest.raises(CheckpointError, match="not an empty folder"):
        hf.export_command(args)


def test_a_yi_template_without_yis_tokenizer_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = make_recipe(tokenizer_folder, **{"tokenizer.template": "nvlm_yi"})
    with pytest.raises(CheckpointError, match=r"has no <\|startoftext\|>, with which tokenizer.template nvlm_yi"):
        hf.export(random_weights(recipe), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
