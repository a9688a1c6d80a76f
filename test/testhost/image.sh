#!/usr/bin/env bash
# Makes the test host's disk: a Debian with systemd, QEMU and the guest kernel as its own kernel. What was made from the
# same packages, kernel and script is left alone, so that a second run needs no network. Prints the image's path.
#
#   test/testhost/image.sh
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../../scripts/lib.sh"

# Each package with its reason.
PACKAGES=(
	systemd-sysv    # init, as our unit files want it
	udev            # /dev/kvm and /dev/vhost-vsock with their modes
	kmod            # modprobe kvm_amd vhost_vsock
	dbus            # systemd-run, systemctl
	qemu-system-x86 # the VMM
	erofs-utils     # fsck.erofs in tests
	e2fsprogs       # mkfs.ext4 for writable layers
	iproute2        # ip, in tests of networks
	apparmor        # apparmor_parser, which loads the containers' profile
	busybox-static  # the small test image
)
# Units that only cost the boot time.
MASKED=(
	getty.target serial-getty@.service console-getty.service # hang up what else is on the serial line
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
	systemd-timesyncd.service systemd-tmpfiles-clean.timer
	modprobe@.service # of configfs, drm, efi_pstore, fuse: nobody asks for them, and loop comes when it is opened
	dev-hugepages.mount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount
	apparmor.service # loads the distribution's profiles, which nothing here has
	systemd-pstore.service systemd-update-utmp.service systemd-random-seed.service systemd-journal-flush.service
	systemd-logind.service systemd-user-sessions.service
)
DEBIAN_SUITE=bookworm
# Of the file system: the packages take 0.5 GiB, tests write the rest. Sparse.
SIZE=4G
# Another make in the same tree may be making it: that long we wait. A mirror is asked three times.
readonly LOCK_SECONDS=1200 TRIES=3 MMDEBSTRAP_SECONDS=600

DIR=$CACHE/testhost
KERNEL=$CACHE/kernel

main() {
	local key image lock
	mkdir -p "$DIR"
	exec {lock}>"$DIR/lock"
	flock --wait "$LOCK_SECONDS" "$lock" || fail "cannot get $DIR/lock: another setup has had it for $LOCK_SECONDS s"
	compgen -G "$KERNEL/boot/vmlinuz-*" >/dev/null || "$ROOT/scripts/setup.sh" kernel >&2
	key=$( (
		declare -f make_image
		declare -p PACKAGES MASKED DEBIAN_SUITE SIZE
		ls "$KERNEL/boot"
	) | sha256sum | cut -c1-16)
	image=$DIR/root-$key.ext4
	if [[ ! -f $image ]]; then
		[[ $(id -u) == 0 ]] || fail "cannot make the test host's image as $(id -un): run it as root"
		rm -f "$DIR"/root-*.ext4
		step "make the test host's image (about a minute)" make_image "$image" >&2
	fi
	printf '%s\n' "$image"
}

make_image() {
	local image=$1 work proxy mirror include options=()
	mirror=$(debian_mirror "$DEBIAN_SUITE")
	work=$(mktemp -d "$DIR/new.XXXXXX")
	# shellcheck disable=SC2064  # this $work
	trap "rm -rf --one-file-system '$work'" EXIT
	# mmdebstrap has its own apt, which must take the same way out as the host's.
	proxy=$(apt-config shell p Acquire::http::Proxy | sed -n "s/^p='\(.*\)'$/\1/p")
	[[ -z $proxy ]] || options+=("--aptopt=Acquire::http::Proxy \"$proxy\"")
	include=$(IFS=,; echo "${PACKAGES[*]}")
	# In a mount namespace of its own: what it mounts ends with it, even if it is killed.
	TMPDIR=$work retry "$TRIES" "$MMDEBSTRAP_SECONDS" unshare --mount mmdebstrap --variant=minbase --include="$include" "${options[@]}" \
		--aptopt='Acquire::Retries "3"' --aptopt='Acquire::http::Timeout "30"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/info/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		"$DEBIAN_SUITE" "$work/root.tar" "$mirror"
	mkdir "$work/root"
	tar -C "$work/root" --numeric-owner -xf "$work/root.tar"
	rm "$work/root.tar"
	cp "$KERNEL"/boot/vmlinuz-* "$work/root/boot/"
	mkdir -p "$work/root/lib/modules"
	cp -a "$KERNEL"/lib/modules/* "$work/root/lib/modules/"
	chroot "$work/root" depmod "$(ls "$KERNEL/lib/modules")"
	echo testhost >"$work/root/etc/hostname"
	: >"$work/root/etc/fstab"
	chroot "$work/root" systemctl mask "${MASKED[@]}"
	mkfs.ext4 -q -O ^has_journal -m 0 -d "$work/root" "$work/image" "$SIZE"
	mv "$work/image" "$image"
}

main
