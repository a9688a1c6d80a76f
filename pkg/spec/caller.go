package spec

import (
	"fmt"
	"math"
	"strconv"
)

// NoID is the user and group id of a caller that has none on this host: (uid_t)-1, which no process can have. The zero
// value would be root.
const NoID uint32 = math.MaxUint32

// Caller is who asked, as the transport proved it: the kernel for a Unix socket, a certificate over TCP.
type Caller struct {
	UID  uint32   `json:"uid"`
	GID  uint32   `json:"gid"`
	GIDs []uint32 `json:"gids,omitempty"`
	PID  int32    `json:"pid,omitempty"`
	// Names of the client's certificate, sorted: "cn:…", "dns:…", "email:…", "uri:…". Then UID and GID are NoID.
	Names []string `json:"names,omitempty"`
}

// Key tells callers apart where something is counted or remembered for each: a process of the same user, or another
// certificate of the same names, is the same caller.
func (c Caller) Key() string {
	if len(c.Names) > 0 {
		// Quoted: a name may hold whatever separates them.
		return fmt.Sprintf("certificate:%q", c.Names)
	}
	return "uid:" + strconv.FormatUint(uint64(c.UID), 10)
}

// TenantLabel is the label that says whose workload it is, for roles and metrics.
const TenantLabel = "tenant"
