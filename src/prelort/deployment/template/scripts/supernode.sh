#!/usr/bin/env bash
# At a site: scripts/supernode.sh SITE [PORT]. It connects to the server; nobody connects to it.
# PORT is for its own processes on this machine (give each SuperNode of one machine another).
source "$(dirname "$0")/settings.sh"
site="${1:?which site? e.g. scripts/supernode.sh site-1}"
exec flower-supernode \
  --superlink "$HOST:$PORT" \
  --root-certificates "$here/certificates/ca.crt" \
  --auth-supernode-private-key "$here/sites/$site/key" \
  --host 127.0.0.1 --port "${2:-18090}" \
  --node-config "site=\"$here/sites/$site/site.toml\""
