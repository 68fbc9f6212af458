"""Names that other trainers use, answered with ours: one table for the error messages and for the README."""

from __future__ import annotations

from typing import NamedTuple


class Foreign(NamedTuple):
    """One row: the names other tools use, whose they are, our key (empty: there is none), and what to know."""

    names: tuple[str, ...]
    tools: str
    ours: str
    note: str = ""


_HF, _LF, _SWIFT, _AXO, _IVL, _MEG = "HF Trainer", "LLaMA-Factory", "ms-swift", "Axolotl", "InternVL", "Megatron"


def _tools(*names: str) -> str:
    return ", ".join(names)


FOREIGN: tuple[Foreign, ...] = (
    Foreign(
        ("per_device_train_batch_size", "per_gpu_train_batch_size", "train_batch_size"),
        _tools(_HF, _LF, _SWIFT, _IVL),
        "micro_batch_size",
        "counts packs, not samples; samples per step are global_batch.samples",
    ),
    Foreign(
        ("gradient_accumulation_steps", "grad_accum"),
        _tools(_HF, _LF, _SWIFT, _AXO, _IVL),
        "global_batch.samples",
        "accumulation follows from it and is shown by `recipe show`, never set",
    ),
    Foreign(("global_batch_size",), _MEG, "global_batch.samples"),
    Foreign(("learning_rate", "llm_lr"), _tools(_HF, _LF, _SWIFT, _AXO, _IVL), "optimizer.lr"),
    Foreign(("vit_lr", "vision_lr", "mm_vision_tower_lr"), _tools(_SWIFT, "LLaVA"), "optimizer.module_lr.vision"),
    Foreign(
        ("aligner_lr", "merger_lr", "mm_projector_lr", "lr_groups"),
        _tools(_SWIFT, _AXO, "LLaVA"),
        "optimizer.module_lr.projector",
    ),
    Foreign(
        ("min_lr_rate", "min_lr_ratio", "cosine_min_lr_ratio", "lr_scheduler_kwargs", "lr_scheduler_args"),
        _tools(_HF, _AXO),
        "schedule.min_lr",
        "a learning rate, not a share",
    ),
    Foreign(
        ("lr_scheduler_type", "lr_scheduler", "lr_decay_style"),
        _tools(_HF, _LF, _SWIFT, _AXO, _IVL, _MEG),
        "schedule.name",
    ),
    Foreign(
        ("warmup_ratio", "lr_warmup_fraction"),
        _tools(_HF, _LF, _SWIFT, _AXO, _MEG),
        "schedule.warmup_steps",
        "a number below 1 is a share of the run's steps",
    ),
    Foreign(
        ("lr_warmup_iters", "lr_warmup_samples"),
        _MEG,
        "schedule.warmup_steps",
        "in steps: samples / global_batch.samples",
    ),
    Foreign(
        ("lr_decay_iters", "lr_decay_samples"), _MEG, "schedule.decay_steps", "in steps: samples / global_batch.samples"
    ),
    Foreign(
        ("train_iters", "num_steps", "total_steps"),
        _MEG,
        "max_steps",
    ),
    Foreign(("train_samples",), _MEG, "max_samples"),
    Foreign(
        ("num_train_epochs", "epochs"),
        _tools(_HF, _LF, _SWIFT, _AXO, _IVL),
        "num_epochs",
        "of all sources together; a source's weight says how often its own samples come",
    ),
    Foreign(
        ("adam_beta1", "adam_beta2", "adam_betas"),
        _tools(_HF, _LF, _SWIFT, _AXO, _MEG),
        "optimizer.betas",
        "[beta1, beta2]",
    ),
    Foreign(("adam_epsilon", "adam_eps"), _tools(_HF, _LF, _SWIFT, _AXO, _MEG), "optimizer.eps"),
    Foreign(
        ("clip_grad", "gradient_clipping", "grad_clip", "max_gradient_norm"),
        _tools(_MEG, "DeepSpeed"),
        "optimizer.max_grad_norm",
    ),
    Foreign(
        ("optim", "optimizer_type"),
        _tools(_HF, _LF, _SWIFT, _AXO),
        "optimizer.implementation",
        "always AdamW; adamw_bnb_8bit and adamw_8bit are adamw_8bit",
    ),
    Foreign(
        ("max_seq_length", "max_length", "cutoff_len", "decoder_seq_length", "seq_length", "model_max_length"),
        _tools(_HF, _LF, _SWIFT, _IVL, _MEG),
        "data.max_tokens_per_sample",
        "image tokens included",
    ),
    Foreign(
        ("sequence_len", "packing_seq_length", "max_packed_tokens", "packing_length"),
        _tools(_AXO, _SWIFT, _IVL, _MEG),
        "data.pack_tokens",
    ),
    Foreign(
        ("packing", "sample_packing", "neat_packing", "padding_free", "use_packed_ds"),
        _tools(_LF, _SWIFT, _AXO, _IVL),
        "data.pack_tokens",
        "samples are always packed, with attention kept inside each",
    ),
    Foreign(("max_dynamic_patch", "max_num_tiles", "max_num"), _tools(_IVL, _MEG), "data.tiling.max_tiles"),
    Foreign(("dynamic_image_size", "use_tiling"), _tools(_IVL, _MEG), "data.tiling.max_tiles", "1: no tiling"),
    Foreign(("use_thumbnail",), _tools(_IVL, _MEG), "data.tiling.thumbnail"),
    Foreign(("use_tile_tags",), _MEG, "data.tiling.tags", "one_d or none"),
    Foreign(
        ("force_image_size", "img_h", "img_w", "image_resolution"), _tools(_IVL, _MEG, _LF), "model.vision.image_size"
    ),
    Foreign(
        ("freeze_vision_tower", "freeze_vit", "freeze_backbone", "unfreeze_vit_layers", "freeze_mm_modules"),
        _tools(_LF, _SWIFT, _IVL, _MEG, _AXO),
        "train.vision",
        "frozen, full or lora",
    ),
    Foreign(
        ("freeze_multi_modal_projector", "freeze_aligner", "freeze_mlp", "freeze_vision_projection"),
        _tools(_LF, _SWIFT, _IVL, _MEG),
        "train.projector",
        "frozen, full or lora",
    ),
    Foreign(
        ("freeze_language_model", "freeze_llm", "freeze_lm"),
        _tools(_LF, _SWIFT, _IVL, _MEG),
        "train.language_model",
        "frozen, full or lora",
    ),
    Foreign(
        ("finetuning_type", "train_type", "tuner_type", "adapter", "mm_tunable_parts"),
        _tools(_LF, _SWIFT, _AXO, "LLaVA"),
        "train",
        "frozen, full or lora for each module",
    ),
    Foreign(
        ("model_name_or_path", "base_model", "load", "pretrained_checkpoint"),
        _tools(_HF, _LF, _AXO, _MEG, _IVL),
        "init_from.language_model",
        "and init_from.vision; init_from.run continues from a run of ours",
    ),
    Foreign(("vision_path", "vit_path", "vision_model_type"), _tools(_IVL, _MEG), "init_from.vision"),
    Foreign(("mlp_path",), _IVL, "init_from.run"),
    Foreign(
        ("tokenizer_name_or_path", "tokenizer_model", "tokenizer_config", "tokenizer_name"),
        _tools(_HF, _AXO, _MEG),
        "tokenizer.path",
    ),
    Foreign(
        ("conv_style", "chat_template", "tokenizer_prompt_format"),
        _tools(_IVL, _AXO, _SWIFT, _MEG),
        "tokenizer.template",
    ),
    Foreign(("system_prompt", "default_system"), _tools(_SWIFT, _LF), "tokenizer.system"),
    Foreign(
        ("dataset", "datasets", "meta_path", "data_path", "train_dataset"),
        _tools(_LF, _SWIFT, _AXO, _IVL, _MEG),
        "data.mixture",
        "a mapping of names to sources",
    ),
    Foreign(("interleave_probs", "repeat_time", "sampling_ratio"), _tools(_LF, _SWIFT, _IVL), "data.mixture.*.weight"),
    Foreign(
        ("image_folder", "media_dir", "root", "image_dir"), _tools("LLaVA", _LF, _IVL), "data.mixture.*.image_root"
    ),
    Foreign(
        ("dataloader_num_workers", "num_workers", "preprocessing_num_workers"),
        _tools(_HF, _LF, _SWIFT, _IVL, _MEG),
        "data.num_threads",
    ),
    Foreign(("eval_dataset", "val_dataset", "test_datasets"), _tools(_LF, _SWIFT, _AXO), "validation.sources"),
    Foreign(
        ("val_size", "val_set_size", "split_dataset_ratio"), _tools(_LF, _AXO, _SWIFT), "validation.held_out_share"
    ),
    Foreign(
        ("eval_steps", "eval_interval", "evals_per_epoch"),
        _tools(_HF, _LF, _SWIFT, _AXO, _MEG),
        "validation.every_steps",
    ),
    Foreign(("eval_iters", "max_eval_samples"), _tools(_MEG, _HF), "validation.max_samples"),
    Foreign(("early_stopping_patience",), _tools(_HF, _AXO), "validation.early_stop.patience"),
    Foreign(
        ("metric_for_best_model", "load_best_model_at_end"), _HF, "validation.best", "the name of a validated source"
    ),
    Foreign(
        ("save_steps", "save_interval", "saves_per_epoch"),
        _tools(_HF, _LF, _SWIFT, _AXO, _MEG),
        "checkpoint.every_steps",
    ),
    Foreign(("save_total_limit",), _tools(_HF, _LF, _SWIFT, _AXO), "checkpoint.keep_last"),
    Foreign(("async_save",), _MEG, "checkpoint.asynchronous"),
    Foreign(
        ("save_only_model",),
        _tools(_HF, _LF, _SWIFT, _AXO),
        "checkpoint.weights_every",
        "steps between milestones of bf16 weights, beside the checkpoints a resume needs",
    ),
    Foreign(("logging_steps", "log_interval"), _tools(_HF, _LF, _SWIFT, _AXO, _MEG), "log.every_steps"),
    Foreign(
        ("report_to", "tensorboard_dir", "use_wandb"),
        _tools(_HF, _LF, _SWIFT, _AXO, _MEG),
        "log.to",
        "[wandb, tensorboard]",
    ),
    Foreign(("wandb_name",), _AXO, "run_name"),
    Foreign(("save", "output_path", "save_dir"), _MEG, "output_dir"),
    Foreign(
        ("overwrite_output_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints"),
        _tools(_HF, _LF, _SWIFT, _AXO, _IVL),
        "",
        "starting again resumes by itself; `train --resume never` refuses a run directory that holds a run",
    ),
    Foreign(
        ("bf16", "fp16", "torch_dtype", "params_dtype"),
        _tools(_HF, _LF, _SWIFT, _AXO, _IVL, _MEG),
        "precision",
        "bf16 or fp32",
    ),
    Foreign(
        (
            "gradient_checkpointing",
            "grad_checkpoint",
            "vit_gradient_checkpointing",
            "recompute_granularity",
            "use_llm_gradient_checkpointing",
        ),
        _tools(_HF, _LF, _SWIFT, _AXO, _IVL, _MEG),
        "activation_checkpointing",
        "none, selective or full",
    ),
    Foreign(
        ("use_lora", "use_llm_lora", "use_backbone_lora", "peft_type"),
        _tools(_LF, _SWIFT, _AXO, _IVL),
        "train.language_model",
        "frozen, full or lora; the same for vision and projector",
    ),
    Foreign(("lora_r", "lora_rank"), _tools(_LF, _SWIFT, _AXO), "train.lora.language_model.rank", "by module"),
    Foreign(("lora_alpha",), _tools(_LF, _SWIFT, _AXO), "train.lora.language_model.alpha", "by module"),
    Foreign(("lora_dropout",), _tools(_LF, _SWIFT, _AXO), "train.lora.language_model.dropout", "by module"),
    Foreign(
        ("lora_target", "lora_target_modules", "target_modules", "lora_target_linear"),
        _tools(_LF, _SWIFT, _AXO),
        "train.lora.language_model.targets",
        "by module; default: all linear layers",
    ),
    Foreign(
        ("load_in_4bit", "quantization_bit", "quant_bits", "bnb_4bit_quant_type"),
        _tools(_HF, _LF, _SWIFT, _AXO),
        "train.quantize",
        "none or nf4",
    ),
    Foreign(
        ("deepspeed", "deepspeed_config", "zero_optimization"),
        _tools(_HF, _LF, _SWIFT, _AXO, _IVL),
        "zero",
        "the DeepSpeed configuration follows from the recipe; `recipe show` prints it",
    ),
    Foreign(("zero_stage",), "DeepSpeed", "zero.stage"),
    Foreign(
        ("flash_attn", "flash_attention", "attn_impl", "attn_implementation", "use_flash_attn"),
        _tools(_LF, _AXO, _SWIFT, _IVL, _MEG),
        "attention",
        "auto, torch, varlen, flash_attn_2, 3 or 4",
    ),
    Foreign(
        ("use_liger_kernel", "enable_liger_kernel"),
        _tools(_LF, _AXO, _SWIFT),
        "kernels",
        "auto, torch, triton or liger",
    ),
    Foreign(("init_method_std",), _MEG, "model.projector.initializer_std"),
    Foreign(("data_seed", "random_seed"), _tools(_HF, _SWIFT), "seed"),
    Foreign(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "tensor_parallel_size", "context_parallel_size"),
        _tools(_MEG, _SWIFT, _AXO),
        "zero.stage",
        "memory is shared out by ZeRO-3 alone",
    ),
    Foreign(
        ("world_size", "num_gpus", "nproc_per_node", "nnodes"),
        _tools("torchrun", "DeepSpeed"),
        "",
        "the number of ranks is the launcher's; any number gives the same steps",
    ),
)

_BY_NAME: dict[str, Foreign] = {name: row for row in FOREIGN for name in row.names}


def answer(name: str) -> str | None:
    """What to write instead of another tool's `name` (`--per-device-train-batch-size` counts too), or None."""
    row = _BY_NAME.get(name.lstrip("-").replace("-", "_").lower())
    if row is None:
        return None
    note = f" ({row.note})" if row.note and row.ours else row.note
    return f"is a name of {row.tools}; " + (f"here it is {row.ours}{note}" if row.ours else note)


def markdown_table() -> str:
    """The table of the README: one line per row, in the order of `FOREIGN`."""
    lines = ["| elsewhere | whose | here | note |", "|---|---|---|---|"]
    for row in FOREIGN:
        ours = f"`{row.ours}`" if row.ours else "–"
        lines.append(f"| {', '.join(f'`{name}`' for name in row.names)} | {row.tools} | {ours} | {row.note} |")
    return "\n".join(lines) + "\n"
