#!/usr/bin/env bash
# Answer a JSONL file of questions. After an interruption or a preemption the same command resumes.
#
#   tpu_scripts/batch.sh QUESTIONS.jsonl [IMAGE_DIRECTORY]
#
# Paths of images in the file are relative to IMAGE_DIRECTORY. Questions, images and answers are in the bucket
# under batch/NAME_OF_THE_FILE; the answers are copied here at the end. With a MESH that one host can hold (tensor=4),
# every host has a model and answers its share; with a larger one all hosts compute each answer together.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME BUCKET CHECKPOINT MESH
read_accelerator
((${#ARGUMENTS[@]} == 1 || ${#ARGUMENTS[@]} == 2)) || die "name the questions: batch.sh QUESTIONS.jsonl [IMAGES]"
questions=${ARGUMENTS[0]} images=${ARGUMENTS[1]:-}
[[ -f $questions ]] || die "there is no file $questions"
[[ -z $images || -d $images ]] || die "there is no directory $images"
name=$(basename "$questions" .jsonl)
folder=gs://$BUCKET/batch/$name
run gcloud storage cp "$questions" "$folder/questions.jsonl"
if [[ -n $images ]]; then
    run gcloud storage rsync --recursive "$images" "$folder/images"
fi
internvl batch "$MOUNT/batch/$name/questions.jsonl" --output "$MOUNT/batch/$name/answers.jsonl" \
    --root "$MOUNT/batch/$name/images" --checkpoint "$MOUNT/$CHECKPOINT" --mesh "$MESH"
run gcloud storage cp "$folder/answers.jsonl" "$name.answers.jsonl"
