"""The command line on the golden checkpoint: what it is asked and answers, and how tests start it as a process."""

import os
import subprocess
import sys

from support.golden import DATA, bundle

BUNDLE, LLAVA = DATA / "internvl_chat_v1_1", DATA / "llava_1_5"
CHECKPOINT = BUNDLE / "checkpoint"
_, FACTS = bundle("internvl_chat_v1_1")
PROMPTS = {prompt["id"]: prompt for prompt in FACTS["prompts"]}
TEXT, SEEN = PROMPTS["text_only"], PROMPTS["en_single"]  # RGB: the same pixels on the reference's two paths
IMAGE = str(BUNDLE / FACTS["images"]["rgb"]["file"])
QUESTION = SEEN["question"].removeprefix("<image>\n")
GOLDEN = ("chat", "--checkpoint", str(CHECKPOINT), "--max-new-tokens", "32")


def process(cache, *argv, code=None, **options):
    """Start `internvl-jax ARGV` in a process of its own; `code` runs first."""
    start = f"import sys\n{code or ''}\nfrom internvl_jax.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    environment.update(TERM="xterm", COLUMNS="100", PROMPT_TOOLKIT_NO_CPR="1")
    return subprocess.Popen([sys.executable, "-c", start, *argv], env=environment, **options)
