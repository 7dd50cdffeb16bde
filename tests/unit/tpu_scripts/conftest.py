"""Settings, dry runs, and commands that record their calls."""

import shlex

import pytest
from support.tpu_script_cases import SETTINGS, start


@pytest.fixture
def env(tmp_path):
    file = tmp_path / "settings.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in SETTINGS.items()))
    return file


@pytest.fixture
def dry(env):
    """The commands of a dry run, a string each, with the quotes of the shell taken off."""

    def run(script, *arguments):
        done = start(script, "--dry-run", *arguments, env=env)
        assert done.returncode == 0, done.stderr
        return [" ".join(shlex.split(line)) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def notes(tmp_path):
    """A directory of commands that write down how they were called; `answer` says what they print."""

    class Notes:
        path = tmp_path / "bin"
        log = tmp_path / "log"

        def answer(self, body, *commands):
            self.path.mkdir(exist_ok=True)
            for command in commands or ("gcloud", "kubectl", "xpk"):
                file = self.path / command
                file.write_text(f'#!/bin/bash\necho "{command} $*" >>{self.log}\n{body}\n')
                file.chmod(0o755)

        @property
        def calls(self):
            return self.log.read_text().splitlines() if self.log.exists() else []

    made = Notes()
    made.answer("")
    return made
