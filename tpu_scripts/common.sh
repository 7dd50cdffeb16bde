# shellcheck shell=bash disable=SC2034,SC2153 # variables are set here and used there, or come from the env file
# Sourced by the other scripts: settings, dry runs, confirmations, and how to reach the workers of a slice.
set -euo pipefail
if ((BASH_VERSINFO[0] < 4)); then
    echo "error: bash 4 or newer is needed (macOS: brew install bash; Cloud Shell has it)" >&2
    exit 2
fi

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SETTINGS=(PROJECT ZONE NAME ACCELERATOR CAPACITY RESERVATION BUCKET CHECKPOINT MESH CLUSTER IMAGE SERVICE_ACCOUNT)
DRY_RUN=false
YES=false
ARGUMENTS=() # what is left after the flags

die() {
    echo "error: $*" >&2
    exit 2
}

usage() { # the comment at the head of the script that was started
    sed -n '2,/^[^#]/{s/^# \{0,1\}//;t show;b;:show p}' "$0"
    echo
    echo "Flags: --dry-run (print the commands, run none), --yes (do not ask), --env FILE (default: .env beside the"
    echo "scripts), and the settings of env.example: --project, --zone, --name, --accelerator, ..."
}

# Read "$@": flags of our own, settings, and after them (or after --) the arguments. Flags go before the env file's values.
parse() {
    local env_file="" name setting
    local -A given=()
    while (($#)); do
        case $1 in
        --help | -h) usage && exit 0 ;;
        --dry-run) DRY_RUN=true && shift ;;
        --yes | -y) YES=true && shift ;;
        --env)
            (($# > 1)) || die "--env needs a file"
            env_file=$2 && shift 2
            ;;
        --)
            shift
            break
            ;;
        --*)
            name=${1%%=*}
            name=${name#--}
            setting=$(tr 'a-z-' 'A-Z_' <<<"$name")
            # shellcheck disable=SC2076 # words, not a pattern
            [[ " ${SETTINGS[*]} " =~ " $setting " ]] || die "there is no flag --$name; --help lists them"
            if [[ $1 == *=* ]]; then
                given[$setting]=${1#*=} && shift
            else
                (($# > 1)) || die "--$name needs a value"
                given[$setting]=$2 && shift 2
            fi
            ;;
        *) break ;;
        esac
    done
    ARGUMENTS=("$@")
    if [[ -n $env_file && ! -f $env_file ]]; then
        die "there is no file $env_file"
    fi
    env_file=${env_file:-$SCRIPTS/.env}
    if [[ -f $env_file ]]; then
        # shellcheck disable=SC1090
        source "$env_file"
    fi
    for setting in "${!given[@]}"; do
        printf -v "$setting" '%s' "${given[$setting]}"
    done
}

need() { # SETTING...: all of them must have a value
    local missing=() setting
    for setting in "$@"; do
        [[ -n ${!setting:-} ]] || missing+=("$setting")
    done
    ((${#missing[@]} == 0)) || die "set ${missing[*]} in $SCRIPTS/.env (see env.example) or with flags"
}

run() { # COMMAND...: print it, and unless this is a dry run, run it
    if $DRY_RUN; then
        printf '%q ' "$@" | sed 's/ $//'
        echo
    else
        { printf '+' && printf ' %q' "$@" && echo; } >&2
        "$@"
    fi
}

ask() { # WHAT: before money is spent or something is deleted
    if $DRY_RUN || $YES; then
        return
    fi
    [[ -t 0 ]] || die "this $1; nobody is here to ask: add --yes"
    local answer
    read -r -p "This $1. Go on? [y/N] " answer
    [[ $answer == [yY]* ]] || die "stopped; nothing was done"
}

# Sets GENERATION, CHIPS, TOPOLOGY, HOSTS, and KIND: how a slice of this kind is created.
#   queued    a queued resource (Cloud TPU API), the way for v5e and v4
#   instance  a Compute Engine instance: one host of v6e or v5p
#   group     a managed instance group with a workload policy: several hosts of v6e or v5p
read_accelerator() {
    need ACCELERATOR
    local number=${ACCELERATOR##*-}
    [[ $number =~ ^[1-9][0-9]*$ ]] || die "accelerator $ACCELERATOR is not understood: v5litepod-8, v6e-8, v5p-8, ..."
    case $ACCELERATOR in
    v5litepod-* | v5e-*) GENERATION=v5e CHIPS=$number ACCELERATOR=v5litepod-$number ;;
    v6e-*) GENERATION=v6e CHIPS=$number ;;
    v5p-*) GENERATION=v5p CHIPS=$((number / 2)) ;; # names of v5p and v4 count cores, two per chip
    v4-*) GENERATION=v4 CHIPS=$((number / 2)) ;;
    tpu7x-*) GENERATION=tpu7x CHIPS=$((number / 2)) ;;
    *) die "accelerator $ACCELERATOR is not known: v5litepod-N, v6e-N, v5p-N, v4-N or, with gke.sh, tpu7x-N" ;;
    esac
    case $GENERATION-$CHIPS in
    v5e-1 | v6e-1) TOPOLOGY=1x1 ;;
    v5e-4 | v6e-4) TOPOLOGY=2x2 ;;
    v5e-8 | v6e-8) TOPOLOGY=2x4 ;;
    v5e-16 | v6e-16) TOPOLOGY=4x4 ;;
    v5e-32 | v6e-32) TOPOLOGY=4x8 ;;
    v5e-64 | v6e-64) TOPOLOGY=8x8 ;;
    v5e-128 | v6e-128) TOPOLOGY=8x16 ;;
    v5e-256 | v6e-256) TOPOLOGY=16x16 ;;
    v4-4 | v5p-4 | tpu7x-4) TOPOLOGY=2x2x1 ;;
    v4-8 | v5p-8 | tpu7x-8) TOPOLOGY=2x2x2 ;;
    v4-16 | v5p-16 | tpu7x-16) TOPOLOGY=2x2x4 ;;
    v4-32 | v5p-32 | tpu7x-32) TOPOLOGY=2x4x4 ;;
    v4-64 | v5p-64 | tpu7x-64) TOPOLOGY=4x4x4 ;;
    v4-128 | v5p-128 | tpu7x-128) TOPOLOGY=4x4x8 ;;
    v4-256 | v5p-256 | tpu7x-256) TOPOLOGY=4x8x8 ;;
    *) die "there is no slice of $CHIPS $GENERATION chips here: 1, 4, 8, 16, ... 256 (v4, v5p and tpu7x from 4)" ;;
    esac
    HOSTS=$((CHIPS > 4 ? CHIPS / 4 : 1)) # four chips per host,
    if [[ $TOPOLOGY == 2x4 ]]; then
        HOSTS=1 # but these eight share one
    fi
    case $GENERATION in
    v5e | v4) KIND=queued ;;
    *) KIND=$( ((HOSTS > 1)) && echo group || echo instance) ;;
    esac
}

# Names of a group's instances, in WORKERS. A dry run cannot ask and names them by number.
list_workers() {
    local list=(gcloud compute instance-groups managed list-instances "$NAME" --project="$PROJECT" --zone="$ZONE"
        '--format=value(instance.basename())')
    if $DRY_RUN; then
        run "${list[@]}"
        mapfile -t WORKERS < <(seq -f "$NAME-%g" 0 $((HOSTS - 1)))
    else
        mapfile -t WORKERS < <("${list[@]}")
        ((${#WORKERS[@]} == HOSTS)) || die "$NAME has ${#WORKERS[@]} of $HOSTS instances; is it still being created?"
    fi
}

each_worker() { # COMMAND...: once per instance at the same time, {} being its name; fails if one fails
    local worker pids=() pid failed=0
    list_workers
    for worker in "${WORKERS[@]}"; do
        if $DRY_RUN; then
            run "${@//\{\}/$worker}"
        else
            run "${@//\{\}/$worker}" &
            pids+=($!)
        fi
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    return $failed
}

on_workers() { # SHELL_COMMAND: the same on every worker at the same time, as a program of several processes needs it
    need PROJECT ZONE NAME
    local place=(--project="$PROJECT" --zone="$ZONE")
    case $KIND in
    queued) run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1" ;;
    instance) run gcloud compute ssh "$NAME" "${place[@]}" --command="$1" ;;
    group) each_worker gcloud compute ssh '{}' "${place[@]}" --command="$1" ;;
    esac
}

copy_to_workers() { # FILE... DIRECTORY
    need PROJECT ZONE NAME
    local place=(--project="$PROJECT" --zone="$ZONE") files=("${@:1:$#-1}") target=${!#}
    case $KIND in
    queued) run gcloud compute tpus tpu-vm scp "${files[@]}" "$NAME:$target" "${place[@]}" --worker=all ;;
    instance) run gcloud compute scp "${files[@]}" "$NAME:$target" "${place[@]}" ;;
    group) each_worker gcloud compute scp "${files[@]}" "{}:$target" "${place[@]}" ;;
    esac
}

internvl() { # ARGUMENT...: run the internvl-jax command on every worker; process 0 prints
    # shellcheck disable=SC2016 # the worker expands it
    on_workers "$(printf '. "$HOME/internvl/env" && internvl-jax' && printf ' %q' "$@")"
}

# Where the bucket is mounted on a worker, below its home directory, which differs from the one here.
MOUNT=internvl/bucket
