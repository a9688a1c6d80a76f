// Command jailbreak stands in for QEMU, in tests: a virtual machine monitor that was taken over. It tries to reach what is
// not its own, says what came of each attempt, a line each, and exits with 1. The end of its own file, after a NUL, names
// the victims: the monitor is told nothing else.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Victims are what must be out of reach.
type Victims struct {
	Files   []string
	Sockets []string
	PIDs    []int
	// A TCP port of 127.0.0.1 on which the host listens.
	Port int
}

func main() {
	self, err := os.ReadFile(os.Args[0])
	var v Victims
	if err == nil {
		err = json.Unmarshal(self[bytes.LastIndexByte(self, 0)+1:], &v)
	}
	if err != nil {
		say("victims", fmt.Errorf("worked not: %w", err))
		os.Exit(2)
	}
	for _, path := range v.Files {
		_, err := os.ReadFile(path)
		if st, serr := os.Stat(path); serr == nil && st.IsDir() {
			_, err = os.ReadDir(path)
		}
		say("read "+path, err)
		say("write "+path, os.WriteFile(path, nil, 0))
	}
	for _, path := range v.Sockets {
		_, err := net.DialTimeout("unix", path, time.Second)
		say("connect "+path, err)
	}
	for _, pid := range v.PIDs {
		say(fmt.Sprintf("signal %d", pid), unix.Kill(pid, 0))
		say(fmt.Sprintf("trace %d", pid), unix.PtraceAttach(pid))
	}
	say("signal everyone", unix.Kill(-1, 0))
	_, err = net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", v.Port), time.Second)
	say("connect to the host's loopback", err)
	_, err = net.DialTimeout("tcp", "192.0.2.1:80", time.Second)
	say("connect to the network", err)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	say("raw socket", err)
	_ = fd
	for _, path := range []string{"/new", "/tmp/new", "/dev/new", "/usr/lib/new", "/etc/new", os.Args[0]} {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			f.Close()
		}
		say("make "+path, err)
	}
	say("device node", unix.Mknod("/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	say("mount", unix.Mount("proc", "/usr", "proc", 0, ""))
	say("remount", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	say("unmount", unix.Unmount("/usr/lib", unix.MNT_DETACH))
	say("change root", unix.Chroot("/usr"))
	say("become root", unix.Setresuid(0, 0, 0))
	say("open by handle", openByHandle())
	up, err := os.ReadDir("/../../..")
	if err == nil && len(up) > 0 {
		for _, e := range up {
			if e.Name() == "home" || e.Name() == "root" || e.Name() == "proc" || e.Name() == "sys" {
				say("above the root is "+e.Name(), nil)
			}
		}
	}
	os.Exit(1)
}

func openByHandle() error {
	_, err := unix.OpenByHandleAt(unix.AT_FDCWD, unix.NewFileHandle(1, make([]byte, 8)), unix.O_RDONLY)
	return err
}

func say(what string, err error) {
	var errno unix.Errno
	switch {
	case err == nil:
		fmt.Fprintf(os.Stderr, "%s: worked\n", what)
	case errors.As(err, &errno):
		fmt.Fprintf(os.Stderr, "%s: refused: %v\n", what, errno)
	default:
		fmt.Fprintf(os.Stderr, "%s: refused: %v\n", what, err)
	}
}
