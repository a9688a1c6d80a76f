// Package e2e runs every scenario of a user's day through the real programs: bin/sandboxctl against a bin/sandboxd of the
// test's own, each scenario in a container and in a VM. After each the host is searched for leftovers.
package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Where make puts what we need, from this directory.
const (
	root  = "../.."
	cache = root + "/.cache"
)

// Names under which TestMain imports the two images.
const (
	busybox = "busybox"
	debian  = "debian:12"
)

var (
	// The daemon most scenarios share; those that hurt a daemon start their own.
	shared *daemon
	// Absolute paths.
	sandboxctl, sandboxd, guestKernel string
)

func TestMain(m *testing.M) {
	code, err := testMain(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func testMain(m *testing.M) (code int, err error) {
	if err := findParts(); err != nil {
		return 1, err
	}
	if err := adoptOrphans(); err != nil {
		return 1, err
	}
	cleanUpOnSignal()
	if idDir, err = os.MkdirTemp("/run", "sandboxd-e2e-ids-"); err != nil {
		return 1, err
	}
	defer os.RemoveAll(idDir)
	if shared, err = newDaemon("shared"); err != nil {
		return 1, err
	}
	defer func() {
		if e := shared.remove(); e != nil && err == nil {
			err = e
		}
	}()
	if err := shared.start(); err != nil {
		return 1, err
	}
	for name, file := range map[string]string{busybox: "busybox.tar", debian: "debian.tar"} {
		if err := shared.importImage(name, file); err != nil {
			return 1, err
		}
	}
	// What a daemon makes once and keeps (templates, caches) is not a leak: have it made before the first snapshot.
	for _, iso := range isolations {
		if r := shared.command("run", "--rm", "--isolation", iso, busybox, "true").run(); r.code != 0 {
			return 1, fmt.Errorf("cannot run the first workload in a %s: exit code %d\n%s\n%s", iso, r.code, r.stderr, shared.logTail())
		}
	}
	return m.Run(), nil
}

// findParts looks for everything that make fetches and builds.
func findParts() error {
	if os.Getuid() != 0 {
		return fmt.Errorf("need root to build sandboxes: run make test-e2e as root")
	}
	for _, p := range []struct {
		path *string
		name string
	}{{&sandboxctl, "sandboxctl"}, {&sandboxd, "sandboxd"}} {
		path, err := filepath.Abs(filepath.Join(root, "bin", p.name))
		if err != nil {
			return err
		}
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w: run make build", err)
		}
		*p.path = path
	}
	kernels, err := filepath.Glob(cache + "/kernel/boot/vmlinuz-*")
	if err != nil || len(kernels) == 0 {
		return fmt.Errorf("no guest kernel in .cache/kernel: run make test-assets")
	}
	slices.Sort(kernels)
	guestKernel, err = filepath.Abs(kernels[len(kernels)-1])
	return err
}
