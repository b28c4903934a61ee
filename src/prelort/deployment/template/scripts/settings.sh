# Read by the other scripts. On real machines change SERVER, and at the server BIND.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# The name or address by which the sites reach the server; its certificate has it.
SERVER="${SERVER:-127.0.0.1}"
# The address of the server's machine on which the SuperLink listens; 0.0.0.0: all of them.
BIND="${BIND:-127.0.0.1}"
PORT="${PORT:-18080}"
# Where the server reaches itself: its public name may lead nowhere from inside a NAT or container.
LOCAL="${BIND/#0.0.0.0/127.0.0.1}"

# Flower's own files stay in this folder, and nothing is reported or downloaded.
export FLWR_HOME="${FLWR_HOME:-$here/.flower}"
export FLWR_TELEMETRY_ENABLED=0
export FLWR_DISABLE_UPDATE_CHECK=1
mkdir -p "$FLWR_HOME" "$here/logs"

# The Python of the environment that has Flower and prelort: another may come first on the PATH.
PYTHON="$(dirname "$(command -v flwr)")/python3"
