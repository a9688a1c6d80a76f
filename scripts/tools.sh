#!/usr/bin/env bash
# Builds tools that tools/go.mod names into .cache/tools: each once per content of tools/go.mod and go.sum.
#
#   scripts/tools.sh NAME...    buf, nfpm, protoc-gen-go, protoc-gen-go-grpc, protoc-gen-go-ttrpc, runtimetest, staticcheck, testreport
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

package_of() {
	case $1 in
	buf) echo github.com/bufbuild/buf/cmd/buf ;;
	nfpm) echo github.com/goreleaser/nfpm/v2/cmd/nfpm ;;
	protoc-gen-go) echo google.golang.org/protobuf/cmd/protoc-gen-go ;;
	protoc-gen-go-grpc) echo google.golang.org/grpc/cmd/protoc-gen-go-grpc ;;
	protoc-gen-go-ttrpc) echo github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc ;;
	runtimetest) echo github.com/opencontainers/runtime-tools/cmd/runtimetest ;;
	staticcheck) echo honnef.co/go/tools/cmd/staticcheck ;;
	testreport) echo ./testreport ;;
	*) fail "cannot build tool $1: scripts/tools.sh does not know it" ;;
	esac
}

# Our own tools change without go.mod changing.
key_of() {
	local files=("$ROOT/tools/go.mod" "$ROOT/tools/go.sum")
	[[ ! -d $ROOT/tools/$1 ]] || files+=("$ROOT/tools/$1"/*.go)
	echo "$(hash_of "${files[@]}")-$(go env GOVERSION)"
}

main() {
	local name key package wanted=() packages=()
	mkdir -p "$CACHE/tools"
	for name in "$@"; do
		[[ -x $CACHE/tools/$name ]] && stamped "tool-$name" "$(key_of "$name")" && continue
		package=$(package_of "$name")
		wanted+=("$name")
		packages+=("$package")
	done
	((${#wanted[@]} > 0)) || return 0
	step "build tools ${wanted[*]}" env CGO_ENABLED=0 go -C "$ROOT/tools" build -trimpath -ldflags "-s -w" -o "$CACHE/tools/" "${packages[@]}"
	for name in "${wanted[@]}"; do
		key=$(key_of "$name")
		stamp "tool-$name" "$key"
	done
}

main "$@"
