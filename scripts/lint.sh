#!/usr/bin/env bash
# Everything a machine can say of the source without running it.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Of staticcheck's checks all are on but these, each with its reason.
STATICCHECK=all
STATICCHECK+=,-ST1000 # a package that is a command is described at its main
STATICCHECK+=,-ST1003 # generated code spells names as protobuf does
STATICCHECK+=,-ST1020,-ST1021,-ST1022 # a comment says what one must know, not always the name again

cd "$ROOT"
"$ROOT/scripts/setup.sh" lint-packages
"$ROOT/scripts/tools.sh" staticcheck
mapfile -t go_files < <(git ls-files --cached --others --exclude-standard '*.go' | grep -v '\.pb\.go$' | while read -r f; do [[ ! -f $f ]] || echo "$f"; done)
mapfile -t shell_files < <(git ls-files --cached --others --exclude-standard '*.sh' .ci/run)

check_format() {
	local bad
	bad=$(gofmt -l "${go_files[@]}")
	[[ -z $bad ]] || {
		printf 'not formatted (run gofmt -w):\n%s\n' "$bad"
		return 1
	}
}

check_shell() {
	local f
	for f in "${shell_files[@]}"; do
		bash -n "$f"
	done
	shellcheck --external-sources "${shell_files[@]}"
}

step "check format" check_format
step "vet" go vet ./...
step "vet tools" go -C tools vet ./...
step "staticcheck" "$CACHE/tools/staticcheck" -checks "$STATICCHECK" ./...
step "check shell scripts" check_shell
"$ROOT/scripts/proto.sh" lint
