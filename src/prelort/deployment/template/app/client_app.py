"""A site's app: it forwards each message to the trainer, which stays loaded between rounds."""

from pathlib import Path

from prelort.deployment.client import site_app

app = site_app(Path(__file__).parent / "federation.toml")
