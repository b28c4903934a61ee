"""Every command of 'From laptop to sites' runs, in its order, and does what it says."""

import contextlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import psutil
import pytest
from loopback import BIN, free_port, missing, until

from prelort.adapters import peft_folder
from prelort.federation.site_keys import SiteKeys
from prelort.secure.signatures import fingerprint

PAGE = Path(__file__).parents[2] / "docs" / "sites.md"
STAYS = re.compile(r"scripts/(superlink|supernode)\.sh")


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def processes_in(folder: Path) -> list[str]:
    """Command lines of the living processes that have to do with this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(folder) in line and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
    return found


@pytest.mark.chaos
@pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}")
@pytest.mark.timeout(600)
def test_the_page_can_be_followed(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    commands = commands_of(PAGE)
    assert commands[:3] == ["prelort new my-federation", "cd my-federation", "scripts/demo.sh"]
    assert len(commands) == 20
    folder, staying = tmp_path, list[subprocess.Popen[bytes]]()
    try:
        for command in commands:
            if command.startswith("cd "):
                folder = folder / command.removeprefix("cd ")
                continue
            words = shlex.split(command)
            if STAYS.match(command):
                if words[-1].isdecimal():
                    words[-1] = str(free_port())
                with (folder / "logs" / "staying.log").open("ab") as log:
                    staying.append(
                        subprocess.Popen(
                            words,
                            cwd=folder,
                            env=environment,
                            stdout=log,
                            stderr=log,
                            start_new_session=True,
                        )
                    )
                if "superlink" in command:
                    log_file = folder / "logs" / "staying.log"
                    until(lambda f=log_file: "running on" in f.read_text(), 60, "the SuperLink")
                continue
            ended = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
            assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
            if command == "scripts/demo.sh":
                assert (folder / "runs" / "demo" / "adapters" / "rank-16").is_dir()
                assert "Perplexity by rank prefix" in ended.stdout
                assert (folder / "runs" / "demo" / "report.html").is_file()
                keys = SiteKeys(folder / "runs" / "demo").read()
                assert keys == {
                    site.name: fingerprint((site / "key.pub").read_bytes())
                    for site in (folder / "sites").iterdir()
                }
                assert processes_in(folder) == []
    finally:
        for process in staying:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
        for process in staying:
            process.wait(60)
        for file in folder.glob("sites/*/site.toml"):
            subprocess.run([BIN / "prelort", "site", "stop", file], check=True)
    adapter, _ = peft_folder.load(folder / "adapter-rank-4")
    assert adapter.rank == 4
    assert all((factors.B != 0).any() for factors in adapter.layers.values())
    assert processes_in(folder) == []
