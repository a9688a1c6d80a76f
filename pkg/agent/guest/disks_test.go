package guest

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPrepareUpper: a layer takes over the image root's attributes once, and then keeps its own.
func TestPrepareUpper(t *testing.T) {
	image, disk := t.TempDir(), t.TempDir()
	upper, work := filepath.Join(disk, "upper"), filepath.Join(disk, "work")
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	attributes := func() unix.Stat_t {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(upper, &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	for _, step := range []struct {
		mode     uint32
		uid, gid int
		use      bool
		wantMode uint32
		wantUID  uint32
	}{
		{0o1777, 1000, 44, false, 0o1777, 1000},
		{0o2750, 1001, 44, true, 0o2750, 1001}, // prepared, but the machine ended before it was used
		{0o700, 0, 0, false, 0o2750, 1001},
	} {
		if err := unix.Chown(image, step.uid, step.gid); err != nil {
			t.Fatalf("run as root: %v", err)
		}
		if err := unix.Chmod(image, step.mode); err != nil {
			t.Fatal(err)
		}
		if err := prepareUpper(image, disk); err != nil {
			t.Fatal(err)
		}
		if st := attributes(); st.Mode&0o7777 != step.wantMode || st.Uid != step.wantUID {
			t.Errorf("%o of %d, want %o of %d", st.Mode&0o7777, st.Uid, step.wantMode, step.wantUID)
		}
		if step.use {
			if err := os.Mkdir(filepath.Join(work, "work"), 0o000); err != nil {
				t.Fatal(err)
			}
		}
	}
}
