"""The files that travel with an export. They import only torch, numpy, Pillow and transformers, never nvlm_train."""
