"""The command line: ``prelort run | watch | plan | evaluate | report | export | new | ...``.

Heavy imports (torch, transformers, pydantic) are inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import json
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from prelort.errors import ConfigError, PrelortError
from prelort.quiet import quiet_libraries

if TYPE_CHECKING:
    from prelort.config import Config

app = typer.Typer(
    help="Federated LoRA fine-tuning for clients whose hardware affords different ranks.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set seed=3."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]

_OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)
"""No room, no permission, no such place: what a user can put right."""

RUN_EXAMPLES = """[bold]Examples[/bold]

  prelort run

  prelort run --method prelort --method zero-padding --out runs/first

  prelort run my.toml --set federation.rounds=50 --set seed=1

  prelort run --set model.name=Qwen/Qwen3-0.6B --set data.source=reports.csv

  prelort run --resume runs/first

  prelort run --engine simulation --client-cpus 2

  prelort run --track tensorboard --track mlflow

Without CONFIG the embedded default runs; `prelort config` prints it, to start your own from.
"""

WATCH_EXAMPLES = """[bold]Examples[/bold]

  prelort watch runs/first

  prelort watch runs/first/prelort

  prelort watch runs/first | tee first.log

It reads RUN/metrics.jsonl and nothing else, waits for a run that has not begun, and ends with the
run or on Ctrl-C, which does not stop the run.
"""

PLAN_EXAMPLES = """[bold]Examples[/bold]

  prelort plan --model Qwen/Qwen3-0.6B --memory 8GiB

  prelort plan my.toml --memory 16GB --set model.quantization=4bit

  prelort plan my.toml --set training.batch_size=2 --set data.max_length=512

  prelort plan --ranks 8,12,16 --json

Only the model's configuration is read, never its weights. Everything else (batch size, tokens,
precision, method, ...) comes from CONFIG as in `prelort run`. Leave a margin: docs/choose-ranks.md
says what is not counted.
"""


@app.command(epilog=RUN_EXAMPLES)
def run(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; without one, the embedded default.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Overrides method.name; several are compared."),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run (default: runs/METHOD-TIME)."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run in this folder.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="in-process, or simulation (Flower's, with Ray).")
    ] = "in-process",
    client_cpus: Annotated[
        int, typer.Option("--client-cpus", min=1, help="simulation: CPU cores for one client.")
    ] = 1,
    client_gpus: Annotated[
        float, typer.Option("--client-gpus", min=0, help="simulation: (share of) a GPU for one.")
    ] = 0.0,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="Tell a tracker too: tensorboard, mlflow, wandb; repeatable."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train one adapter for clients of mixed ranks, and measure it at every rank prefix."""
    from prelort import config as configuration

    if resume is not None and out is not None:
        raise ConfigError("give --out for a new run or --resume for an old one, not both")
    if resume is None:
        configuration.load(config, overrides or [])  # what is wrong there is told at once

    from prelort.report import trackers

    trackers.check(track or [])

    from prelort.experiment import several
    from prelort.experiment.run import run as run_one
    from prelort.report.progress import LiveProgress

    stage_of = _engine(engine, client_cpus, client_gpus)
    target, settings, names = _what_to_run(config, method or [], overrides or [], out, resume)
    console = _console()
    try:
        with LiveProgress(console, quiet=quiet) as progress:
            if len(names) == 1:
                folders = {names[0]: target}
                run_one(
                    settings,
                    target,
                    resume=resume is not None,
                    listeners=[progress],
                    stage_of=stage_of,
                    track=track or [],
                )
                several.write_results(folders, target)
            else:
                folders = {name: target / several.folder_name(name) for name in names}
                several.run_methods(
                    settings,
                    names,
                    target,
                    resume=resume is not None,
                    listeners=[progress],
                    stage_of=stage_of,
                    track=track or [],
                )
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"stopped; go on with: prelort run --resume {_plain(target)}", soft_wrap=True
        )
        raise typer.Exit(130) from None
    _show(console, folders, target)


@app.command(epilog=WATCH_EXAMPLES)
def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of several; begun or not.")],
) -> None:
    """Watch a run from another terminal: who trains, has answered or failed, and is missing."""
    from prelort.experiment.folder import logs_in
    from prelort.report import watch as watching

    with suppress(KeyboardInterrupt):  # the run goes on
        watching.watch(lambda: logs_in(run), str(run), _console())


@app.command(
    epilog="[bold]Examples[/bold]\n\n  prelort evaluate runs/first/prelort\n\n"
    "  prelort evaluate runs/first/prelort --set data.test=other.csv"
)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Measure a run's adapter again, at every rank prefix, perhaps on other data."""
    from prelort.experiment.inspect import evaluate_run
    from prelort.report.tables import comparison_table

    console = _console()
    with console.status("measuring", spinner="dots") if not quiet else console.capture():
        event = evaluate_run(run, overrides or [])
    console.print(comparison_table({run.name: [event]}))


@app.command(
    epilog="[bold]Examples[/bold]\n\n  prelort report runs/first\n\n"
    "  prelort report runs/first/prelort --out prelort.html"
)
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of several; finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write (default: RUN/report.html).")
    ] = None,
) -> None:
    """Write one page of HTML about a run: curves, who failed and why, clients, configuration."""
    from prelort.experiment.page import write_page

    Console().print(f"wrote {_plain(write_page(run, out))}", soft_wrap=True)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "  prelort export runs/first/prelort --rank 4 --out adapter-r4\n\n"
    "  prelort export runs/first/prelort --rank 16 --merge --out model-tuned"
)
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Cut to this rank (default: the largest).")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model, adapter merged into the base.")
    ] = False,
) -> None:
    """Write any prefix of a run's adapter as a PEFT folder, or merged into the base model."""
    from prelort.experiment.inspect import export_run

    written = export_run(run, out, rank, merge=merge)
    Console().print(f"wrote {written}", soft_wrap=True)


@app.command(epilog=PLAN_EXAMPLES)
def plan(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; without one, the embedded default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Overrides model.name: a folder or a hub name.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="What training may take, e.g. 8GiB (default: what is free)."),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", help="Ranks to show, e.g. 4,8 (default: powers of two to 256)."),
    ] = None,
    labels: Annotated[
        int, typer.Option("--labels", min=2, help="Classes, for task = 'classification'.")
    ] = 2,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Estimate the memory and traffic of each rank, and name the largest rank that fits."""
    from prelort import config as configuration

    named = [f"model.name={json.dumps(model)}"] if model is not None else []
    settings = configuration.load(config, [*(overrides or []), *named])
    asked = _ranks(ranks) if ranks is not None else None

    from prelort.planning import sizes, tables
    from prelort.planning.measured import free_memory
    from prelort.planning.memory import Planner

    if memory is None:
        budget, where = free_memory(settings.model.device)
    else:
        budget, where = sizes.parse(memory, "--memory"), "--memory"
    console = _console()
    with console.status("planning", spinner="dots") if not as_json else nullcontext():
        planner = Planner(settings, labels)
        most = max(min(256, planner.most), *(asked or [1]))
        shown = asked or [2**power for power in range(1, 9) if 2**power <= most] or [1]
        estimates = [planner.estimate(rank, most) for rank in shown]
        try:
            largest, refusal = planner.largest(budget, most), None
        except ConfigError as error:
            largest, refusal = None, error
    if as_json:
        sys.stdout.write(json.dumps(tables.as_values(estimates, budget, largest), indent=2) + "\n")
    else:
        title = (
            f"{_plain(settings.model.name)}: batches of {settings.training.batch_size} x "
            f"{settings.data.max_length} tokens, {_plain(settings.method.name)}"
        )
        console.print(tables.estimates_table(estimates, budget, title))
    if refusal is not None:
        raise refusal
    if not as_json and largest is not None:
        console.print(tables.conclusion(largest, budget, where, most), soft_wrap=True)


@app.command()
def methods() -> None:
    """List the methods: what each is, and its paper."""
    from rich.table import Table

    from prelort.methods import REGISTRY

    table = Table("method", "what it is", "paper")
    for name, method in REGISTRY.items():
        table.add_row(f"[bold]{name}[/bold]", method.summary, method.paper)
    _console().print(table)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  prelort new my-federation\n\n"
    "  prelort new my-federation --sites 5\n\n  my-federation/scripts/demo.sh"
)
def new(
    folder: Annotated[Path, typer.Argument(help="Folder to make; its name is the app's.")],
    sites: Annotated[int, typer.Option("--sites", min=1, help="Sites to try it out with.")] = 3,
) -> None:
    """Write a federation of real sites: a Flower app, scripts, and the operator's page."""
    from prelort.deployment.new import create

    create(folder, sites)
    console = Console()
    console.print(f"wrote {folder}: read {folder / 'README.md'}, or see it work at once:")
    console.print(f"  {folder / 'scripts' / 'demo.sh'}", soft_wrap=True)


site_app = typer.Typer(help="At a real site: check its settings, end its trainer.")
app.add_typer(site_app, name="site", no_args_is_help=True)

SiteFile = Annotated[Path, typer.Argument(help="The site's own file, site.toml.")]


@site_app.command(
    "check",
    epilog="[bold]Example[/bold]\n\n"
    "  prelort site check sites/site-1/site.toml --federation app/federation.toml",
)
def site_check(
    file: SiteFile,
    federation: Annotated[
        Path, typer.Option("--federation", "-f", help="The federation's configuration.")
    ],
) -> None:
    """Load what the site would load, and show all that the server would learn of it."""
    from prelort import config as configuration
    from prelort.deployment import settings
    from prelort.deployment.worker import make_site

    found = make_site(configuration.load(federation), settings.read(file), file)
    agreement = found.workspace.agreement
    console = Console()
    console.print(f"{len(found.examples)} examples to train on, {len(found.test)} to test on")
    console.print("the server learns these, and nothing else before the first round:")
    facts = {"client": found.name, "examples": len(found.examples), "rank": found.rank}
    facts |= {"most": max(found.most, found.rank), "base": agreement.base}
    for key, value in facts.items():
        console.print(f"  {key} = {value!r}", highlight=False)


@site_app.command("stop")
def site_stop(file: SiteFile) -> None:
    """End the site's trainer, if it runs: the next message would start another."""
    from prelort.deployment import warm

    warm.stop(file)


@app.command()
def config() -> None:
    """Print the embedded default's configuration, to start your own from."""
    from prelort.config import EMBEDDED_FILE

    sys.stdout.write(EMBEDDED_FILE.read_text(encoding="utf-8"))


def main() -> None:
    """Run the command line; what a user can put right is told in one sentence, exit code 2."""
    warnings.showwarning = _warn
    quiet_libraries()
    console = Console(stderr=True)
    try:
        app(standalone_mode=True)
    except PrelortError as error:
        console.print(f"[bold red]error:[/bold red] {_plain(error)}", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        where = f" {error.filename!r}" if error.filename else ""
        console.print(
            f"[bold red]error:[/bold red] {_plain(error.strerror or str(error))}{where}: what was "
            "finished is kept; make room or choose another folder, then prelort run --resume "
            "FOLDER",
            soft_wrap=True,
        )
        sys.exit(2)


def _what_to_run(
    path: Path | None,
    names: Sequence[str],
    overrides: Sequence[str],
    out: Path | None,
    resume: Path | None,
) -> tuple[Path, Config, list[str]]:
    """The folder, the configuration and the methods that the options mean."""
    from prelort import config as configuration
    from prelort.experiment import several
    from prelort.experiment.folder import RunFolder

    if resume is None:
        settings = configuration.load(path, overrides)
        chosen = list(dict.fromkeys(names)) or [settings.method.name]
        if len(chosen) == 1:
            settings = several.with_method(settings, chosen[0])
        name = several.folder_name(chosen[0]) if len(chosen) == 1 else "several"
        return out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", settings, chosen
    together = several.methods_in(resume)
    first = RunFolder(resume / several.folder_name(together[0]) if together else resume)
    settings = first.read_config()
    held = together or [settings.method.name]
    chosen = list(dict.fromkeys(names)) or held
    if chosen != held:
        raise ConfigError(f"{str(resume)!r} holds the methods {held}, not {chosen}")
    if path is not None or overrides:
        # Given again: it must be what the run was started with; run() names what differs.
        given = configuration.load(path or first.config_file, overrides)
        renamed = any(override.split("=")[0].strip() == "method.name" for override in overrides)
        settings = given if renamed else several.with_method(given, settings.method.name)
    return resume, settings, chosen


def _engine(name: str, cpus: int, gpus: float) -> Any:
    """Who carries out the rounds, by name. Raises `ConfigError` for one that there is not."""
    if name == "in-process":
        from prelort.experiment.stage import InProcess

        return InProcess()
    if name == "simulation":
        from functools import partial

        from prelort.experiment.simulation import check_installed, simulated

        check_installed()
        return partial(simulated, cpus=cpus, gpus=gpus)
    raise ConfigError(
        f"--engine {name!r} is not allowed: in-process or simulation; for real sites see "
        "`prelort new --help`"
    )


def _ranks(text: str) -> list[int]:
    """The ranks of ``--ranks``, rising."""
    entries = [entry.strip() for entry in text.split(",")]
    wrong = next((e for e in entries if not (e.isascii() and e.isdigit() and int(e) > 0)), None)
    if wrong is not None:
        raise ConfigError(
            f"--ranks {text!r}: {wrong!r} is not a rank: write whole numbers from 1 on, e.g. 4,8,16"
        )
    return sorted({int(entry) for entry in entries})


def _console() -> Console:
    """Standard output; in a file or a pipe wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _show(console: Console, folders: dict[str, Path], target: Path) -> None:
    """The table, and where everything is."""
    from prelort.experiment.several import read_runs
    from prelort.report.events import phases
    from prelort.report.tables import comparison_table
    from prelort.report.wording import human_seconds

    runs = read_runs(folders)
    console.print(comparison_table(runs))
    for name, events in runs.items():
        taken = ", ".join(f"{phase} {human_seconds(s)}" for phase, s in phases(events).items())
        console.print(f"time      {name}: {taken}", soft_wrap=True, highlight=False)
    for picture in sorted(target.glob("*.png")):
        console.print(f"picture   {picture}", soft_wrap=True)
    for path in folders.values():
        if (path / "adapters").is_dir():
            console.print(f"adapters  {path / 'adapters'}", soft_wrap=True)


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning of ours is one line; a library's is not the user's business."""
    if category is UserWarning and not _from_library(str(where[0]) if where else ""):
        Console(stderr=True).print(f"[yellow]warning:[/yellow] {_plain(message)}", soft_wrap=True)


def _from_library(filename: str) -> bool:
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    return "site-packages" in filename and not ours


def _plain(text: object) -> str:
    """Square brackets in a message are not markup."""
    from rich.markup import escape

    return escape(str(text))


if __name__ == "__main__":
    main()
