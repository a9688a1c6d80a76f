// Package harness is what tests through the real programs stand on: a sandboxd of the test's own, bin/sandboxctl called
// against it, both walls, and a search of the host for leftovers.
package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Names under which images are imported.
const (
	Busybox = "busybox"
	Debian  = "debian:12"
)

// archives are the images that make fetches, in .cache/images.
var archives = map[string]string{Busybox: "busybox.tar", Debian: "debian.tar"}

var (
	// Root is the tree's directory, Cache where make puts what it fetches; absolute.
	Root, Cache string

	sandboxctl, sandboxd, guestKernel string
)

// Main runs a package's tests with a daemon that they share, which has the named images; ready is given it. Without ready
// there is none. It is the whole of a TestMain but for os.Exit.
func Main(m *testing.M, name string, images []string, ready func(*Daemon)) int {
	code, err := run(m, name, images, ready)
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		code = 1
	}
	return code
}

func run(m *testing.M, name string, images []string, ready func(*Daemon)) (code int, err error) {
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
	if ready == nil {
		return m.Run(), nil
	}
	shared, err := NewDaemon(name)
	if err != nil {
		return 1, err
	}
	defer func() {
		if e := shared.Remove(); e != nil && err == nil {
			err = e
		}
	}()
	if err := shared.Start(); err != nil {
		return 1, err
	}
	for _, image := range images {
		if err := shared.Import(image); err != nil {
			return 1, err
		}
	}
	// What a daemon makes once and keeps (templates, caches) is not a leak: have it made before the first snapshot.
	for _, iso := range Isolations {
		if r := shared.Wall(iso).Run(Busybox, "true").Run(); r.Code != 0 {
			return 1, fmt.Errorf("cannot run the first workload in a %s: exit code %d\n%s\n%s", iso, r.Code, r.Stderr, shared.LogTail())
		}
	}
	ready(shared)
	return m.Run(), nil
}

// findParts looks for everything that make fetches and builds.
func findParts() (err error) {
	if os.Getuid() != 0 {
		return errors.New("need root to build sandboxes: run make test-e2e as root")
	}
	if Root, err = findRoot(); err != nil {
		return err
	}
	Cache = filepath.Join(Root, ".cache")
	sandboxctl, sandboxd = filepath.Join(Root, "bin/sandboxctl"), filepath.Join(Root, "bin/sandboxd")
	for _, program := range []string{sandboxctl, sandboxd} {
		if _, err := os.Stat(program); err != nil {
			return fmt.Errorf("%w: run make build", err)
		}
	}
	kernels, err := filepath.Glob(Cache + "/kernel/boot/vmlinuz-*")
	if err != nil || len(kernels) == 0 {
		return errors.New("no guest kernel in .cache/kernel: run make test-assets")
	}
	slices.Sort(kernels)
	guestKernel = kernels[len(kernels)-1]
	return nil
}

// findRoot is the directory with go.mod: a test runs in its package's.
func findRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("cannot find the tree: no go.mod above the working directory")
}

// Must fails the test at an error.
func Must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
