package crash

import (
	"fmt"
	"slices"
	"strings"
	"time"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// goneLimit bounds the wait for what a daemon that came back deletes.
const goneLimit = 20 * time.Second

// truth looks, once the daemon is back, at everything the scene's caller was told, goes on to the workload's end, and says
// what does not hold.
func (s *scene) truth() (lost []string) {
	say := func(format string, args ...any) { lost = append(lost, fmt.Sprintf(format, args...)) }
	if s.asked[importing] {
		return s.imageTruth()
	}
	if !s.asked[create] {
		return nil
	}
	lost = s.madeTruth()
	w, err := s.get()
	for limit := time.Now().Add(goneLimit); err == nil && w.GetStatus().GetState() == sandboxdv1.WorkloadState_WORKLOAD_STATE_DELETING && time.Now().Before(limit); time.Sleep(pollPause) {
		w, err = s.get()
	}
	switch {
	case notFound(err):
		if s.told[create] && !s.asked[remove] {
			say("it is gone")
		}
		return lost
	case err != nil:
		return []string{err.Error()}
	case s.told[remove]:
		say("it was deleted, and has come back")
	case w.GetStatus().GetState() == sandboxdv1.WorkloadState_WORKLOAD_STATE_DELETING && s.asked[remove]:
		// Its caller was told that it failed on the way: it must be possible to ask again.
		if err := s.delete(true); err != nil {
			say("%v", err)
		}
		return lost
	}
	lost = append(lost, s.promises(w)...)
	if err := s.finish(w); err != nil {
		say("%v", err)
	}
	if err := s.delete(true); err != nil && !notFound(err) {
		say("%v", err)
	}
	return lost
}

// pollPause paces looking again.
const pollPause = 20 * time.Millisecond

// promises compares a record with what was told.
func (s *scene) promises(w *sandboxdv1.Workload) (lost []string) {
	say := func(format string, args ...any) { lost = append(lost, fmt.Sprintf(format, args...)) }
	st := w.GetStatus()
	state := st.GetState()
	if s.code != nil && (state != exited || st.GetExitCode() != *s.code) {
		say("the exit code %d was told, and it is %s with code %d", *s.code, state, st.GetExitCode())
	}
	if cpu := w.GetSpec().GetResources().GetCpuMillis(); s.told[update] && cpu != updatedCPU {
		say("it was updated to %d, and has %d", updatedCPU, cpu)
	}
	if !s.told[start] {
		return lost
	}
	over := s.asked[release] || s.asked[stop] || s.asked[murder] || s.asked[remove] || s.endsItself
	switch {
	case state == created, state == failed && !s.asked[murder]: // what was killed to be removed is gone
		say("its start was told, and it is %s: %s", state, st.GetMessage())
	case over:
	case s.told[pause] && !s.asked[resume] && state != paused:
		say("its pause was told, and it is %s", state)
	case (!s.asked[pause] || s.told[resume]) && state != running:
		say("it was told to run, and it is %s: %s", state, st.GetMessage())
	}
	return lost
}

// finish has a workload come to its end from wherever it is, and looks at what it wrote.
func (s *scene) finish(w *sandboxdv1.Workload) error {
	state := w.GetStatus().GetState()
	// A start that was cut off may be repeated. (A VM's costs too much time to try it at each point.)
	if (state == failed && !s.asked[murder] || state == created) && !s.asked[remove] && s.asked[start] && s.wall == "container" {
		if err := s.start(); err != nil {
			return err
		}
		state = running
	}
	if state == paused {
		if err := s.resume(); err != nil {
			return err
		}
		state = running
	}
	if state == running && !s.endsItself {
		for path := range s.files {
			if err := s.copyOut(path); err != nil {
				return err
			}
		}
		if err := s.release(); err != nil && !s.over() {
			return err
		}
	}
	if state != running && state != stopping && state != exited {
		return nil
	}
	if err := s.wait(); err != nil {
		return err
	}
	switch {
	case s.code == nil && s.asked[murder]:
		return nil
	case s.code == nil:
		w, err := s.get()
		return fmt.Errorf("it has no exit code: %s, %w", w.GetStatus().GetMessage(), err)
	case s.asked[stop] && slices.Contains([]int32{128 + 9, 128 + 15}, *s.code):
		return nil
	case *s.code != waiterCode:
		return fmt.Errorf("it ended with code %d, not %d", *s.code, waiterCode)
	}
	out, err := s.logs()
	if err != nil {
		return err
	}
	if s.endsItself {
		if !strings.HasSuffix(out, lastLine) {
			return fmt.Errorf("its output ends with %q", out[max(0, len(out)-200):])
		}
		return nil
	}
	if s.starts == 1 && out != waiterLog || !strings.HasSuffix(out, waiterLog) {
		return fmt.Errorf("it wrote %q", out)
	}
	return nil
}

// over reports whether the workload has ended: it may have been let go before.
func (s *scene) over() bool {
	w, err := s.get()
	return err == nil && w.GetStatus().GetState() != running
}

func (s *scene) imageTruth() (lost []string) {
	say := func(format string, args ...any) { lost = append(lost, fmt.Sprintf(format, args...)) }
	_, err := s.c.Images.GetImage(s.ctx, &sandboxdv1.GetImageRequest{Reference: s.imageName()})
	switch {
	case notFound(err):
		if s.told[importing] && !s.asked[removing] {
			say("the image is gone")
		}
		return lost
	case err != nil:
		return []string{err.Error()}
	case s.told[removing]:
		say("the image was removed, and has come back")
	}
	if err := s.removeImage(); err != nil {
		say("%v", err)
	}
	return lost
}
