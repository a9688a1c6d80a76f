// Package crash has a daemon, and what runs for it, die at every point of pkg/fault, and sees that nothing is lost and nothing
// left.
package crash

import (
	"fmt"
	"os"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

func TestMain(m *testing.M) {
	code := harness.Main(m, "crash", nil, nil)
	if all.points > 0 {
		fmt.Println(all)
	}
	os.Exit(code)
}
