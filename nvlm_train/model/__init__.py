"""The NVLM models: vision tower, projector, decoder, and how pretrained weights get in."""
