package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/sandboxd/sandboxd/pkg/workload"
)

// snapshotFlags bound what snapshots of VMs take of the disk.
type snapshotFlags struct {
	max int
	mib uint64
}

func (s *snapshotFlags) register(f *pflag.FlagSet) {
	f.IntVar(&s.max, "vm-snapshots-max", 64, "how many snapshots of VMs there are at most; 0 for no bound")
	f.Uint64Var(&s.mib, "vm-snapshots-mib", 0, "MiB that all snapshots of VMs may take together; 0 for no bound but what must stay free of the disk")
}

func (s *snapshotFlags) check() error {
	if s.max < 0 {
		return fmt.Errorf("cannot use --vm-snapshots-max %d: it is 0 or more", s.max)
	}
	if s.mib > 1<<40 {
		return fmt.Errorf("cannot use --vm-snapshots-mib %d: it is at most %d", s.mib, uint64(1)<<40)
	}
	return nil
}

func (s *snapshotFlags) limits() workload.SnapshotLimits {
	return workload.SnapshotLimits{Max: s.max, Bytes: s.mib << 20}
}
