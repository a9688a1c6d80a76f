package osthread

import (
	"errors"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRunNeverUsesTheFirstThreadAndKeepsChangesToItself(t *testing.T) {
	const umask = 0o123
	want := errors.New("from fn")
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			err := Run(func() error {
				if unix.Gettid() == os.Getpid() {
					t.Error("fn ran on the process's first thread")
				}
				if err := unix.Unshare(unix.CLONE_FS); err != nil {
					t.Errorf("cannot unshare: %v", err)
				}
				unix.Umask(umask)
				return want
			})
			if !errors.Is(err, want) {
				t.Errorf("Run returned %v, want what fn returned", err)
			}
		})
	}
	wg.Wait()
	for range 50 {
		wg.Go(func() {
			old := unix.Umask(0o022)
			unix.Umask(old)
			if old == umask {
				t.Error("a thread that Run changed serves another goroutine")
			}
		})
	}
	wg.Wait()
}
