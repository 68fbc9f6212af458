"""The LoRA adapters of a run as a standard peft folder: adapter_config.json and adapter_model.safetensors.

The folder belongs to a base: a Hugging Face folder in the published layout that holds the weights beneath the adapters
(an export of the run this one started from, or the published model). Names are those of its modules, and the vision
tower's adapters get the rows or columns of its dummy heads. A projector that was trained as a whole goes in as peft's
`modules_to_save`. Merged exports need none of this: `export` without --adapter.

    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, trust_remote_code=True), OUT)
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_train import provenance
from nvlm_train.errors import CheckpointError
from nvlm_train.export import card, hf, licence, shards
from nvlm_train.log import get_logger
from nvlm_train.model import key_map
from nvlm_train.recipe.schema import Lora, Train

if TYPE_CHECKING:
    from torch import Tensor

    from nvlm_train.checkpoint import CheckpointWeights
    from nvlm_train.model.pretrained import ModelFolder
    from nvlm_train.recipe.schema import Model

log = get_logger(__name__)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's, before the base's own names


def export_adapter(
    checkpoint: CheckpointWeights,
    out: str | Path,
    base: str | Path,
    dtype: str = "fp32",
    licences: licence.Licences | None = None,
) -> Path:
    """Writes the adapters of `checkpoint` for the folder `base` into the folder `out`, and returns it.

    licences: default what the run recorded. Raises CheckpointError where the run has no adapters, has trained more than
    fits beside them, or where `base` is not the model they belong to; nothing is left behind then.
    """
    out, base = Path(out), Path(base)
    hf.check_out(out)
    folder = _open_base(base, key_map.model_from_recipe(checkpoint.recipe))
    tensors = adapter_tensors(checkpoint, folder.num_dummy_heads, dtype)
    config = adapter_config(checkpoint, base)
    licences = licences or licence.of_run(checkpoint)
    training = card.training_of(checkpoint)
    readme = card.model_card(checkpoint.recipe, licences, training, dtype=dtype, adapter=True)
    if licences.research_only:
        config[provenance.RESEARCH_KEY] = licences.label
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = out.parent / f".{out.name}.incomplete"
    hf.check_space(out, partial, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    with shards.held(partial):
        hf.check_out(out)
        try:
            shards.finished(partial, None)  # removes what an interrupted export has left
            save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(readme, encoding="utf-8")
            licence.write(partial, licences, card.identity(checkpoint.recipe, training))
            (partial / shards.LOCK).unlink()
            hf.give_name(partial, out)
        except BaseException as error:
            if isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error):
                error = OSError(errno.ENOSPC, "")
            hf.tidy_up(error, partial, out)
            raise
    return out


def adapter_tensors(checkpoint: CheckpointWeights, num_dummy_heads: int, dtype: str = "fp32") -> dict[str, Tensor]:
    """Every tensor of the adapter folder by its name there. num_dummy_heads: of the tower in the base."""
    import torch

    model, kind = key_map.model_from_recipe(checkpoint.recipe), getattr(torch, hf.DTYPES[dtype][0])
    if not checkpoint.adapters:
        raise CheckpointError(f"{checkpoint.path} has no LoRA adapters; export it without --adapter")
    whole = sorted(checkpoint.trained - set(checkpoint.adapters))
    beside = [name for name in whole if not name.startswith("projector.")]
    if beside:
        raise CheckpointError(
            f"{len(beside)} weights beside the adapters were trained as a whole, the first {beside[0]}; an adapter "
            "folder takes adapters and the projector: export it merged, without --adapter"
        )
    tensors = {_PREFIX + key_map.to_published(name): checkpoint.read(name).to(kind).contiguous() for name in whole}
    for weight, (a, b, _) in checkpoint.adapters.items():
        layer = _PREFIX + key_map.to_published(weight).removesuffix(".weight")
        read = checkpoint.checkpoint.read_master
        tensors[f"{layer}.lora_A.weight"] = _columns(weight, read(a), model, num_dummy_heads).to(kind).contiguous()
        tensors[f"{layer}.lora_B.weight"] = _rows(weight, read(b), model, num_dummy_heads).to(kind).contiguous()
    return tensors


def _columns(weight: str, a: Tensor, model: Model, num_dummy_heads: int) -> Tensor:
    """A [rank, inputs] with zeros for the inputs that dummy heads add: to the tower's attn.proj."""
    return key_map.pad(weight, a, model.vision, num_dummy_heads) if weight.endswith(".attn.proj.weight") else a


def _rows(weight: str, b: Tensor, model: Model, num_dummy_heads: int) -> Tensor:
    """B [outputs, rank] with zeros for the outputs that dummy heads add: to the tower's attn.qkv."""
    return key_map.pad(weight, b, model.vision, num_dummy_heads) if weight.endswith(".attn.qkv.weight") else b


def adapter_config(checkpoint: CheckpointWeights, base: Path) -> dict[str, Any]:
    """adapter_config.json as peft reads it; modules whose rank or alpha differ from the first stand in the patterns."""
    train = Train.model_validate(checkpoint.recipe["train"])
    options: dict[str, Lora] = {}
    for name in checkpoint.adapters:
        module = {"vision_model": "vision"}.get(name.split(".", 1)[0], name.split(".", 1)[0])
        options[key_map.to_published(name).removesuffix(".weight")] = getattr(train.lora, module)
    first = next(iter(options.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": first.rank,
        "lora_alpha": _plain(first.alpha),
        "rank_pattern": {name: lora.rank for name, lora in options.items() if lora.rank != first.rank},
        "alpha_pattern": {name: _plain(lora.alpha) for name, lora in options.items() if lora.alpha != first.alpha},
        "target_modules": sorted(options),
        "modules_to_save": ["mlp1"] if any(name.startswith("projector.") for name in checkpoint._own) else None,
        "lora_dropout": first.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "inference_mode": True,
    }


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _open_base(base: Path, model: Model) -> ModelFolder:
    """The folder as training would read it. Raises CheckpointError where it is not a whole model of these sizes."""
    from nvlm_train.model.pretrained import account, expected_shapes, open_model_folder

    try:
        folder = open_model_folder(base, model)
        account(expected_shapes(model), folder, may_be_new=())
    except CheckpointError as error:
        raise CheckpointError(f"{base} is not the base of these adapters: {error}") from None
    return folder


def _base_problems(checkpoint: CheckpointWeights, base: ModelFolder) -> list[str]:
    """Weights of the base that are not those the adapters were trained on, compared in the coarser type of the two."""
    import torch
    from tqdm import tqdm

    beneath, problems = checkpoint.without_adapters(), []
    frozen = [name for name in beneath.names() if name not in checkpoint.checkpoint.shapes]
    for name in tqdm(frozen, desc="base", unit="tensor", file=sys.stderr, leave=False):
        ours, theirs = beneath.read(name), base.read(name)
        coarse = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if torch.equal(ours.to(coarse), theirs.to(coarse)):
            continue
        merged = name in checkpoint.adapters and torch.equal(checkpoint.read(name).to(coarse), theirs.to(coarse))
        what = "has the adapter in it already: this is a merged export" if merged else "is not what lies beneath"
        problems.append(f"{base.where(name)} {what}; name an export of the weights that the run started from")
    return problems


# ----------------------------------------------------------------------------------------------------------- verifying


def verify_adapter(out: str | Path, checkpoint: CheckpointWeights, *, logits: bool = True) -> dict[str, Any]:
    """Compares an adapter folder with the checkpoint, in the form of `verify.verify`'s report: every tensor bit for
    bit, and the logits of base and adapters, loaded through transformers and peft, with those of the merged model."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from nvlm_train.export import verify

    out = Path(out)
    try:
        config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"])
        stored = load_file(out / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} is no complete adapter folder ({type(error).__name__}: {error}); export it again"
        ) from error
    folder = _open_base(base, key_map.model_from_recipe(checkpoint.recipe))
    kind = next(iter(stored.values())).dtype if stored else torch.float32
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(kind, "fp32")
    expected = adapter_tensors(checkpoint, folder.num_dummy_heads, dtype)
    values = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    values += [f"{name} is not in the checkpoint" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        if not torch.equal(expected[name], stored[name]):
            values.append(f"{name}: its values are not the checkpoint's")
        if not bool(torch.isfinite(stored[name]).all()):
            values.append(f"{name} holds NaN or infinite values")
    settings = adapter_config(checkpoint, base)
    wrong = [
        f"{key} is {config.get(key)!r}, expected {value!r}"
        for key, value in settings.items()
        if config.get(key) != value
    ]
    checks: list[dict[str, Any]] = []
    problems: list[str] = []

    def record(name: str, found: list[str], detail: str) -> None:
        checks.append({"name": name, "ok": not found, "detail": found[0] if found else detail})
        problems.extend(f"{name}: {problem}" for problem in found)

    record(CONFIG, wrong, "as the run's recipe says")
    record("values", values, f"{len(stored)} tensors equal the checkpoint's bit for bit, all finite")
    record("licences", licence.problems_of(out), "texts, card and configuration say what the run recorded")
    record("base", _base_problems(checkpoint, folder), f"{base} holds what the adapters were trained on")
    report: dict[str, Any] = {
        "out": str(out),
        "tensors": len(stored),
        "checks": checks,
        "problems": problems,
        "logits": {},
    }
    report["bytes"] = sum(tensor.nbytes for tensor in stored.values())
    if logits and not problems:
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        base_config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        skipped = verify._not_enough_memory(size, base_config)
        if skipped:
            checks.append({"name": "logits", "ok": None, "detail": skipped})
        else:
            _compare_logits(out, base, base_config, checkpoint, report, record)
    report["ok"] = not problems
    return report


def _compare_logits(
    out: Path,
    base: Path,
    base_config: dict[str, Any],
    checkpoint: CheckpointWeights,
    report: dict[str, Any],
    record: Any,
) -> None:
    from peft import PeftModel

    from nvlm_train.export import verify

    def load(folder: Path, dtype: str) -> Any:
        return PeftModel.from_pretrained(hf.load_exported(base, dtype), str(folder)).eval()

    model = key_map.model_from_recipe(checkpoint.recipe)
    # both in fp32: the base's own rounding is on both sides, and the merged weights are not rounded
    results = verify.compare_logits(out, checkpoint, model, {**base_config, "torch_dtype": "float32"}, load)
    report["logits"] = results
    found = [
        f"{case}: differ by {result['max_difference']:.2e}, more than {result['tolerance']:.2e}"
        for case, result in results.items()
        if not result["max_difference"] <= result["tolerance"]
    ]
    record("logits", found, f"{len(results)} inputs through transformers and peft equal the merged model's")
