#!/usr/bin/env bash
# On the server: scripts/register.sh FILE.pub lets a site in.
source "$(dirname "$0")/settings.sh"
flwr supernode register "${1:?which public key? e.g. scripts/register.sh sites/site-1/key.pub}" federation
