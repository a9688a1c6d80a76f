#!/usr/bin/env bash
# Kills a daemon at every point of pkg/fault, behind every wall that comes there, and looks what is lost and what is left. The
# last line says it: "N points, lost 0, leaked 0". docs/reliability.md explains it.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Ten minutes on an idle machine of two cores, QEMU emulating; more on a busy one.
readonly LIMIT=40m

cd "$ROOT"
[[ $(id -u) == 0 ]] || fail "cannot run the crash suite as $(id -un): it builds sandboxes; run make as root"
log=$LOGS/crash.log
say "die at every point (each is a line of $log) …"
if ! go test -count=1 -v -timeout "$LIMIT" -run "TestPoints|TestProduction|TestDaemon|TestNegative" ./test/e2e/crash -whole >"$log" 2>&1; then
	grep -v ' s$' "$log" | tail -n "$TAIL_LINES" >&2
	fail "the crash suite failed; all of its output is in $log"
fi
grep -E '^[0-9]+ points, lost [0-9]+, leaked [0-9]+$' "$log"
