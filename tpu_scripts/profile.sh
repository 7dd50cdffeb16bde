#!/usr/bin/env bash
# Record a trace of every program on the slice, and fetch it for xprof.
#
#   tpu_scripts/profile.sh [-- --batch-size 8]
#
# What follows -- goes to 'internvl-jax bench', which runs each program once under the profiler. Shown with:
#   pip install xprof && xprof --logdir profile
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME BUCKET CHECKPOINT MESH
read_accelerator
internvl bench --checkpoint "$MOUNT/$CHECKPOINT" --mesh "$MESH" --profile "$MOUNT/profile" "${ARGUMENTS[@]}"
run mkdir -p profile
run gcloud storage rsync --recursive "gs://$BUCKET/profile" profile
