// Package bootid names the boot of this host. What a record says of processes holds in the boot that it was written in: after
// another one their numbers and start times may be somebody else's.
package bootid

import (
	"fmt"
	"os"
	"strings"
	"sync"
)

// Host is this boot's id, 36 characters, from /proc/sys/kernel/random/boot_id.
var Host = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot read the host's boot id: mount /proc: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
})

// Other reports whether a record with that boot id was written in another boot. One without is of a daemon that did not note it,
// and counts as this one's.
func Other(recorded string) (bool, error) {
	now, err := Host()
	return err == nil && recorded != "" && recorded != now, err
}
