#!/usr/bin/env bash
# Runs on a worker, started by install.sh with the archive and libtpu_flags.env beside it: worker_setup.sh GENERATION BUCKET
#
# Everything goes to ~/internvl: a virtual environment, the mounted bucket, and `env`, which a command sources.
set -euo pipefail
generation=$1 bucket=$2
here=$(cd "$(dirname "$0")" && pwd)
home=$HOME/internvl
mkdir -p "$home/bucket"

# The images have Python 3.10; uv brings the one that is needed.
command -v "$HOME/.local/bin/uv" >/dev/null || python3 -m pip install --user --quiet uv
tar -xzf "$here/internvl-jax.tar.gz" -C "$home"
[[ -d $home/venv ]] || "$HOME/.local/bin/uv" venv --python 3.12 "$home/venv"
"$HOME/.local/bin/uv" pip install --python "$home/venv/bin/python" --quiet "$home/internvl-jax[tpu]"

if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq --yes gcsfuse
fi
# implicit-dirs: directories that `gcloud storage` wrote are there without an object of their own.
mountpoint -q "$home/bucket" || gcsfuse --implicit-dirs "$bucket" "$home/bucket"

# shellcheck source=/dev/null
source "$here/libtpu_flags.env"
flags=LIBTPU_FLAGS_$generation
cat >"$home/env" <<END
export PATH=$home/venv/bin:\$PATH
export LIBTPU_INIT_ARGS="${!flags}"
# Programs that one worker compiled, the next run of any worker reads.
export JAX_COMPILATION_CACHE_DIR=$home/bucket/xla-cache
END
"$home/venv/bin/python" -c "import jax, internvl_jax; print('jax', jax.__version__, 'is installed')"
