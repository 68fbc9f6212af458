"""nvlm_train: train, fine-tune and export NVLM-style multimodal language models with DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
