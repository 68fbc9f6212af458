"""What the scripts need to know of a recipe: `read_recipe.py RANKS RECIPE [key=value ...]`, RANKS 0 if it is not known.

Prints output_dir and max_steps (empty where the length is told otherwise), a line each. Every mistake in the recipe is
told here, before a job or a rank is started. Imports no torch.
"""

from __future__ import annotations

import sys

from nvlm_train.errors import NvlmError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import refuse_unsupported, resolve

try:
    loaded = load_recipe(sys.argv[2], sys.argv[3:])
    refuse_unsupported(loaded)
    if int(sys.argv[1]):
        resolve(loaded.recipe, int(sys.argv[1]))
except (NvlmError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print(loaded.recipe.output_dir)
print(loaded.recipe.max_steps or "")
