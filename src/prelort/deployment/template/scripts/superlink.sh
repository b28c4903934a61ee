#!/usr/bin/env bash
# On the server: the SuperLink, with TLS, for registered sites only. It keeps its records in a
# file, so that sites stay registered when it is started again.
source "$(dirname "$0")/settings.sh"
exec "$PYTHON" -m prelort.deployment.flower_commands superlink \
  --host "$BIND" --port "$PORT" \
  --ssl-ca-certfile "$here/certificates/ca.crt" \
  --ssl-certfile "$here/certificates/server.pem" \
  --ssl-keyfile "$here/certificates/server.key" \
  --enable-supernode-auth \
  --database "$here/.flower/superlink.db" \
  --disable-runtime-dependency-installation
