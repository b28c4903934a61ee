"""The server's app: rounds, aggregation, checkpoints, reports."""

from pathlib import Path

from prelort.deployment.server import federation_app

app = federation_app(Path(__file__).parent / "federation.toml")
