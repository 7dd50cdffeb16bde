#!/usr/bin/env bash
# Delete the slice, so that it costs no more. The bucket stays.
#
#   tpu_scripts/delete.sh [--dry-run] [--yes]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME
read_accelerator
place=(--project="$PROJECT" --zone="$ZONE")
ask "deletes $NAME ($ACCELERATOR) in $ZONE with everything on its disks"
case $KIND in
queued) run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet ;;
instance) run gcloud compute instances delete "$NAME" "${place[@]}" --quiet ;;
group)
    run gcloud compute instance-groups managed delete "$NAME" "${place[@]}" --quiet
    run gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --quiet
    run gcloud compute resource-policies delete "$NAME" --project="$PROJECT" --region="${ZONE%-*}" --quiet
    ;;
esac
if [[ -n ${BUCKET:-} ]] && ! $DRY_RUN; then
    echo "gs://$BUCKET is still there; 'gcloud storage rm --recursive gs://$BUCKET' deletes it" >&2
fi
