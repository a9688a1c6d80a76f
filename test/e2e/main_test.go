// Package e2e runs every scenario of a user's day through the real programs: bin/sandboxctl against a bin/sandboxd of the
// test's own, each scenario in a container and in a VM. After each the host is searched for leftovers.
package e2e

import (
	"os"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// What nearly every scenario says.
type (
	daemon     = harness.Daemon
	wall       = harness.Wall
	invocation = harness.Invocation
	result     = harness.Result
)

const (
	busybox = harness.Busybox
	debian  = harness.Debian
)

var (
	isolations = harness.Isolations
	must       = harness.Must
	eventually = harness.Eventually
	abridged   = harness.Abridged
	ownDaemon  = harness.OwnDaemon
)

// The daemon most scenarios share; those that hurt a daemon start their own.
var shared *daemon

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, "shared", []string{busybox, debian}, func(d *daemon) { shared = d }))
}

// both runs a scenario once behind each wall of the shared daemon, and looks for leftovers after each.
func both(t *testing.T, scenario func(t *testing.T, w wall)) {
	t.Helper()
	harness.Both(t, shared, scenario)
}
