#!/usr/bin/env bash
# On the server: scripts/register.sh FILE.pub lets a site in. Again for the same key is no error.
source "$(dirname "$0")/settings.sh"
key="${1:?which public key? e.g. scripts/register.sh sites/site-1/key.pub}"
if ! said="$(flwr supernode register "$key" federation 2>&1)"; then
  case "$said" in
    *"already in use"*) said="$key is registered already" ;;
    *) echo "$said" >&2; exit 1 ;;
  esac
fi
echo "$said"
