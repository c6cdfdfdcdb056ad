#!/bin/bash
@HEADER@
#
# Written by `python -m vit_efficient.submit`. To go on with the run at any time: sbatch THIS_FILE
@SBATCH@

# -- what to run --------------------------------------------------------------------------------
@RUN@

# -- this cluster: @SITE@
@SETUP@
python=(@PYTHON@)

# -- how the processes find each other; every job has a port of its own, from 20000 to 29999 ----
@ADDRESS@
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# -- train: one process a device; USR1 tells them that the time limit is near (docs/admins.md) --
export VIT_EFFICIENT_JOB="$run/slurm"
"${python[@]}" -m vit_efficient.cluster.attempt begin "$run" || exit

@SRUN@ "${python[@]}" \
    -m vit_efficient.fit --recipe "$run/slurm/recipe.yaml" --resume auto
code=$?

# -- again? Not after its end, a mistake, or scancel; otherwise as long as it gets further ------
"${python[@]}" -m vit_efficient.cluster.attempt end "$run" "$code"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" || {
        next=$(sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID" \
            @AGAIN@"$script") &&
            "${python[@]}" -m vit_efficient.cluster.attempt follow "$run" "$next"
    }
    code=$?
fi
exit "$code"
