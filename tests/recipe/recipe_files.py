"""A small valid recipe for the tests of recipes and of the command line."""

from __future__ import annotations

from pathlib import Path

BASE = """\
run_name: small
output_dir: runs/small
model:
  vision: {hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4, image_size: 32,
           patch_size: 8}
  language_model:
    hidden_size: 48
    intermediate_size: 80
    num_hidden_layers: 3
    num_attention_heads: 6
    num_key_value_heads: 2
    vocab_size: 320
tokenizer: {path: tok}
data:
  mixture:
    digits: {path: digits.jsonl, weight: 3}
    text: {path: text.jsonl}
  max_tokens_per_sample: 128
  pack_tokens: 512
global_batch: {samples: 32}
max_steps: 100
optimizer:
  lr: 1e-3
"""


def write(folder: Path, text: str = BASE, name: str = "r.yaml") -> str:
    """Writes a recipe and returns its path as text, the way it is typed on a command line."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)
