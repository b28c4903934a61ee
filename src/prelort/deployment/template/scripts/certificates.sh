#!/usr/bin/env bash
# On the server, once: a certificate authority of your own, and the SuperLink's certificate.
# Sites get certificates/ca.crt only; the *.key files never leave the server.
source "$(dirname "$0")/settings.sh"
mkdir -p "$here/certificates"
cd "$here/certificates"
if [ -e server.pem ]; then
  echo "certificates/server.pem exists: remove the folder to make new ones"
  exit 0
fi
umask 077
names="DNS:localhost,IP:127.0.0.1"
for name in "$SERVER" "$LOCAL"; do
  case "$name" in
    *[!0-9.]*) names="$names,DNS:$name" ;;
    *) names="$names,IP:$name" ;;
  esac
done
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 \
  -keyout ca.key -out ca.crt -subj "/CN=federation authority" \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign" 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes \
  -keyout server.key -out server.csr -subj "/CN=$SERVER" 2>/dev/null
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > extensions
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 \
  -extfile extensions -out server.pem 2>/dev/null
rm server.csr extensions
chmod 644 ca.crt
echo "made certificates/ca.crt (for the sites) and certificates/server.pem, for $SERVER"
