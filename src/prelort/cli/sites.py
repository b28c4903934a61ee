"""``prelort new`` and ``prelort site check | trust | stop``: federations of real sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

NEW_EXAMPLES = (
    "[bold]Examples[/bold]\n\n  prelort new my-federation\n\n"
    "  prelort new my-federation --sites 5\n\n  my-federation/scripts/demo.sh"
)


def new(
    folder: Annotated[Path, typer.Argument(help="Folder to create; its name becomes the app's.")],
    sites: Annotated[int, typer.Option("--sites", min=1, help="Number of sites in the demo.")] = 3,
) -> None:
    """Write a federation of real sites: a Flower app, scripts, and the operator's page."""
    from prelort.deployment.new import create

    create(folder, sites)
    console = Console()
    console.print(f"wrote {folder}: read {folder / 'README.md'}, or run the demo:")
    console.print(f"  {folder / 'scripts' / 'demo.sh'}", soft_wrap=True)


site_app = typer.Typer(help="Real sites: check settings, stop a trainer, trust a new key.")

SiteFile = Annotated[Path, typer.Argument(help="The site's file, site.toml.")]


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
    """Load what the site would load, and show everything that the server would learn about it."""
    from prelort import config as configuration
    from prelort.deployment import settings
    from prelort.deployment.worker import make_client

    own = settings.read(file)
    config = configuration.load(federation)
    site, identity = make_client(config, own, file), own.identity(file)
    spec = site.runtime.spec
    console = Console()
    console.print(f"{len(site.examples)} examples to train on, {len(site.test)} to test on")
    console.print("the server learns this, and nothing else before the first round:")
    facts = {"client": site.name, "examples": len(site.examples), "base": spec.base}
    if not config.privacy.hide_ranks:
        facts |= {"rank": site.rank, "max_rank": max(site.max_rank, site.rank)}
    for key, value in facts.items():
        console.print(f"  {key} = {value!r}", highlight=False)
    if identity is not None:
        console.print(f"it signs with {identity.fingerprint}", highlight=False, soft_wrap=True)
        console.print("and shares masks with those who sign with one of")
        for peer in identity.peers.keys() - {identity.fingerprint}:
            console.print(f"  {peer}", highlight=False, soft_wrap=True)


@site_app.command(
    "trust",
    epilog="[bold]Example[/bold]\n\n  prelort site trust runs/first hospital-1 hospital-1-new.pub",
)
def site_trust(
    run: Annotated[Path, typer.Argument(help="The run's folder, at the server.")],
    name: Annotated[str, typer.Argument(help="The site's name.")],
    key: Annotated[Path, typer.Argument(help="The public key of its node (.pub).")],
) -> None:
    """Let the node with this key use this name in a run, also while it goes on."""
    from prelort.deployment.trust import trust

    shown = trust(run, name, key)
    Console().print(f"{name} is the site with the key {shown}", highlight=False, markup=False)


@site_app.command("stop")
def site_stop(file: SiteFile) -> None:
    """Stop the site's trainer, if it runs: the next message would start another."""
    from prelort.deployment import trainer_client
    from prelort.errors import ConfigError

    if not file.is_file():
        raise ConfigError(f"site file {str(file)!r} does not exist")
    trainer_client.stop(file)
