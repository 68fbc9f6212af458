"""What scripts/bench/gpu is made of. `main` plans and records without torch; `worker` is the process that measures."""
