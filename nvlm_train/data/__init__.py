"""From files to `Batch`: sources, order, packing, images, tokens, loader."""
