#!/usr/bin/env bash
# Ask one question, with pictures from here.
#
#   tpu_scripts/chat.sh 'What is in this picture?' [PICTURE...] [--dry-run goes first]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME CHECKPOINT MESH
read_accelerator
((${#ARGUMENTS[@]})) || die "ask something: chat.sh 'What is in this picture?' photo.jpg"
pictures=("${ARGUMENTS[@]:1}")
options=(--checkpoint "$MOUNT/$CHECKPOINT" --mesh "$MESH")
for picture in "${pictures[@]}"; do
    [[ -f $picture ]] || die "there is no picture $picture"
    options+=(--image "$(basename "$picture")")
done
if ((${#pictures[@]})); then
    copy_to_workers "${pictures[@]}" .
fi
internvl chat "${options[@]}" "${ARGUMENTS[0]}"
