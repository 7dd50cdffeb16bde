#!/usr/bin/env bash
# Measure the checkpoint on the slice: images, prompt tokens and tokens per second, memory, MFU.
#
#   tpu_scripts/bench.sh [-- --batch-size 1 8 32 --prompt-tokens 1024 --json]
#
# What follows -- goes to 'internvl-jax bench'.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME CHECKPOINT MESH
read_accelerator
internvl bench --checkpoint "$MOUNT/$CHECKPOINT" --mesh "$MESH" "${ARGUMENTS[@]}"
