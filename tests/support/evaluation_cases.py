"""Scorer cases computed by the original code, and real predictions where they lie beside the repository."""

import gzip
import json
import os
from pathlib import Path

import pytest
from support import paths

DATA = paths.DATA / "evaluation"
# Third-party predictions, never part of the project: the tests that need them are skipped without.
REAL = Path(os.environ.get("REAL_PREDICTIONS", paths.ROOT.parent / "shared" / "real_predictions"))
# Of MMBench's and CCBench's tables: key in the bundles, name of the benchmark, whose scripts.
MMBENCH_TABLES = [
    ("mmbench_dev_20230712", "mmbench-en-dev", "internvl"),
    ("mmbench_dev_cn_20231003", "mmbench-cn-dev", "internvl"),
    ("mmbench_test_en_20231003", "mmbench-en-test", "internvl"),
    ("mmbench_test_cn_20231003", "mmbench-cn-test", "internvl"),
    ("ccbench_dev_cn", "ccbench", "internvl"),
    ("mmbench_dev_20230712", "mmbench-en-dev", "llava"),
    ("mmbench_dev_cn_20231003", "mmbench-cn-dev", "llava"),
]


def cases(name):
    """The bundle of that name: {"items": [...], "expected": {...}, ...}."""
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


def pairs(name):
    """(item, expected per item) of a bundle."""
    bundle = cases(name)
    assert len(bundle["items"]) == len(bundle["expected"]["per_item"]) > 10
    return list(zip(bundle["items"], bundle["expected"]["per_item"]))


def real(name):
    """A file of real predictions; skips the test where there is none."""
    if not (REAL / name).exists():
        pytest.skip(f"no real predictions at {REAL} (REAL_PREDICTIONS names their directory)")
    return REAL / name
