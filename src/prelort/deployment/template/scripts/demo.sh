#!/usr/bin/env bash
# The whole federation on this machine: certificates, keys, one SuperLink, a SuperNode for each
# folder in sites/, one run. At the end no process is left.
source "$(dirname "$0")/settings.sh"
cd "$here"
run="${1:-$here/runs/demo}"
pids=()

descendants() { # PID: what it has started, also what left its process group, as Flower's apps do
  for child in $(pgrep -P "$1"); do echo "$child"; descendants "$child"; done
}

end() { # PID...: these process groups and what they have started
  local rest=""
  for pid in "$@"; do
    rest="$rest $(descendants "$pid")"
    kill -TERM -- "-$pid" 2>/dev/null || true
  done
  for pid in "$@"; do
    for _ in $(seq 150); do kill -0 -- "-$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL -- "-$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  for pid in $rest; do kill -KILL "$pid" 2>/dev/null || true; done
}

finish() {
  status=$?
  trap - EXIT INT TERM
  end "${pids[@]:1}"  # the sites first, so that they can sign off
  end "${pids[@]:0:1}"
  for site in sites/*/; do prelort site stop "$site/site.toml" || true; done
  exit "$status"
}
trap finish EXIT INT TERM

in_background() { # LOG COMMAND...: in a process group of its own, so that all of it can be ended
  setsid "${@:2}" > "logs/$1" 2>&1 &
  pids+=("$!")
}

scripts/certificates.sh
scripts/connection.sh
in_background superlink.log scripts/superlink.sh
for _ in $(seq 120); do
  if (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then break; fi
  sleep 0.5
done

port=18090
for folder in sites/*/; do
  site="$(basename "$folder")"
  scripts/key.sh "$site"
  scripts/register.sh "$folder/key.pub"
  in_background "$site.log" scripts/supernode.sh "$site" "$port"
  port=$((port + 1))
done

setsid scripts/run.sh "$run" &
pids+=("$!")
wait "$!"  # not in the foreground, where signals would wait for its end
[ -d "$run/adapters" ] || { echo "the run did not finish: see logs/"; exit 1; }
