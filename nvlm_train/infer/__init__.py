"""Use after training: generate and evaluate."""
