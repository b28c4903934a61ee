# Read by the other scripts. Change HOST to the name by which the sites reach the server.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
HOST="${HOST:-127.0.0.1}"
PORT="${PORT:-18080}"

# Flower's own files stay in this folder, and nothing is reported or downloaded.
export FLWR_HOME="${FLWR_HOME:-$here/.flower}"
export FLWR_TELEMETRY_ENABLED=0
export FLWR_DISABLE_UPDATE_CHECK=1
mkdir -p "$FLWR_HOME" "$here/logs"
