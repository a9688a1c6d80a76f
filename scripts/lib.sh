# Sourced by the other scripts: progress with elapsed time, retries with an end, one lock around what fills .cache.
# shellcheck shell=bash

# shellcheck disable=SC2034  # used by those who source this file
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=$ROOT/.cache
LOGS=$CACHE/log
mkdir -p "$LOGS"

# make exports the second it started, so that one clock runs through all scripts of one call.
: "${SANDBOXD_MAKE_STARTED:=$(date +%s)}"
export SANDBOXD_MAKE_STARTED

# Lines of a failed command's output to show; the whole of it stays in .cache/log.
readonly TAIL_LINES=40

elapsed() { echo $(($(date +%s) - SANDBOXD_MAKE_STARTED)); }

say() { printf '[%4ds] %s\n' "$(elapsed)" "$*"; }

# fail prints why and what to do next, and ends the script.
fail() {
	printf '[%4ds] error: %s\n' "$(elapsed)" "$*" >&2
	exit 1
}

# step NAME COMMAND...: one line when it begins, one when it is done; its output only if it fails.
step() {
	local name=$1 began code=0 log
	shift
	log=$LOGS/$(tr -cs 'a-zA-Z0-9\n' '-' <<<"$name").log
	began=$(date +%s)
	say "$name …"
	# Not "|| code=$?": bash would ignore set -e in everything that COMMAND calls.
	set +e
	(
		set -e
		"$@"
	) >"$log" 2>&1 </dev/null
	code=$?
	set -e
	if ((code != 0)); then
		tail -n "$TAIL_LINES" "$log" >&2
		fail "$name failed with exit code $code; all of its output is in $log"
	fi
	say "$name: done in $(($(date +%s) - began)) s"
}

# retry TIMES SECONDS COMMAND...: a mirror that hangs is given up after SECONDS, one that answers with nonsense is asked
# again a little later, TIMES times at most. COMMAND is a program, since timeout cannot run a function.
retry() {
	local times=$1 seconds=$2 try code=0
	shift 2
	for ((try = 1; try <= times; try++)); do
		code=0
		timeout --kill-after=10 "$seconds" "$@" || code=$?
		((code == 0)) && return 0
		echo "try $try of $times: $1 ended with exit code $code (124: it took more than $seconds s)" >&2
		((try < times)) && sleep $((try * 2))
	done
	return "$code"
}

# hash_of FILE...: one short name for the content of several files.
hash_of() { cat "$@" | sha256sum | cut -c1-16; }

# stamped NAME KEY: whether NAME was made from KEY before.
stamped() { [[ -f $CACHE/stamp/$1 && $(<"$CACHE/stamp/$1") == "$2" ]]; }

stamp() {
	mkdir -p "$CACHE/stamp"
	printf '%s' "$2" >"$CACHE/stamp/$1.new"
	mv "$CACHE/stamp/$1.new" "$CACHE/stamp/$1"
}

# debian_mirror SUITE: where this machine's apt gets that suite of Debian, or DEBIAN_MIRROR.
debian_mirror() {
	local mirror=${DEBIAN_MIRROR:-}
	# shellcheck disable=SC2016  # apt's own variables
	[[ -n $mirror ]] || mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(SITE)' 'Identifier: Packages' |
		sed -n "s/^$1 main //p" | head -n 1)
	[[ -n $mirror ]] || fail "cannot find a mirror of Debian $1: add it to apt's sources and run apt-get update, or set DEBIAN_MIRROR to its address"
	echo "$mirror"
}
