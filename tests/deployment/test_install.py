"""What an operator installs: a wheel, and the image, whose steps are followed without Docker."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copied() -> dict[Path, str]:
    """What the Dockerfile copies -> where to."""
    lines = [line.split()[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    return {ROOT / name: target for *names, target in lines for name in names}


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation made by prelort as the image installs it: from a wheel of the copied files."""
    pytest.importorskip("hatchling", reason="make dev")
    folder = tmp_path_factory.mktemp("image")
    for path, target in copied().items():
        into = folder / target.lstrip("/")
        place = into / path.name if target.endswith("/") else into
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    pip, wheels, site = (sys.executable, "-m", "pip"), folder / "wheels", folder / "installed"
    (source,) = re.findall(r"^RUN pip install --no-cache-dir (/\S+)$", DOCKERFILE, re.MULTILINE)
    build = ("--no-deps", "--no-build-isolation", "--wheel-dir", wheels)
    run(*pip, "wheel", folder / source.lstrip("/"), *build)
    local = ("--no-index", "--find-links", wheels)
    run(*pip, "install", "prelort", "--no-deps", *local, "--target", site)
    code = f"import prelort.cli as c; assert c.__file__.startswith({str(site)!r}); c.main()"
    made = folder / "federation"
    run(sys.executable, "-c", code, "new", made, PYTHONPATH=str(site))
    return made


def test_the_wheel_makes_a_whole_federation(federation: Path) -> None:
    template = ROOT / "src" / "prelort" / "deployment" / "template"
    for file in template.rglob("*"):
        assert (federation / file.relative_to(template)).exists()


def test_the_containers_run_scripts_that_the_folder_has(federation: Path) -> None:
    services: dict[str, Any] = yaml.safe_load((federation / "compose.yaml").read_text())["services"]
    settings = (federation / "scripts" / "settings.sh").read_text()
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    for service in services.values():
        assert os.access(federation / service["command"].split()[0], os.X_OK)
        assert service["volumes"] == [f".:{workdir}"]
        for name in service.get("environment", {}):
            assert f'\n{name}="${{{name}:-' in settings
    (port,) = services["server"]["ports"]
    assert f'PORT="${{PORT:-{port.split(":")[0]}}}"' in settings
    assert services["server"]["environment"]["BIND"] == "0.0.0.0"


def test_the_documented_containers_exist(federation: Path) -> None:
    services = yaml.safe_load((federation / "compose.yaml").read_text())["services"]
    page = (federation / "README.md").read_text()
    commands = re.findall(r"docker compose (?:exec|run --rm|up --detach) (.+)", page)
    assert len(commands) == 8
    for service, *script in map(str.split, commands):
        assert service in services
        assert not script or (federation / script[0]).is_file() or script[0] == "prelort"


def test_the_image_has_what_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = re.findall(r"^FROM python:3\.(\d+)", DOCKERFILE, re.MULTILINE)
    assert f"Programming Language :: Python :: 3.{python}" in project["classifiers"]
    (torch,) = re.findall(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"TORCH ?= {torch}\n" in (ROOT / "Makefile").read_text()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert kept == {path.name for path in copied()}
