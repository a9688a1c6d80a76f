package crash

import (
	"errors"
	"fmt"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// verbs of a scene that has snapshots.
const (
	snapshot       = "take a snapshot"
	removeSnapshot = "remove the snapshot"
	// Of the workloads that are made: their names end so.
	restored, forked = "-restored", "-forked"
)

// snapshots is a story: what goes on from the scene's workload is another, which has its own name.
func (s *scene) snapshots() error {
	return inOrder(
		func() error { return s.create(func(w *sandboxdv1.WorkloadSpec) { w.Snapshots = true }) }, s.start,
		func() error {
			return s.do(snapshot, func() error {
				_, err := s.c.Snapshots.CreateSnapshot(s.ctx, &sandboxdv1.CreateSnapshotRequest{Id: s.name, Name: s.name})
				return err
			})
		},
		func() error {
			return s.do(restored, func() error {
				_, err := s.c.Snapshots.RestoreSnapshot(s.ctx, &sandboxdv1.RestoreSnapshotRequest{Snapshot: s.name, Name: s.name + restored})
				return err
			})
		},
		func() error {
			return s.do(forked, func() error {
				_, err := s.c.Snapshots.ForkWorkload(s.ctx, &sandboxdv1.ForkWorkloadRequest{Id: s.name, Name: s.name + forked})
				return err
			})
		},
		s.removeMade,
		s.release, s.wait,
		func() error { return s.delete(false) },
	)
}

// removeMade removes what was made of the scene's workload, and its snapshot.
func (s *scene) removeMade() error {
	var errs []error
	for _, suffix := range []string{restored, forked} {
		s.asked["remove"+suffix] = true
		_, err := s.workloads().DeleteWorkload(s.ctx, &sandboxdv1.DeleteWorkloadRequest{Id: s.name + suffix, Force: true})
		if err != nil && !notFound(err) {
			errs = append(errs, err)
		}
	}
	s.asked[removeSnapshot] = true
	_, err := s.c.Snapshots.DeleteSnapshot(s.ctx, &sandboxdv1.DeleteSnapshotRequest{Snapshot: s.name})
	if err != nil && !notFound(err) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// madeTruth compares what was made of the scene's workload with what was told, and removes it. What was told of is there and runs;
// what was not is there and runs, or is not.
func (s *scene) madeTruth() (lost []string) {
	if !s.asked[snapshot] {
		return nil
	}
	for _, suffix := range []string{restored, forked} {
		r, err := s.workloads().GetWorkload(s.ctx, &sandboxdv1.GetWorkloadRequest{Id: s.name + suffix})
		switch {
		case notFound(err):
			if s.told[suffix] && !s.asked["remove"+suffix] {
				lost = append(lost, "the "+suffix[1:]+" workload is gone")
			}
		case err != nil:
			lost = append(lost, err.Error())
		case r.GetWorkload().GetStatus().GetState() != running && !s.asked["remove"+suffix]:
			lost = append(lost, fmt.Sprintf("the %s workload is %s: %s", suffix[1:], r.GetWorkload().GetStatus().GetState(), r.GetWorkload().GetStatus().GetMessage()))
		}
	}
	l, err := s.c.Snapshots.ListSnapshots(s.ctx, &sandboxdv1.ListSnapshotsRequest{})
	if err != nil {
		lost = append(lost, err.Error())
	}
	if n := len(l.GetSnapshots()); n > 1 || n == 0 && s.told[snapshot] && !s.asked[removeSnapshot] {
		lost = append(lost, fmt.Sprintf("there are %d snapshots", n))
	}
	if err := s.removeMade(); err != nil {
		lost = append(lost, err.Error())
	}
	return lost
}
