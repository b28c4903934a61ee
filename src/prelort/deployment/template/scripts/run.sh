#!/usr/bin/env bash
# On the server: scripts/run.sh [RUN] ['KEY=VALUE ...'] runs the federation in the folder RUN. The
# same command again goes on with it, whatever has happened in between.
source "$(dirname "$0")/settings.sh"
run="$(realpath -m "${1:-$here/runs/first}")"
flwr run "$here/app" federation --stream --run-config "run=\"$run\" set=\"${2:-}\""
