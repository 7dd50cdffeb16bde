#!/usr/bin/env bash
# Create, run and delete on Google Kubernetes Engine, for every generation.
#
#   tpu_scripts/gke.sh create                     a cluster with a TPU node pool and JobSet
#   tpu_scripts/gke.sh image                      build this checkout's image
#   tpu_scripts/gke.sh run -- ARGUMENT...         'internvl-jax ARGUMENT...' on every host of the slice, with its log
#   tpu_scripts/gke.sh xpk -- ARGUMENT...         the same through XPK, on a cluster that 'xpk cluster create' made
#   tpu_scripts/gke.sh serve -- OPTION...         replicas of 'internvl-jax serve OPTION...' behind a service
#   tpu_scripts/gke.sh delete                     the cluster
#
# Flags come before the action. In the containers the bucket is at /bucket, for example:
#   gke.sh run -- chat --checkpoint /bucket/InternVL-Chat-V1-1-jax --mesh tensor=8 'Who are you?'
# shellcheck disable=SC2034,SC2153 # `render` reads settings by their names
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need PROJECT ZONE CLUSTER
JOBSET=v0.8.2
action=${ARGUMENTS[0]:-}
program=("${ARGUMENTS[@]:1}")
if [[ ${program[0]:-} == -- ]]; then
    program=("${program[@]:1}")
fi
place=(--project="$PROJECT" --zone="$ZONE")

# The node pool's machine and its name for Kubernetes: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
node_settings() {
    need ACCELERATOR
    read_accelerator
    CHIPS_PER_HOST=$((CHIPS / HOSTS))
    case $GENERATION in
    v4) NODE_MACHINE=ct4p-hightpu-4t NODE_ACCELERATOR=tpu-v4-podslice ;;
    v5e) NODE_MACHINE=ct5lp-hightpu-${CHIPS_PER_HOST}t NODE_ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) NODE_MACHINE=ct5p-hightpu-4t NODE_ACCELERATOR=tpu-v5p-slice ;;
    v6e) NODE_MACHINE=ct6e-standard-${CHIPS_PER_HOST}t NODE_ACCELERATOR=tpu-v6e-slice ;;
    tpu7x) NODE_MACHINE=tpu7x-standard-4t NODE_ACCELERATOR=tpu7x ;;
    esac
}

create() {
    node_settings
    need CAPACITY NAME
    local capacity=()
    case $CAPACITY in
    spot) capacity=(--spot) ;;
    reserved)
        need RESERVATION
        capacity=(--reservation-affinity=specific --reservation="$RESERVATION")
        ;;
    on-demand) ;;
    *) die "capacity is spot, on-demand or reserved, not $CAPACITY" ;;
    esac
    ask "creates the cluster $CLUSTER with $HOSTS $CAPACITY node(s) of $NODE_MACHINE in $ZONE, which cost money until 'gke.sh delete'"
    run gcloud container clusters create "$CLUSTER" "${place[@]}" --workload-pool="$PROJECT.svc.id.goog" \
        --addons=GcsFuseCsiDriver --num-nodes=1 --machine-type=e2-standard-4
    run gcloud container node-pools create "$NAME" --cluster="$CLUSTER" "${place[@]}" --machine-type="$NODE_MACHINE" \
        --tpu-topology="$TOPOLOGY" --num-nodes="$HOSTS" --scopes=cloud-platform "${capacity[@]}"
    run gcloud container clusters get-credentials "$CLUSTER" "${place[@]}"
    run kubectl apply --server-side \
        -f "https://github.com/kubernetes-sigs/jobset/releases/download/$JOBSET/manifests.yaml"
    render service_account.yaml | apply
    # The pods' service account may use the bucket.
    local number=PROJECT_NUMBER
    $DRY_RUN || number=$(gcloud projects describe "$PROJECT" '--format=value(projectNumber)')
    run gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --role=roles/storage.objectUser \
        --member="principal://iam.googleapis.com/projects/$number/locations/global/workloadIdentityPools/$PROJECT.svc.id.goog/subject/ns/default/sa/$SERVICE_ACCOUNT"
}

# A manifest with its ${NAMES} filled in from the settings.
render() {
    local text name value
    text=$(<"$SCRIPTS/manifests/$1")
    for name in NAME IMAGE BUCKET SERVICE_ACCOUNT HOSTS CHIPS_PER_HOST TOPOLOGY NODE_ACCELERATOR COMMAND LIBTPU_FLAGS; do
        value=${!name:-}
        text=${text//"\${$name}"/"$value"} # quoted: bash 5.2 would take an & for the name
    done
    printf '%s\n' "$text"
}

apply() {
    if $DRY_RUN; then
        echo "kubectl apply -f - <<END"
        cat
        echo "END"
    else
        kubectl apply -f -
    fi
}

# COMMAND: the program as YAML's flow list, which is JSON. LIBTPU_FLAGS: of the generation.
program_settings() {
    ((${#program[@]})) || die "what shall run? gke.sh $action -- chat --checkpoint /bucket/... 'Who are you?'"
    COMMAND=$(python3 -c 'import json, sys; print(json.dumps(["internvl-jax", *sys.argv[1:]]))' "${program[@]}")
    # shellcheck source=libtpu_flags.env
    source "$SCRIPTS/libtpu_flags.env"
    local flags=LIBTPU_FLAGS_$GENERATION
    LIBTPU_FLAGS=${!flags}
}

case $action in
create)
    need BUCKET SERVICE_ACCOUNT
    create
    ;;
image)
    need IMAGE
    run gcloud builds submit --project="$PROJECT" --config="$SCRIPTS/manifests/cloudbuild.yaml" \
        --substitutions="_IMAGE=$IMAGE" "$SCRIPTS/.."
    ;;
run)
    need NAME BUCKET IMAGE SERVICE_ACCOUNT
    node_settings
    program_settings
    run kubectl delete jobset "$NAME" --ignore-not-found
    render jobset.yaml | apply
    # Process 0 prints: the pod with completion index 0.
    run kubectl wait --for=condition=Ready --timeout=30m pod \
        -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
    run kubectl logs --follow \
        -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" -c internvl
    ;;
serve)
    need NAME BUCKET IMAGE SERVICE_ACCOUNT
    node_settings
    ((HOSTS == 1)) || die "serve runs on slices of one host, and $ACCELERATOR has $HOSTS: see docs/serving.md"
    program=(serve --host 0.0.0.0 --port 8000 --api-key-file /keys/keys "${program[@]}")
    program_settings
    render serve.yaml | apply
    run kubectl rollout status --timeout=35m deployment "$NAME"
    ;;
xpk)
    need NAME IMAGE
    node_settings
    program_settings
    run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
        --tpu-type="$ACCELERATOR" --num-slices=1 --docker-image="$IMAGE" \
        --env="LIBTPU_INIT_ARGS=$LIBTPU_FLAGS" --command="$(printf 'internvl-jax' && printf ' %q' "${program[@]}")"
    ;;
delete)
    ask "deletes the cluster $CLUSTER in $ZONE with all its nodes"
    run gcloud container clusters delete "$CLUSTER" "${place[@]}" --quiet
    ;;
*) die "say what to do: create, image, run, serve, xpk or delete (--help tells more)" ;;
esac
