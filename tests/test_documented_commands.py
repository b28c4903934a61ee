"""Every command that the documentation and the help show is one that the command line takes."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer.main

from prelort import cli
from prelort import config as configuration
from prelort.cli import info, inspect, plan, run, sites, tune
from prelort.deployment.settings import SiteSettings
from prelort.errors import ConfigError
from prelort.methods import find
from prelort.study import definition

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    ROOT / "src" / "prelort" / "deployment" / "template" / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if not page.is_symlink()),
]
HELP = {
    f"{module.__name__}.{name}": text
    for module in (info, inspect, plan, run, sites, tune)
    for name, text in vars(module).items()
    if name.endswith("EXAMPLES")
}
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES} | HELP
OWN_METHODS = {"momentum:Momentum"}
"""Methods that a page defines."""


def commands(text: str, program: str) -> list[list[str]]:
    """The words of each command of ``program``: in blocks, in code in a sentence, in the help."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = re.findall(rf"^((?:\S+=\S+ )?{program} .*)", fenced, re.MULTILINE)
    lines += re.findall(rf"^(?: {{2}}| {{4}})((?:\S+=\S+ )?{program} .*)", text, re.MULTILINE)
    lines += re.findall(rf"`({program} [^`]*)`", text)
    found = []
    for line in lines:
        if "━" not in line:  # output
            line = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)", "OUTPUT", line)  # of another command
            words = shlex.split(line, comments=True)
            ends = [words.index(word) for word in (">", "&&", "|") if word in words]
            found.append(words[words.index(program) : min(ends, default=len(words))])
    return found


def check_arguments(words: list[str]) -> None:
    """Parse the words as the command line would. Raises what it would refuse them with."""
    command, name, arguments = typer.main.get_command(cli.app), "prelort", words[1:]
    while hasattr(command, "commands"):
        if not arguments:
            return
        with typer.Context(command) as context:
            name, command, arguments = command.resolve_command(context, arguments)
    if arguments or not any(parameter.required for parameter in command.params):
        with command.make_context(name, arguments) as context:
            given = context.params
        configuration.load(None, [*(given.get("overrides") or ())])
        for method in given.get("method") or ():
            if method not in OWN_METHODS:
                find(method)


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_is_taken(name: str) -> None:
    for words in commands(TEXTS[name], "prelort"):
        check_arguments(words)


def test_there_are_commands_and_wrong_ones_are_noticed() -> None:
    assert sum(len(commands(text, "prelort")) for text in TEXTS.values()) > 100
    for wrong in (
        "prelort ron my.toml",
        "prelort run --nonsense",
        "prelort plan --set training.batch=2",
        "prelort run my.toml --method prelorr",
        "prelort site chek site.toml",
    ):
        ((*words,),) = commands(f"    {wrong}", "prelort")
        with pytest.raises((ConfigError, click.ClickException)):
            check_arguments(words)


def test_every_target_and_every_option_of_a_script_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for text in TEXTS.values():
        for words in commands(text, "make"):
            for target in (word for word in words[1:] if "=" not in word):
                assert f"\n{target}:" in makefile
        for _, script, *arguments in commands(text, "python"):
            for option in filter(re.compile("--[a-z]").match, arguments):
                source = (ROOT / script).read_text()
                assert f'"{option}"' in source or 'f"--{' in source, (script, option)


def test_every_python_example_is_on_a_page_whose_examples_a_test_runs() -> None:
    examples = {name: text.count("```python") for name, text in TEXTS.items()}
    assert {name: count for name, count in examples.items() if count} == {
        "README.md": 1,  # end_to_end/test_documentation.py
        "CONTRIBUTING.md": 1,  # the same
        "docs/own-task.md": 2,  # test_own_task.py
        "docs/reference.md": 5,  # end_to_end/test_python_examples.py
        "docs/use-an-adapter.md": 4,  # tasks/test_use_an_adapter.py
    }


@pytest.mark.parametrize("name", [name for name in TEXTS if "```toml" in TEXTS[name]])
def test_every_configuration_is_one(name: str, tmp_path: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", TEXTS[name], re.DOTALL):
        values = tomllib.loads(block)
        if values.keys() & {"trainer", "peers"}:
            SiteSettings.model_validate({"partition": 0, **values})
        elif values.keys() & {"compare", "tune"}:
            (tmp_path / "study.toml").write_text(block)
            definition.load(tmp_path / "study.toml")
        else:
            configuration.check(values)
