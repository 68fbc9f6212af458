"""What a run will take on a cluster, from the recipe alone: `nvlm-train plan`. Imports neither torch nor deepspeed."""
