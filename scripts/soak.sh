#!/usr/bin/env bash
# Disturbs a daemon with many callers for SOAK (60s), and has CYCLES (2000) workloads come and go. The last line says what that
# lost and left. SEED repeats a soak's choices, not its timing. docs/reliability.md explains it.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Besides SOAK: a life takes some 40 ms, and the last callers come to their end.
readonly LIMIT=60m

cd "$ROOT"
[[ $(id -u) == 0 ]] || fail "cannot run the soak as $(id -un): it builds sandboxes; run make as root"
log=$LOGS/soak.log
say "soak (each round is a line of $log) …"
if ! go test -count=1 -v -timeout "$LIMIT" -run 'TestSoak|TestChurn' ./test/e2e/crash \
	-soak "${SOAK:-60s}" -cycles "${CYCLES:-2000}" -seed "${SEED:-0}" >"$log" 2>&1; then
	tail -n "$TAIL_LINES" "$log" >&2
	fail "the soak failed; all of its output is in $log"
fi
grep -hoE '[0-9]+ lives in .*|before map.*' "$log"
grep -E '^[0-9]+ points, lost [0-9]+, leaked [0-9]+$' "$log"
