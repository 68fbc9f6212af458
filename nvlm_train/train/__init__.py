"""The training loop and what it uses: loss, state, stopping, validation, metrics."""
