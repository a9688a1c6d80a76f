#!/usr/bin/env bash
# Runs tests and says what ran, what was slow and what skipped.
#
#   scripts/test.sh unit    the tests beside the code, and those of tools/
#   scripts/test.sh e2e     the scenarios
#   scripts/test.sh host    what needs the test host, in one that it boots
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

MODULE=github.com/sandboxd/sandboxd

# A package's tests that take longer hang.
readonly UNIT_TIMEOUT=10m E2E_TIMEOUT=25m HOST_TIMEOUT=40m

# These share state between goroutines on every path, so they run under the race detector, which needs cgo.
RACE=(./pkg/workload/... ./pkg/agent/... ./pkg/vhostvsock/... ./pkg/server/... ./pkg/client/...)
# These build sandboxes: one package at a time, or two cores are fought over and timeouts tell lies.
HEAVY=(./pkg/runtime/...)

cd "$ROOT"
[[ $(id -u) == 0 ]] || fail "cannot run the tests as $(id -un): they build sandboxes; run make as root"
"$ROOT/scripts/tools.sh" testreport runtimetest

# go_test NAME ARGUMENTS...: go test with a report.
go_test() {
	local name=$1
	shift
	say "test $name …"
	go test -json -count=1 "$@" | "$CACHE/tools/testreport" -allow "$ROOT/test/skips.txt"
}

# packages PATTERN...: those that exist.
packages() { go list "$@" 2>/dev/null | sort -u; }

unit() {
	local race heavy rest
	race=$(packages "${RACE[@]}")
	heavy=$(packages "${HEAVY[@]}")
	rest=$(packages ./... | grep -vxF "$race"$'\n'"$heavy"$'\n'"$(packages ./test/e2e/...)"$'\n'"$MODULE/test/testhost")
	# shellcheck disable=SC2086  # one argument per package
	{
		go_test "most packages" -timeout "$UNIT_TIMEOUT" $rest
		CGO_ENABLED=1 go_test "under the race detector" -race -timeout "$UNIT_TIMEOUT" -p 1 $race
		go_test "runtimes" -timeout "$UNIT_TIMEOUT" -p 1 $heavy
	}
	say "test tools …"
	go -C tools test -count=1 ./... | grep -v 'no test files'
}

# One package at a time: what a test leaves is looked for on the whole host.
e2e() {
	"$ROOT/scripts/setup.sh" node
	go_test "scenarios" -timeout "$E2E_TIMEOUT" -p 1 ./test/e2e/...
}

host() { go_test "in the test host" -timeout "$HOST_TIMEOUT" ./test/testhost; }

case ${1:-} in
unit) unit ;;
e2e) e2e ;;
host) host ;;
*) fail "usage: scripts/test.sh unit|e2e|host" ;;
esac
say "tests passed: $1"
