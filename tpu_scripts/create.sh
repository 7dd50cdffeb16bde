#!/usr/bin/env bash
# Create a TPU slice and wait until it is ready. It costs money until delete.sh deletes it.
#
#   tpu_scripts/create.sh [--accelerator v5litepod-8] [--capacity spot|on-demand|reserved] [--dry-run]
#
# v5e and v4 are queued resources; one host of v6e or v5p is a Compute Engine instance, several hosts are a managed
# instance group with a workload policy, which connects them. TPU7x is created by gke.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE NAME CAPACITY
read_accelerator
[[ $GENERATION != tpu7x ]] || die "TPU7x exists in GKE only: use gke.sh"
[[ $CAPACITY =~ ^(spot|on-demand|reserved)$ ]] || die "capacity is spot, on-demand or reserved, not $CAPACITY"
[[ $CAPACITY != reserved ]] || need RESERVATION
place=(--project="$PROJECT" --zone="$ZONE")
ask "creates the $CAPACITY slice $ACCELERATOR ($CHIPS chips, $HOSTS host(s)) as $NAME in $ZONE, which costs money until delete.sh"

create_queued() {
    local runtime=v2-alpha-tpuv5-lite options=()
    [[ $GENERATION == v5e ]] || runtime=tpu-ubuntu2204-base
    case $CAPACITY in
    spot) options=(--spot) ;;
    reserved) options=(--reserved --reservation="$RESERVATION") ;;
    esac
    local command=(compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}"
        --accelerator-type="$ACCELERATOR" --runtime-version="$runtime")
    if [[ $CAPACITY == reserved ]]; then # naming the reservation is in the alpha commands only
        run gcloud alpha "${command[@]}" "${options[@]}"
    else
        run gcloud "${command[@]}" "${options[@]}"
    fi
    local state="" describe=(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}"
        '--format=value(state.state)')
    if $DRY_RUN; then
        run "${describe[@]}"
        return
    fi
    until [[ $state == ACTIVE ]]; do
        state=$("${describe[@]}")
        echo "$(date +%T) $NAME is $state" >&2
        [[ $state != FAILED && $state != SUSPENDED ]] || die "$NAME is $state: see 'gcloud compute tpus queued-resources \
describe $NAME', then delete.sh and try another zone or capacity"
        [[ $state == ACTIVE ]] || sleep 30
    done
}

# What an instance and an instance template have in common.
machine_options() {
    local type=ct6e-standard-$((CHIPS < 4 || HOSTS == 1 ? CHIPS : 4))t
    [[ $GENERATION == v6e ]] || type=ct5p-hightpu-4t
    MACHINE=(--machine-type="$type" --image-project=ubuntu-os-accelerator-images
        --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --boot-disk-size=200GB --maintenance-policy=TERMINATE
        --scopes=cloud-platform)
    case $CAPACITY in
    spot) MACHINE+=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
    reserved) MACHINE+=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE
        --reservation-affinity=specific --reservation="$RESERVATION") ;;
    esac
}

create_group() {
    local region=${ZONE%-*}
    run gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" --region="$region" \
        --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
    run gcloud compute instance-templates create "$NAME" --project="$PROJECT" "${MACHINE[@]}"
    # All hosts at once or none; a single host is not replaced while a program runs.
    run gcloud compute instance-groups managed create "$NAME" "${place[@]}" --template="$NAME" --size="$HOSTS" \
        --workload-policy="projects/$PROJECT/regions/$region/resourcePolicies/$NAME" \
        --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing
    run gcloud compute instance-groups managed wait-until "$NAME" "${place[@]}" --stable
}

case $KIND in
queued) create_queued ;;
instance)
    machine_options
    run gcloud compute instances create "$NAME" "${place[@]}" "${MACHINE[@]}"
    ;;
group)
    machine_options
    create_group
    ;;
esac
$DRY_RUN || echo "$NAME is there. Next: $SCRIPTS/install.sh" >&2
