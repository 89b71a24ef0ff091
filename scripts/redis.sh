#!/usr/bin/env bash
# Makes sure that redis-server is installed, for the experiments and tests that stand beside it.
#
# Usage: scripts/redis.sh
#
# As root with apt-get it installs Debian's package, and stops the service that comes with it: praas-bench starts a server of its own
# each time, on a free port of loopback with nothing persistent, and ends it. A Redis that was there before is left alone.
# Exit code 0: installed; 1: not, and it says `skipped: needs redis-server`.
set -uo pipefail

command -v redis-server >/dev/null && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "installing redis-server"
    log=$(mktemp)
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends redis-server; } \
        >"$log" 2>&1 </dev/null || tail -n 5 "$log" >&2
    rm -f "$log"
    if [ -d /run/systemd/system ]; then systemctl disable --quiet --now redis-server.service; fi
fi
command -v redis-server >/dev/null && exit 0
echo "skipped: needs redis-server"
exit 1
