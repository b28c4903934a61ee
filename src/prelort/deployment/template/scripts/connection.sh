#!/usr/bin/env bash
# On the server, once: tells the `flwr` command where the SuperLink is.
source "$(dirname "$0")/settings.sh"
cat > "$FLWR_HOME/config.toml" <<TOML
[superlink]
default = "federation"

[superlink.federation]
address = "$LOCAL:$PORT"
root-certificates = "$here/certificates/ca.crt"
TOML
