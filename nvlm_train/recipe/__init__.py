"""Recipes: YAML in, a checked and immutable `Recipe` out. Imports neither torch nor deepspeed."""
