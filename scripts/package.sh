#!/usr/bin/env bash
# Makes the Debian package out of bin/: manual pages and completions come from the programs themselves. The same tree makes
# the same bytes. Prints the package's path.
#
#   scripts/package.sh [DIRECTORY]    into dist/, or DIRECTORY
#
# PACKAGE_VERSION sets another version than git's; PACKAGE_DATE (seconds) another date of its files than the commit's.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Where sources are no git checkout, files are of this second.
readonly NO_COMMIT_DATE=1700000000

# debian_version: v1.2.3 → 1.2.3, v1.2.3-4-gabc → 1.2.3+4.gabc, no tag → 0~gabc, below every release. Changes: +dirty.
debian_version() {
	local v
	v=$(git -C "$ROOT" describe --tags --dirty 2>/dev/null) || v=$(git -C "$ROOT" describe --always --dirty 2>/dev/null | sed 's/^/0~g/') || v="0~unknown"
	sed -E 's/^v//; s/-dirty$/+dirty/; s/-([0-9]+)-g/+\1.g/; s/-/~/g' <<<"$v"
}

make_package() {
	local dir=$1 stage arch epoch
	stage=$(mktemp -d "$CACHE/package.XXXXXX")
	# shellcheck disable=SC2064  # this $stage
	trap "rm -rf '$stage'" EXIT
	mkdir -p "$stage/man1" "$stage/man8" "$stage/completion" "$dir"
	# The defaults that pages show are not this environment's.
	unset "${!SANDBOXD_@}"
	"$ROOT/bin/sandboxctl" man "$stage/man1"
	"$ROOT/bin/sandboxd" --man >"$stage/man8/sandboxd.8"
	gzip --best --no-name "$stage"/man?/*
	for shell in bash zsh fish; do
		"$ROOT/bin/sandboxctl" completion "$shell" >"$stage/completion/sandboxctl.$shell"
	done
	arch=$(go env GOARCH)
	epoch=${PACKAGE_DATE:-$(git -C "$ROOT" log -1 --format=%ct 2>/dev/null || echo "$NO_COMMIT_DATE")}
	find "$stage" -exec touch --date="@$epoch" {} +
	cd "$ROOT"
	# nfpm itself fills in variables in some places only.
	sed -e "s|\${PACKAGE_STAGE}|${stage#"$ROOT"/}|" -e "s|\${PACKAGE_ARCH}|$arch|" -e "s|\${PACKAGE_VERSION}|${PACKAGE_VERSION:-$(debian_version)}|" \
		-e "s|\${PACKAGE_DATE}|$(date --utc --date="@$epoch" +%Y-%m-%dT%H:%M:%SZ)|" deploy/package/nfpm.yaml >"$stage/nfpm.yaml"
	SOURCE_DATE_EPOCH=$epoch "$CACHE/tools/nfpm" package --config "$stage/nfpm.yaml" --packager deb --target "$dir"
}

for program in sandboxd sandboxctl sandbox-agent sandbox-vsock; do
	[[ -x $ROOT/bin/$program ]] || fail "cannot make the package: bin/$program is missing: run make build"
done
"$ROOT/scripts/tools.sh" nfpm
make_package "$(realpath -m "${1:-$ROOT/dist}")"
