#!/usr/bin/env bash
# At a site: scripts/supernode.sh SITE [PORT]. It connects to the server; nobody connects to it.
# PORT is for its own processes on this machine (give each SuperNode of one machine another).
source "$(dirname "$0")/settings.sh"
site="${1:?which site? e.g. scripts/supernode.sh site-1}"

# With trusted.yaml this site runs only apps that one of the entities in it has signed.
trusted=()
if [ -e "$here/sites/$site/trusted.yaml" ]; then
  trusted=(--trusted-entities "$here/sites/$site/trusted.yaml")
fi

# One that was killed counts as connected for up to a minute, and is refused as long: try again.
for attempt in 1 2 3 4 5 6 7 8; do
  started=$SECONDS
  "$PYTHON" -m prelort.deployment.flower_commands supernode \
    --superlink "$SERVER:$PORT" \
    --root-certificates "$here/certificates/ca.crt" \
    --auth-supernode-private-key "$here/sites/$site/key" \
    --host 127.0.0.1 --port "${2:-18090}" \
    "${trusted[@]}" \
    --node-config "site=\"$here/sites/$site/site.toml\"" &
  node=$!
  trap 'kill -TERM "$node" 2>/dev/null; wait "$node"; exit' INT TERM
  if wait "$node"; then exit 0; fi
  if [ $((SECONDS - started)) -gt 60 ]; then exit 1; fi
  echo "not connected (try $attempt of 8): is the key registered, and not in use elsewhere?"
  sleep 10 &
  wait "$!"
done
exit 1
