package agent_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// reportCPU adds the processor time per operation, which a busy machine distorts less: of this process, the agent and what
// the agent has reaped.
func reportCPU(b *testing.B, s *sandbox) {
	began := cpuTime(b, s)
	b.Cleanup(func() { b.ReportMetric(float64((cpuTime(b, s)-began).Microseconds())/1000/float64(b.N), "cpu-ms/op") })
}

func cpuTime(b *testing.B, s *sandbox) time.Duration {
	var own unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &own); err != nil {
		b.Fatal(err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks, n time.Duration
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime: proc_pid_stat(5), 14 to 17
		if _, err := fmt.Sscan(f, &n); err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	const userHZ = 100
	return ticks*time.Second/userHZ + time.Duration(unix.TimevalToNsec(own.Utime)+unix.TimevalToNsec(own.Stime))
}

// BenchmarkExec is one process from start to release: start, output, wait, release.
func BenchmarkExec(b *testing.B) {
	s := newSandbox(b)
	reportCPU(b, s)
	for b.Loop() {
		s.run(process{args: []string{"/bin/true"}})
	}
}

// BenchmarkOutput is how fast output travels to a reader that does nothing with it.
func BenchmarkOutput(b *testing.B) {
	s := newSandbox(b)
	reportCPU(b, s)
	b.SetBytes(64 << 20)
	for b.Loop() {
		p := s.mustStart("dd", "if=/dev/zero", "bs=1048576", "count=64", "status=none")
		var offset uint64
		for {
			chunks, eof, err := p.ReadOutput(b.Context(), offset)
			if err != nil {
				b.Fatal(err)
			}
			for _, c := range chunks {
				offset += uint64(len(c.Data))
			}
			if eof {
				break
			}
		}
		if offset != 64<<20 {
			b.Fatalf("got %d bytes", offset)
		}
	}
}
