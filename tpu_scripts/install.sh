#!/usr/bin/env bash
# Install this checkout on every worker of the slice, and mount the bucket there. Safe to repeat.
#
#   tpu_scripts/install.sh [--dry-run]
#
# Only committed files are installed (git archive HEAD).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME BUCKET
read_accelerator
folder=FOLDER
if ! $DRY_RUN; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
archive=$folder/internvl-jax.tar.gz
run git -C "$SCRIPTS/.." archive --format=tar.gz --prefix=internvl-jax/ --output="$archive" HEAD
copy_to_workers "$archive" "$SCRIPTS/worker_setup.sh" "$SCRIPTS/libtpu_flags.env" .
on_workers "bash worker_setup.sh $GENERATION $BUCKET"
$DRY_RUN || echo "Installed on $HOSTS host(s). Next: $SCRIPTS/stage.sh, once per bucket" >&2
