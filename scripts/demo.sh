#!/usr/bin/env bash
# The main job on one screen: the same program from the same image by the same request, once behind each wall.
# It has a daemon of its own, in directories of its own, and leaves nothing.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Bounds of single waits. A VM that software emulates starts within seconds; the rest is for a busy machine.
readonly CALL_SECONDS=60 IMPORT_SECONDS=120 DAEMON_SECONDS=30 STOP_SECONDS=30

[[ $(id -u) == 0 ]] || fail "cannot run the demo as $(id -un): it builds sandboxes; run make demo as root"
cd "$ROOT"
kernel=$(compgen -G "$CACHE/kernel/boot/vmlinuz-*" | head -n 1)

# Short, since the path of a socket has at most 107 bytes; the state lies with the cache, on a real file system.
run_dir=$(mktemp -d /run/sandboxd-demo-XXXXXX)
state_dir=$(mktemp -d "$CACHE/demo.XXXXXX")
export SANDBOXD_ADDRESS=unix://$run_dir/sandboxd.sock
cgroup=${run_dir##*/}
daemon=
daemon_log=$LOGS/demo-sandboxd.log

ctl() { timeout --kill-after=5 "$CALL_SECONDS" bin/sandboxctl "$@"; }

# wait_for SECONDS WHAT COMMAND...: until COMMAND succeeds.
wait_for() {
	local until=$(($(date +%s) + $1)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		(($(date +%s) < until)) || fail "$what did not come in time; the daemon's log is $daemon_log"
		sleep 0.1
	done
}

# Whatever happened: no workload, no daemon, no file of ours stays.
clean_up() {
	local code=$? id
	trap - EXIT INT TERM
	if [[ -n $daemon ]]; then
		((code == 0)) || tail -n 15 "$daemon_log" >&2
		for id in $(ctl ps -a -q 2>/dev/null); do
			ctl rm -f "$id" >/dev/null 2>&1 || true
		done
		stop_daemon || code=1
	fi
	rm -rf "$run_dir" "$state_dir" || code=1
	# Empty by now, in each hierarchy that has it.
	find /sys/fs/cgroup -maxdepth 2 -type d -name "$cgroup" -exec rmdir {} + || code=1
	exit "$code"
}

stop_daemon() {
	local pid=$daemon i
	daemon=
	kill "$pid" 2>/dev/null || return 0
	for ((i = 0; i < STOP_SECONDS * 10; i++)); do
		kill -0 "$pid" 2>/dev/null || return 0
		sleep 0.1
	done
	kill -KILL "$pid"
	echo "sandboxd had to be killed" >&2
	return 1
}

trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold='' plain=''
if [[ -t 1 ]]; then
	bold=$'\e[1m' plain=$'\e[0m'
fi
heading() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
# show COMMAND...: as one would type it, then its output.
# shellcheck disable=SC2016  # what is said is not done
show() {
	local word line='$ sandboxctl'
	for word in "$@"; do
		case $word in
		"$program") line+=' "$(cat scripts/demo.py)"' ;;
		*' '*) line+=" '$word'" ;;
		*) line+=" $word" ;;
		esac
	done
	printf '%s\n' "$line"
	ctl "$@" | indent
}
indent() { sed 's/^/  /'; }
# field NAME ID: what the program said of itself.
field() { ctl logs "$2" | sed -n "s/^$1 *//p"; }
is_ready() { ctl logs "$1" | grep -qx ready; }

program=$(cat scripts/demo.py)
began=$(date +%s)

heading "One image: Debian, built by mmdebstrap, imported into one read-only EROFS file"
bin/sandboxd --listen "$SANDBOXD_ADDRESS" --state-dir "$state_dir" --run-dir "$run_dir" --policy scripts/demo-policy.yaml \
	--cgroup-parent "$cgroup" --vm-accel auto --vm-kernel "$kernel" >"$daemon_log" 2>&1 &
daemon=$!
wait_for "$DAEMON_SECONDS" "the daemon" ctl version
timeout --kill-after=5 "$IMPORT_SECONDS" bin/sandboxctl image import --name debian:12 .cache/images/debian.tar >/dev/null
show image ls

heading "One policy: who wrote the code decides"
for origin in ours stranger; do
	show policy explain --label "origin=$origin" debian:12 | grep -E '^(\$|  (granted|rule|reason) )'
done

heading "One request, two labels"
for origin in ours stranger; do
	show run -d --name "$origin" --label "origin=$origin" --memory 256m debian:12 python3 -c "$program"
done
for origin in ours stranger; do
	wait_for "$CALL_SECONDS" "the program of $origin" is_ready "$origin"
	show logs "$origin"
done
host_boot=$(</proc/sys/kernel/random/boot_id)
printf 'the host, to compare\n  kernel    %s\n  boot id   %s\n' "$(uname -r)" "$host_boot"
[[ $(field 'boot id' ours) == "$host_boot" ]] || fail "the container is not on the host's kernel"
[[ $(field 'boot id' stranger) != "$host_boot" ]] || fail "the VM is on the host's kernel"
[[ $(field kernel stranger) != "$(uname -r)" ]] || fail "the VM has the host's kernel release"

heading "Into both"
for origin in ours stranger; do
	# shellcheck disable=SC2016  # for the shell in the sandbox
	show exec "$origin" sh -c 'echo "$(whoami) at $(hostname), process $$ of $(ls -d /proc/[1-9]* | wc -l), kernel $(uname -r)"'
done
show ps
show stats --no-stream

heading "A demand for less than the policy says is refused"
printf '$ sandboxctl run --isolation container --label origin=stranger debian:12 true\n'
refusal=0
ctl run --isolation container --label origin=stranger debian:12 true 2>&1 | indent || refusal=${PIPESTATUS[0]}
((refusal == 125)) || fail "the refusal ended with exit code $refusal, want 125"

heading "Everything removed"
for origin in ours stranger; do
	ctl stop "$origin" >/dev/null
	[[ $(ctl wait "$origin") == 0 ]] || fail "the program of $origin did not end with exit code 0"
	ctl rm "$origin" >/dev/null
done
ctl image rm debian:12 >/dev/null
[[ -z $(ctl ps -a -q) ]] || fail "workloads are left"
stop_daemon
left=$( (grep -F "$run_dir" /proc/self/mountinfo || true; find "$run_dir" "$state_dir" -name '*.erofs' -o -name '*.ext4' -o -type s) | wc -l)
((left == 0)) || fail "$left mounts, images, disks or sockets are left"
echo "  no workload, no image, no mount, no daemon; $(($(date +%s) - began)) s in all"
