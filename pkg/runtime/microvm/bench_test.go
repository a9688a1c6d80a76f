package microvm

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
)

// BenchmarkColdStart is from Start to the agent's verified connection: nothing pooled, the guest's kernel and initramfs
// prepared before. cpu-ms is QEMU's and the helper's processor time until then, which a busy machine stretches less.
func BenchmarkColdStart(b *testing.B) {
	built, err := programs()
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	config := benchConfig(dir, built, realKernel(b))
	config.Logger, config.CgroupParent = zap.NewNop(), "sandboxd-bench"
	r, err := New(config)
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := errors.Join(r.Close(), cgroup.RemoveParent(config.CgroupParent)); err != nil {
			b.Error(err)
		}
	}()
	if _, err := r.guest(); err != nil {
		b.Fatal(err)
	}
	fixture := &bench{dir: dir, config: config, programs: filepath.Clean(built)}
	var cpu, remove time.Duration
	for b.Loop() {
		s := fixture.sandbox()
		i, err := r.Start(context.Background(), s)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		u, err := i.Usage()
		if err != nil {
			b.Fatal(err)
		}
		cpu += u.CPUTime
		began := time.Now()
		if err := r.Remove(context.Background(), s.ID); err != nil {
			b.Fatal(err)
		}
		remove += time.Since(began)
		b.StartTimer()
	}
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
	b.ReportMetric(float64(remove.Milliseconds())/float64(b.N), "remove-ms/op")
}
