#!/usr/bin/env bash
# Ask one question, with images from here.
#
#   tpu_scripts/chat.sh 'What is in this picture?' [IMAGE...] [--dry-run goes first]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME CHECKPOINT MESH
read_accelerator
((${#ARGUMENTS[@]})) || die "ask something: chat.sh 'What is in this picture?' photo.jpg"
images=("${ARGUMENTS[@]:1}")
options=(--checkpoint "$MOUNT/$CHECKPOINT" --mesh "$MESH")
for image in "${images[@]}"; do
    [[ -f $image ]] || die "there is no image $image"
    options+=(--image "$(basename "$image")")
done
if ((${#images[@]})); then
    copy_to_workers "${images[@]}" .
fi
internvl chat "${options[@]}" "${ARGUMENTS[0]}"
