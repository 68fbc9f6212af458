# shellcheck shell=bash
# What the batch scripts share: settings, places, Python, and steps. Read by `source`, not run.
# Settings are environment variables; slurm/README.md lists them all.

set -uo pipefail # not -e: what a failed step means is decided where it is started

say() { echo "[$(date '+%F %T')] ${TITLE:-nvlm}: $*"; }
stop() { # CODE TEXT: ends the batch script
    local code=$1
    shift
    if ((code == 0)); then say "$*"; else say "$*" >&2; fi
    exit "$code"
}

# ------------------------------------------------------------------------------------------------------------- the job

JOB=${SLURM_JOB_ID:?is started by sbatch, not by hand: sbatch slurm/train.sbatch R.yaml}
# scontrol takes the number of an array for all of its elements
JOB_NAME_FOR_SCONTROL=$JOB
if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then JOB_NAME_FOR_SCONTROL=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
RESTART=${SLURM_RESTART_COUNT:-0}
export NVLM_ATTEMPT=$JOB_NAME_FOR_SCONTROL.$RESTART # the folder in RUN/attempts
NODES=${SLURM_JOB_NUM_NODES:-1}
# shellcheck disable=SC2034 # read by train.sbatch
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

job_field() { # NAME: what Slurm knows of this job, such as JobState
    scontrol -o show job "$JOB_NAME_FOR_SCONTROL" 2>/dev/null | head -n 1 | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

# Whether this job may still be run again by us. Slurm shows COMPLETING while the processes of a job that it ends are ending;
# of these only the time limit is no reason to stay away. Cancelled is cancelled; after a node failure or the grace of a
# preemption Slurm runs the job again by itself.
is_ours() {
    case $(job_field JobState) in
    RUNNING | "") ;;
    *) [[ "$(job_field Reason)" == TimeLimit ]] ;;
    esac
}

requeue() { # runs this job again, under the same number; does not return
    local try
    trap '' TERM # Slurm ends what a script has started as soon as it is told, scontrol too
    for ((try = 0; ; try++)); do
        is_ours || stop 1 "not requeued: Slurm is ending this job itself ($(job_field JobState))"
        if scontrol requeue "$JOB_NAME_FOR_SCONTROL"; then break; fi
        ((try < 5)) || stop 1 "not requeued: scontrol failed; was the job submitted with --no-requeue?"
        sleep 2
    done
    say "requeued"
    if [[ -n "${EXCLUDED:-}" ]]; then
        scontrol update "JobId=$JOB_NAME_FOR_SCONTROL" "ExcNodeList=$EXCLUDED" && say "without $EXCLUDED from now on"
    fi
    # a script that ends by itself in the grace of a preemption counts as complete, and its job never runs again
    trap 'exit 0' TERM
    for ((try = 0; try < 600; try++)); do
        is_ours || exit 0
        sleep 1 &
        wait $!
    done
    exit 1
}

# ---------------------------------------------------------------------------------------------------------- the place

NVLM_HOME=${NVLM_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
cd "$NVLM_HOME" || stop 2 "NVLM_HOME=$NVLM_HOME: no such folder on $(hostname); it must be shared by all nodes"

export PYTHONPATH=$NVLM_HOME${PYTHONPATH:+:$PYTHONPATH} # this checkout, whatever else is installed
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM=false
# compute nodes have no internet: nobody waits for an answer from there
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1} HF_HUB_DISABLE_TELEMETRY=1
export WANDB_MODE=${WANDB_MODE:-offline}

# what differs between clusters
if [[ -n "${NVLM_SITE:-}" ]]; then
    site=$NVLM_SITE
    if [[ "$site" != */* ]]; then site=slurm/sites/$site.sh; fi
    [[ -r "$site" ]] || stop 2 "NVLM_SITE=$NVLM_SITE: no file $site; there are: $(cd slurm/sites && echo *.sh)"
    # shellcheck source=/dev/null
    source "$site"
fi

# Python: in a container, in NVLM_VENV, or in .venv
IN_CONTAINER=() # words between srun and a command
INSIDE=()       # words before a command, behind srun or without
if [[ -z "${NVLM_CONTAINER:-}" ]]; then
    NVLM_VENV=${NVLM_VENV:-$NVLM_HOME/.venv}
    PYTHON=$NVLM_VENV/bin/python
    [[ -x "$PYTHON" ]] || stop 2 "no $PYTHON: run scripts/install, or set NVLM_VENV to an environment, or NVLM_CONTAINER"
else
    PYTHON=python3
    mounts=${NVLM_MOUNTS:-$NVLM_HOME}
    if [[ "$NVLM_CONTAINER" == *.sif ]]; then
        INSIDE=(apptainer exec --nv --bind "$mounts" --pwd "$NVLM_HOME" "$NVLM_CONTAINER")
    else
        pyxis=()
        IFS=, read -ra list <<<"$mounts"
        for mount in "${list[@]}"; do
            if [[ "$mount" != *:* ]]; then mount=$mount:$mount; fi
            pyxis+=("$mount")
        done
        IN_CONTAINER=(--container-image="$NVLM_CONTAINER" --container-mounts="$(IFS=, && echo "${pyxis[*]}")"
            --container-workdir="$NVLM_HOME" --no-container-mount-home)
    fi
fi

# Runs Python beside the batch script, on its node.
here() {
    if ((${#IN_CONTAINER[@]})); then
        srun --overlap --nodes=1 --ntasks=1 --nodelist="${SLURMD_NODENAME:-$(hostname -s)}" "${IN_CONTAINER[@]}" "$PYTHON" "$@"
    else
        ${INSIDE[@]+"${INSIDE[@]}"} "$PYTHON" "$@"
    fi
}

# Runs Python as a step of one task, so that Slurm accounts for it and scancel reaches it.
one_step() {
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # not inherited by srun since 22.05
    srun --nodes=1 --ntasks=1 --input=none ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} \
        ${INSIDE[@]+"${INSIDE[@]}"} "$PYTHON" "$@"
}

# RANKS RECIPE [k=v ...]: sets RUN to the recipe's output_dir, and MAX_STEPS; every mistake in the recipe is found here.
# shellcheck disable=SC2034 # read by the scripts
read_recipe() {
    local found
    found=$(here "$NVLM_HOME/slurm/read_recipe.py" "$@") || return 2
    RUN=${found%%$'\n'*}
    if [[ "$found" == *$'\n'* ]]; then MAX_STEPS=${found#*$'\n'}; else MAX_STEPS=""; fi
}

# RUN [MAX_STEPS]: whether a run has reached its end, and this number of steps where one is given.
is_done() {
    local step
    [[ -e "$1/DONE" ]] || return 1
    step=$(tr -d ' \n' <"$1/DONE" | sed -n 's/.*"step":\([0-9]*\).*/\1/p')
    [[ -z "${2:-}" || -z "$step" ]] || ((step >= $2))
}

# The run that must be complete before this job may start: a chain that broke ends here.
after_the_one_before() {
    if [[ -n "${NVLM_AFTER:-}" ]] && ! is_done "$NVLM_AFTER"; then
        stop 1 "nothing done: $NVLM_AFTER is not complete (no file DONE); what comes before this job in its chain failed"
    fi
}

first_lines() {
    say "job $NVLM_ATTEMPT on $NODES node(s): $SLURM_JOB_NODELIST; in $NVLM_HOME"
    say "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ', changed')"
    say "until $(job_field EndTime); site ${NVLM_SITE:-none}; python ${NVLM_CONTAINER:-$PYTHON}"
}
