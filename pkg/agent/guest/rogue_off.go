//go:build !sandboxd_weaken

package guest

import "net"

// rogue is for a test build, whose agent can be told to break the protocol: see rogue_on.go.
func rogue(l net.Listener) net.Listener { return l }
