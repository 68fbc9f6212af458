"""`python -m nvlm_train`: the same command as `nvlm-train`, for torchrun and srun."""

from nvlm_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
