#!/usr/bin/env bash
# Installs, upgrades, removes and purges a package on an overlay of this host. package_test.go runs it in a mount namespace
# of its own, where all of it ends.
#
#   life.sh OLD.deb NEW.deb
set -euo pipefail

old=$1 new=$2
work=$(mktemp -d)
trap 'umount -R "$work" && rmdir "$work"' EXIT
mount -t tmpfs none "$work"
mkdir "$work"/{upper,work,root}
mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" none "$work/root"
mount -t proc proc "$work/root/proc"
mount -t tmpfs none "$work/root/run"
mount --bind /dev "$work/root/dev"
cp "$old" "$work/root/old.deb"
cp "$new" "$work/root/new.deb"
version() { within dpkg-query --show sandboxd | cut -f 2; }
within() { chroot "$work/root" "$@"; }
# Recommended packages are no dependencies; e2fsprogs and passwd are on every Debian.
within dpkg --install /old.deb >/dev/null
echo "installed $(version) $(within stat -c %u /var/lib/sandboxd)"
within getent group sandboxd >/dev/null
[[ $(within stat -c %a /var/lib/sandboxd) == 700 ]]
[[ -L $work/root/etc/systemd/system/sockets.target.wants/sandboxd.socket ]] || ! within sh -c 'command -v systemctl' >/dev/null
echo "#mine" >>"$work/root/etc/sandboxd/config.yaml"
echo kept >"$work/root/var/lib/sandboxd/record"
within dpkg --install /new.deb >/dev/null
grep -q '^#mine' "$work/root/etc/sandboxd/config.yaml" && echo "config kept"
echo "upgraded $(version)"
within dpkg --remove sandboxd >/dev/null 2>&1
[[ ! -e $work/root/usr/bin/sandboxd ]] && echo removed
[[ $(<"$work/root/var/lib/sandboxd/record") == kept && -e $work/root/etc/sandboxd/config.yaml ]] && echo "state kept"
within dpkg --purge sandboxd >/dev/null 2>&1
echo purged
rm "$work"/root/{old,new}.deb
# What is there now and was not before; dpkg and the databases of accounts keep their own books.
changed() {
	find "$work/upper" -mindepth 1 -printf '/%P\n' | while read -r path; do
		[[ -e $path || -L $path || -c $work/upper$path ]] || case $path in
		/var/lib/dpkg/* | /var/log/* | /var/cache/* | /etc/*- | /etc/.pwd.lock) ;;
		*) echo "$path" ;;
		esac
	done | sort
}
echo changed:
changed
# The negative control.
mkdir "$work/root/var/lib/sandboxd"
echo "changed with a leftover:"
changed
