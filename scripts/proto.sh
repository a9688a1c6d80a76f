#!/usr/bin/env bash
# Lints the API and writes its Go code.
#
#   scripts/proto.sh generate    over the committed code
#   scripts/proto.sh check       elsewhere, and fails when the committed code differs
#   scripts/proto.sh lint        only the lint
#   scripts/proto.sh descriptors FILE    the API as one descriptor set, with what it imports, for clients in other languages
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

cd "$ROOT"
export PATH=$CACHE/tools:$PATH

# buf finds the import buf/validate/validate.proto in .cache/proto, written from the Go module we link anyway.
prepare() {
	local key
	"$ROOT/scripts/tools.sh" buf protoc-gen-go protoc-gen-go-grpc protoc-gen-go-ttrpc
	key=$(hash_of tools/go.mod tools/go.sum tools/validateproto/main.go)
	if [[ ! -f $CACHE/proto/buf/validate/validate.proto ]] || ! stamped validateproto "$key"; then
		step "write validate.proto" go -C tools run ./validateproto "$CACHE/proto"
		stamp validateproto "$key"
	fi
}

lint() { step "lint API" buf lint; }

# generate DIRECTORY: buf's templates say api/proto, below DIRECTORY.
generate() {
	buf generate --output "$1"
	buf generate --output "$1" --template buf.gen.agent.yaml
}

# What is generated must be what is committed, file by file, none too many.
check() {
	local work=$1
	generate "$work"
	diff --recursive --unified --exclude='*.proto' api/proto "$work/api/proto" || {
		echo "committed API code is stale: run make proto and commit what it writes"
		return 1
	}
}

case ${1:-} in
generate)
	prepare
	lint
	step "generate API code" generate .
	;;
check)
	prepare
	lint
	work=$(mktemp -d "$CACHE/proto-check.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	step "check that API code is fresh" check "$work"
	;;
lint)
	prepare
	lint
	;;
descriptors)
	(($# == 2)) || fail "usage: scripts/proto.sh descriptors FILE"
	prepare
	step "write descriptors" buf build --path api/proto/sandboxd/v1 --as-file-descriptor-set --output "$2#format=binpb"
	;;
*) fail "usage: scripts/proto.sh generate|check|lint|descriptors FILE" ;;
esac
