from __future__ import annotations

import subprocess
import sys

import pytest

from prelort import tasks
from prelort.errors import ConfigError


def test_an_unknown_task_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="unknown task 'chta': did you mean 'chat'"):
        tasks.get("chta")


def test_dealing_and_naming_cost_no_torch() -> None:
    code = (
        "import sys, prelort.data.partition, prelort.data.ranks, prelort.tasks;"
        "print([m for m in ('torch', 'datasets', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
