"""Launching, DeepSpeed and the optimizer. The only package that imports deepspeed."""
