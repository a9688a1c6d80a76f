#!/usr/bin/env bash
# Gets what this project needs from outside: packages, Go modules, a guest kernel, two images. What is there already is
# left alone, so that a second run needs no network.
#
#   scripts/setup.sh            everything for `make demo`, and for `make test` but what it gets itself
#   scripts/setup.sh PART...    packages, modules, kernel, busybox, debian, node, lint-packages, bench-packages
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Each package with its reason.
PACKAGES=(
	qemu-system-x86 # the VMM
	busybox-static  # the small test image
	mmdebstrap      # makes the Debian test image
	erofs-utils     # fsck.erofs, a second opinion on the images we write
	e2fsprogs       # mkfs.ext4 for writable layers
	containernetworking-plugins # the networks of the tests
	xz-utils        # tests compress with it
)
LINT_PACKAGES=(
	shellcheck # for scripts/
	systemd    # systemd-analyze verify, for deploy/systemd
)
# Measured in the same run as ours, never from memory.
BENCH_PACKAGES=(crun runc podman bubblewrap)

DEBIAN_SUITE=bookworm
# The Python that the demo's program runs on.
DEBIAN_PACKAGES=python3-minimal
# Every file of the images is dated so: the same packages make the same image.
IMAGE_EPOCH=1700000000

# Another make in the same tree may be setting up: that long we wait for it. A mirror is asked three times; each try is given
# so many seconds, five times what a slow line was seen to need.
readonly TRIES=3 LOCK_SECONDS=900
readonly APT_UPDATE_SECONDS=120 APT_INSTALL_SECONDS=600 APT_DOWNLOAD_SECONDS=300 NPM_SECONDS=300 GO_DOWNLOAD_SECONDS=600 MMDEBSTRAP_SECONDS=600

export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
APT_OPTIONS=(
	-o Acquire::Retries=3
	-o Acquire::http::Timeout=30
	-o Acquire::https::Timeout=30
	-o DPkg::Lock::Timeout=120
	-o APT::Sandbox::User=root # it downloads into our cache, where user _apt may not write
)

need_root() {
	[[ $(id -u) == 0 ]] || fail "cannot $1 as $(id -un): run make as root, or install it yourself: apt-get install ${PACKAGES[*]}"
}

# apt_update fetches the package lists once per run. Lists of a third party that cannot be had don't matter: a package
# that is really missing is named by the step that wants it.
APT_UPDATED=
apt_update() {
	[[ -n $APT_UPDATED ]] && return
	command -v apt-get >/dev/null || fail "cannot find apt-get: this script knows Debian 12; elsewhere install ${PACKAGES[*]} and a guest kernel by hand"
	step "fetch package lists" retry_or_warn
	APT_UPDATED=yes
}

retry_or_warn() {
	retry "$TRIES" "$APT_UPDATE_SECONDS" apt-get "${APT_OPTIONS[@]}" update ||
		echo "apt-get update failed; going on with the lists there are" >&2
}

install_packages() {
	local missing=() p
	for p in "$@"; do
		[[ $(dpkg-query -W -f='${db:Status-Abbrev}' "$p" 2>/dev/null) == ii* ]] || missing+=("$p")
	done
	((${#missing[@]} == 0)) && return
	need_root "install ${missing[*]}"
	apt_update
	step "install ${missing[*]}" retry "$TRIES" "$APT_INSTALL_SECONDS" \
		apt-get "${APT_OPTIONS[@]}" install --yes --no-install-recommends "${missing[@]}"
}

# The modules of the program and of its tools. go.sum says what they must be.
get_modules() {
	local dir key
	for dir in . tools; do
		key=$(hash_of "$ROOT/$dir/go.mod" "$ROOT/$dir/go.sum")-$(go env GOMODCACHE | sha256sum | cut -c1-8)
		stamped "modules-${dir/./main}" "$key" && continue
		step "fetch Go modules of ${dir/./the program}" retry "$TRIES" "$GO_DOWNLOAD_SECONDS" go -C "$ROOT/$dir" mod download
		stamp "modules-${dir/./main}" "$key"
	done
}

# The guest kernel, unpacked: nothing is installed into the host's /boot, and no hook of a kernel package runs.
get_kernel() {
	compgen -G "$CACHE/kernel/boot/vmlinuz-*" >/dev/null && compgen -G "$CACHE/kernel/lib/modules/*" >/dev/null && return
	apt_update
	step "fetch guest kernel" download_kernel
}

download_kernel() {
	local work package
	package=$(apt-cache depends --important linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
	[[ -n $package ]] || fail "cannot find linux-image-cloud-amd64 in the package lists: is Debian $DEBIAN_SUITE main among apt's sources?"
	work=$(mktemp -d "$CACHE/kernel.XXXXXX")
	(cd "$work" && retry "$TRIES" "$APT_DOWNLOAD_SECONDS" apt-get "${APT_OPTIONS[@]}" download "$package") || {
		rm -rf "$work"
		return 1
	}
	mkdir "$work/root"
	dpkg-deb -x "$work"/*.deb "$work/root"
	rm -rf "$CACHE/kernel"
	mv "$work/root" "$CACHE/kernel"
	rm -rf "$work"
	ls -l "$CACHE/kernel/boot"
}

# A root file system of one static program under all its names, small enough that tests start fast.
get_busybox() {
	local key
	key=$(declare -f make_busybox | sha256sum | cut -c1-16)-$IMAGE_EPOCH
	[[ -f $CACHE/images/busybox.tar ]] && stamped busybox "$key" && return
	step "make busybox image" make_busybox
	stamp busybox "$key"
}

make_busybox() {
	local work root name
	mkdir -p "$CACHE/images"
	work=$(mktemp -d "$CACHE/images/busybox.XXXXXX")
	root=$work/root
	mkdir -p "$root"/{bin,dev,etc,home/app,proc,root,run,sys,tmp,usr/bin,usr/sbin,sbin,var/tmp}
	chmod 0755 "$root"
	chmod 1777 "$root/tmp" "$root/var/tmp"
	chmod 0700 "$root/root"
	cp /bin/busybox "$root/bin/busybox"
	chmod 0755 "$root/bin/busybox"
	for name in $(busybox --list); do
		[[ $name == busybox ]] || ln -s busybox "$root/bin/$name"
	done
	# Tests ask for these users and groups by name; app is in two groups beside its own.
	printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'app:x:1000:1000:app:/home/app:/bin/sh' \
		'nobody:x:65534:65534:nobody:/nonexistent:/bin/false' >"$root/etc/passwd"
	printf '%s\n' 'root:x:0:' 'app:x:1000:' 'audio:x:29:app' 'staff:x:50:app' 'nogroup:x:65534:' >"$root/etc/group"
	chown -R 1000:1000 "$root/home/app"
	# Executable by nobody: what exit code 126 is for.
	printf 'plain text\n' >"$root/etc/not-executable"
	chmod 0644 "$root"/etc/*
	tar --create --file "$work/busybox.tar" --directory "$root" --sort=name --mtime="@$IMAGE_EPOCH" \
		--numeric-owner --format=posix --pax-option=delete=atime,delete=ctime .
	mv "$work/busybox.tar" "$CACHE/images/busybox.tar"
	rm -rf "$work"
}

# A real Debian with Python.
get_debian() {
	local key
	key=$(declare -f make_debian | sha256sum | cut -c1-16)-$IMAGE_EPOCH-$DEBIAN_SUITE-$DEBIAN_PACKAGES
	[[ -f $CACHE/images/debian.tar ]] && stamped debian "$key" && return
	need_root "make the Debian image"
	apt_update # so that apt knows its mirror
	step "make Debian image (about a minute)" make_debian
	stamp debian "$key"
}

make_debian() {
	local work proxy mirror options=()
	mirror=$(debian_mirror "$DEBIAN_SUITE")
	mkdir -p "$CACHE/images"
	work=$(mktemp -d "$CACHE/images/debian.XXXXXX")
	# mmdebstrap has its own apt, which must take the same way out as the host's.
	proxy=$(apt-config shell p Acquire::http::Proxy | sed -n "s/^p='\(.*\)'$/\1/p")
	[[ -z $proxy ]] || options+=("--aptopt=Acquire::http::Proxy \"$proxy\"")
	SOURCE_DATE_EPOCH=$IMAGE_EPOCH TMPDIR=$work retry "$TRIES" "$MMDEBSTRAP_SECONDS" mmdebstrap --variant=minbase \
		--include="$DEBIAN_PACKAGES" "${options[@]}" \
		--aptopt='Acquire::Retries "3"' --aptopt='Acquire::http::Timeout "30"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/info/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		"$DEBIAN_SUITE" "$work/debian.tar" "$mirror" || {
		rm -rf "$work"
		return 1
	}
	mv "$work/debian.tar" "$CACHE/images/debian.tar"
	rm -rf "$work"
}

# Node, and what package-lock.json of the example in JavaScript names: each package with its hash. None gets to run a
# script of its own here.
get_node() {
	local example=$ROOT/examples/node-client key
	if ! command -v node >/dev/null || ! command -v npm >/dev/null; then install_packages nodejs npm; fi
	key=$(hash_of "$example/package.json" "$example/package-lock.json")
	[[ -d $CACHE/node/node_modules ]] && stamped node "$key" && return
	mkdir -p "$CACHE/node"
	cp "$example/package.json" "$example/package-lock.json" "$CACHE/node/"
	step "fetch packages of the example in JavaScript" retry "$TRIES" "$NPM_SECONDS" \
		npm ci --prefix "$CACHE/node" --ignore-scripts --no-audit --no-fund --loglevel=error
	stamp node "$key"
}

run_part() {
	case $1 in
	packages) install_packages "${PACKAGES[@]}" ;;
	lint-packages) install_packages "${LINT_PACKAGES[@]}" ;;
	bench-packages) install_packages "${BENCH_PACKAGES[@]}" ;;
	modules) get_modules ;;
	kernel) get_kernel ;;
	busybox) get_busybox ;;
	debian) get_debian ;;
	node) get_node ;;
	*) fail "cannot set up $1: no such part; see the head of scripts/setup.sh" ;;
	esac
}

main() {
	# Two makes in one tree wait for each other here instead of tearing each other's downloads.
	exec {lock}>"$CACHE/setup.lock"
	flock --wait "$LOCK_SECONDS" "$lock" || fail "cannot get $CACHE/setup.lock: another setup has had it for $LOCK_SECONDS s"
	(($# > 0)) || set -- packages modules kernel busybox debian
	local part
	for part in "$@"; do
		run_part "$part"
	done
}

main "$@"
