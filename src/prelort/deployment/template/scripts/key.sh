#!/usr/bin/env bash
# At a site, once: scripts/key.sh SITE makes its key pair. Only the .pub file leaves the site.
source "$(dirname "$0")/settings.sh"
site="${1:?which site? e.g. scripts/key.sh site-1}"
key="$here/sites/$site/key"
if [ ! -e "$key" ]; then
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "$site" -f "$key"
  echo "made sites/$site/key (keep it) and sites/$site/key.pub (give it to the server)"
fi
