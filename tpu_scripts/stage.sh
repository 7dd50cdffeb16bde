#!/usr/bin/env bash
# Put a checkpoint into the bucket, once; every worker then reads its own part of it. Runs here, not on the slice.
#
#   tpu_scripts/stage.sh DIRECTORY [--dry-run]
#
# DIRECTORY: a converted checkpoint, or a published one, which is first converted in the directory beside it (disk: twice
# its size). The bucket is created where it does not exist, in the zone's region.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE BUCKET CHECKPOINT
((${#ARGUMENTS[@]} == 1)) || die "name one directory: stage.sh DIRECTORY"
directory=${ARGUMENTS[0]%/}
[[ -f $directory/config.json ]] || die "$directory has no config.json: name a checkpoint's directory"
ask "uploads $directory to gs://$BUCKET/$CHECKPOINT, where it costs storage until you delete it"
if [[ ! -f $directory/params/_METADATA ]]; then
    if [[ ! -f $directory-jax/params/_METADATA ]]; then
        run internvl-jax convert "$directory" "$directory-jax"
    fi
    directory=$directory-jax
fi
if $DRY_RUN || ! gcloud storage buckets describe "gs://$BUCKET" --project="$PROJECT" >/dev/null 2>&1; then
    run gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" --location="${ZONE%-*}" \
        --uniform-bucket-level-access
fi
run gcloud storage rsync --recursive "$directory" "gs://$BUCKET/$CHECKPOINT"
$DRY_RUN || echo "Staged. Next: $SCRIPTS/chat.sh 'What is in this picture?' photo.jpg" >&2
