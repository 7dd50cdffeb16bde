"""`python -m internvl_jax` is the `internvl-jax` command."""

import sys

from internvl_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
