package microvm

import (
	"context"
	"math"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// writtenPatience bounds how long usage waits for QEMU's account of writes; QEMU answers in a millisecond, or is stuck.
const writtenPatience = 2 * time.Second

// blockStats is what query-blockstats says of a disk (BlockDeviceStats in QEMU's QAPI schema): what the guest had it do.
type blockStats struct {
	Stats struct {
		WrittenBytes      uint64 `json:"wr_bytes"`
		WrittenOperations uint64 `json:"wr_operations"`
	} `json:"stats"`
}

// written adds up what a guest wrote to its disks.
func (q *qmp) written(ctx context.Context) (bytes, operations uint64, err error) {
	var disks []blockStats
	if err := q.execute(ctx, "query-blockstats", &disks); err != nil {
		return 0, 0, err
	}
	for _, d := range disks { // whoever took QEMU over may say anything
		bytes = saturated(bytes, d.Stats.WrittenBytes)
		operations = saturated(operations, d.Stats.WrittenOperations)
	}
	return bytes, operations, nil
}

func saturated(a, b uint64) uint64 {
	if a > math.MaxInt64-min(b, math.MaxInt64) {
		return math.MaxInt64
	}
	return a + b
}

// addWritten adds to u what QEMU's cgroup does not count. What QEMU writes through the host's page cache is the cgroup's who wrote
// the file's page first, which was the daemon, and with cgroup v1 nobody's. So it is the guest's writes that count, by QEMU's own
// account, if they are more than what a disk was given in QEMU's name. A QEMU that does not answer, or is paused, has
// written what it had when it did.
func (i *instance) addWritten(u *spec.Usage) {
	i.writtenMu.Lock()
	defer i.writtenMu.Unlock()
	if frozen, err := i.group.Frozen(); err == nil && !frozen {
		ctx, cancel := context.WithTimeout(context.Background(), writtenPatience)
		defer cancel()
		if bytes, operations, err := i.askWritten(ctx); err == nil && bytes >= i.wroteBytes {
			i.wroteBytes, i.wrote = bytes, operations
		}
	}
	if i.wroteBytes > u.IOWriteBytes {
		u.IOWriteBytes, u.IOWrites = i.wroteBytes, i.wrote
	}
}

func (i *instance) askWritten(ctx context.Context) (bytes, operations uint64, err error) {
	q, err := i.monitor(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer q.Close() //nolint:errcheck // only asked
	return q.written(ctx)
}
