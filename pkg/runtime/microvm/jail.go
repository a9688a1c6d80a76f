package microvm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// jail is all that a process of a VM sees of any file system: a root of its own, in a mount namespace of its own, that
// holds what the table says and nothing else. There is no /proc, no /sys, and no place to write to.
type jail struct {
	rows []jailed
	// An empty directory of the host, on which the root is built: the host itself never sees that.
	base string
	// Its copy is initrdPath; nil if there is none. build replaces it by the copy, open for writing.
	initrd *os.File
	owner  uint32
	// There is a place for what showDescriptors shows.
	descriptors bool
}

// jailed is something of the host's in a jail.
type jailed struct {
	// On the host, and in the jail.
	from, at string
	// A device node, which only its own mount lets anyone open; or a file that may be written.
	device, writable bool
	reason           string
}

// Paths in a jail.
const (
	kernelPath = "/kernel"
	initrdPath = "/initrd"
	layerPath  = "/layer"
	helperPath = "/sandbox-vsock"
)

const (
	// A jail's root holds an initramfs, mount points, and nothing else.
	jailOptions = "size=256m,nr_inodes=256,mode=0755"
	// maxInterpreter bounds the first line of a script, as the kernel does (BINPRM_BUF_SIZE).
	maxInterpreter = 256
)

// programRows are what a program needs to run that is linked against the host's libraries: itself, libraries and loader.
func programRows(path string) ([]jailed, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	rows := []jailed{{from: real, at: path, reason: "the program"}}
	if at := interpreterOf(real); at != "" {
		from, err := filepath.EvalSymlinks(at)
		if err != nil {
			return nil, err
		}
		rows = append(rows, jailed{from: from, at: at, reason: "runs a program that is a script"})
	}
	for _, r := range []jailed{
		{at: "/usr/lib", reason: "libraries, QEMU's modules"},
		{at: "/usr/lib64", reason: "the loader, libraries"},
		{at: "/lib", reason: "the loader, libraries"},
		{at: "/lib64", reason: "the loader"},
		{at: filepath.Join(filepath.Dir(real), "../lib"), reason: "libraries of a program installed elsewhere"},
		{at: "/etc/ld.so.cache", reason: "says where libraries are"},
	} {
		if r.from = r.at; !slices.ContainsFunc(rows, func(other jailed) bool { return other.at == r.at }) {
			rows = append(rows, r)
		}
	}
	return rows, nil
}

// interpreterOf is the program that a script names; empty for anything else.
func interpreterOf(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, maxInterpreter)
	n, _ := io.ReadFull(f, b)
	line, _, _ := strings.Cut(string(b[:n]), "\n")
	words, found := strings.CutPrefix(line, "#!")
	if fields := strings.Fields(words); found && len(fields) > 0 {
		return fields[0]
	}
	return ""
}

// firmwareRows are QEMU's own files.
func firmwareRows(qemu string) []jailed {
	return []jailed{
		{from: filepath.Join(filepath.Dir(qemu), "../share/qemu"), at: filepath.Join(filepath.Dir(qemu), "../share/qemu"), reason: "firmware"},
		{from: "/usr/share/qemu", at: "/usr/share/qemu", reason: "firmware"},
		{from: "/usr/share/seabios", at: "/usr/share/seabios", reason: "to which links in /usr/share/qemu lead"},
	}
}

// build makes the jail and moves the calling thread, and so what it forks, into it. The thread must serve nothing else
// afterwards. When it fails, everything goes with the thread. In order, each step fatal:
//
//	a mount namespace of its own, from which nothing comes back to the host's
//	a tmpfs with mount points; a second mount of it, read-only, is the root
//	the rows, each read-only, without devices or set-user-ID programs
//	pivot_root, and the host's file systems are gone
func (j *jail) build() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("cannot make a mount namespace: %w", err)
	}
	// Modes are meant as they are written here. What is forked makes no files, and would make them its own.
	unix.Umask(0)
	defer unix.Umask(0o077)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", j.base, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, jailOptions); err != nil {
		return fmt.Errorf("cannot mount a root: %w", err)
	}
	rows, err := j.makePoints()
	if err != nil {
		return err
	}
	if err := j.copyInitrd(); err != nil {
		return err
	}
	if j.descriptors {
		if err := os.Mkdir(filepath.Join(j.base, descriptorsPath), 0o555); err != nil {
			return err
		}
	}
	// The mount below has the initramfs open for writing, so it can't be made read-only.
	if err := bindReadOnly(jailed{from: j.base, at: j.base}); err != nil {
		return err
	}
	for _, r := range rows {
		r.at = filepath.Join(j.base, r.at)
		if err := bindReadOnly(r); err != nil {
			return err
		}
	}
	if err := unix.Chdir(j.base); err != nil {
		return fmt.Errorf("cannot enter the root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot change the root: %w", err)
	}
	// "." is the old root, on top of the new one.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot let go of the old root: %w", err)
	}
	return unix.Chdir("/")
}

// makePoints makes what the rows are mounted on, and answers with those that are to be mounted: a link is made again, what
// the host doesn't have is left out, and the program must be there.
func (j *jail) makePoints() ([]jailed, error) {
	var rows []jailed
	for n, r := range j.rows {
		info, err := os.Lstat(r.from)
		if errors.Is(err, fs.ErrNotExist) && n > 0 {
			continue
		}
		if err != nil {
			return nil, err
		}
		at := filepath.Join(j.base, r.at)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return nil, err
		}
		switch {
		case info.Mode()&fs.ModeSymlink != 0 && info.Mode()&fs.ModeDevice == 0:
			var target string
			if target, err = os.Readlink(r.from); err == nil {
				err = os.Symlink(target, at)
			}
			if errors.Is(err, fs.ErrExist) {
				err = nil
			}
		case info.IsDir():
			err = os.Mkdir(at, 0o755)
			if errors.Is(err, fs.ErrExist) {
				err = nil // below another row's; mounting it again hides nothing
			}
			rows = append(rows, r)
		default:
			var f *os.File
			if f, err = os.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o444); err == nil {
				err = f.Close()
			}
			rows = append(rows, r)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot make a place for %s: %w", r.at, err)
		}
	}
	return rows, nil
}

func (j *jail) copyInitrd() error {
	if j.initrd == nil {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(j.base, initrdPath), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o400)
	if err == nil {
		_, err = io.Copy(f, io.NewSectionReader(j.initrd, 0, maxInitrd))
	}
	if err == nil {
		err = f.Chown(int(j.owner), int(j.owner))
	}
	if err != nil {
		return fmt.Errorf("cannot copy the initramfs: %w", err)
	}
	j.initrd = f
	return nil
}

// maxInitrd is more than any initramfs of ours.
const maxInitrd = 1 << 30

func bindReadOnly(r jailed) error {
	if err := unix.Mount(r.from, r.at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot mount %s: %w", r.from, err)
	}
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_NOSUID)
	if !r.device {
		flags |= unix.MS_NODEV
	}
	if !r.writable {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", r.at, "", flags, ""); err != nil {
		return fmt.Errorf("cannot protect %s: %w", r.from, err)
	}
	return nil
}
