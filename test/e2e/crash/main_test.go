// Package crash has a daemon, and what runs for it, die at every point of pkg/fault, and sees that nothing is lost and nothing
// left.
package crash

import (
	"os"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m, "crash", nil, nil)) }
