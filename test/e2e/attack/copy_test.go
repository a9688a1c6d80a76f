package attack

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// copyRounds is how often each copy is made while a workload exchanges what is copied for links.
var copyRounds = map[string]int{"container": 10, "vm": 3}

// mostRounds bounds the search for a copy that comes to an end, and, where nothing keeps it from that, for one that goes astray.
const mostRounds = 60

// startSwapping starts a workload that exchanges files and directories for links, for ever.
func startSwapping(t *testing.T, w harness.Wall, hostDir string, flags ...string) (id string) {
	t.Helper()
	args := append(flags, "--tmpfs", "/tmp", "-e", "ATTACK_HOST_DIR="+hostDir, hostile, "/attack", "swap")
	// An emulated processor takes long for each.
	files := map[string]string{"container": "300", "vm": "40"}[w.Isolation]
	id = w.Start(t, append([]string{"-e", "ATTACK_SWAP_FILES=" + files}, args...)...)
	w.WaitForLog(t, id, "swapping")
	return id
}

// strayed makes a copy out and one in, and says where one was led that it must not be; done counts those that came to an end.
func strayed(t *testing.T, w harness.Wall, id, hostDir string, done map[string]int) error {
	t.Helper()
	var strayed []error
	for _, path := range []string{"/tmp/swap/tree", "/tmp/swap/file"} {
		var out bytes.Buffer
		if w.Command("cp", id+":"+path, "-").WithStdout(&out).Run().Code == 0 {
			done["out of "+path]++
		}
		if bytes.Contains(out.Bytes(), []byte("BESIDE")) {
			strayed = append(strayed, fmt.Errorf("a copy of %s has a file that is not in it", path))
		}
		if bytes.Contains(out.Bytes(), []byte(`"path":`)) {
			strayed = append(strayed, fmt.Errorf("a copy of %s has the agent's orders", path))
		}
	}
	back := filepath.Join(t.TempDir(), "back")
	if w.Command("cp", id+":/tmp/swap/tree", back).Run().Code == 0 {
		done["to a directory"]++
	}
	harness.Must(t, os.RemoveAll(back))
	var in bytes.Buffer
	tw := tar.NewWriter(&in)
	harness.Must(t, tw.WriteHeader(&tar.Header{Name: "into/written", Typeflag: tar.TypeReg, Mode: 0o600}))
	harness.Must(t, tw.Close())
	if w.Command("cp", "-", id+":/tmp/swap").WithStdin(&in).Run().Code == 0 {
		done["in"]++
	}
	names, err := os.ReadDir(hostDir)
	if err != nil || len(names) != 1 {
		strayed = append(strayed, fmt.Errorf("a copy in wrote to the host: %v, %w", names, err))
	}
	return errors.Join(strayed...)
}

// hostDirectory is a directory that anybody on the host may write to, with one file.
func hostDirectory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sandboxd-attack-")
	harness.Must(t, err)
	t.Cleanup(func() { harness.Must(t, os.RemoveAll(dir)) })
	harness.Must(t, os.Chmod(dir, 0o777))
	harness.Must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644))
	return dir
}

// A workload exchanges what is copied for links, all the while: no copy reads or writes what is not in the tree it is of, and
// none gets hold of what is the agent's or the host's.
func TestCopyOfWhatIsSwapped(t *testing.T) {
	importHostile(t, shared, hostileImage(t, buildPayload(t)))
	harness.Both(t, shared, func(t *testing.T, w harness.Wall) {
		dir := hostDirectory(t)
		id := startSwapping(t, w, dir)
		done := map[string]int{}
		ways := []string{"out of /tmp/swap/tree", "out of /tmp/swap/file", "to a directory", "in"}
		ended := func() bool { // of some, half fail: what they are of is not there then
			return !slices.ContainsFunc(ways, func(way string) bool { return done[way] == 0 })
		}
		for n := 0; n < copyRounds[w.Isolation] || n < mostRounds && !ended(); n++ {
			if err := strayed(t, w, id, dir, done); err != nil {
				t.Fatal(err)
			}
		}
		if !ended() {
			t.Errorf("of %d copies each came to an end: %v", mostRounds, done)
		}
	})
}

// The same copies, where names are resolved one after the other, or by the kernel's rules, are soon led astray.
func TestCopyOfWhatIsSwappedControl(t *testing.T) {
	d := weakDaemon(t, buildWeak(t), "")
	importHostile(t, d, hostileImage(t, buildPayload(t)))
	for _, iso := range harness.Isolations {
		t.Run(iso, func(t *testing.T) {
			w, dir := d.Wall(iso), hostDirectory(t)
			id := startSwapping(t, w, dir, "-e", weakenVariable+"=copy by descriptor,resolve copies inside the root")
			missing := []string{"is not in it", "the agent's orders"}
			for n := 0; n < mostRounds && len(missing) > 0; n++ {
				if err := strayed(t, w, id, dir, map[string]int{}); err != nil {
					missing = slices.DeleteFunc(missing, func(s string) bool { return strings.Contains(err.Error(), s) })
				}
			}
			if len(missing) > 0 {
				t.Errorf("in %d copies, none was seen that %q", mostRounds, missing)
			}
		})
	}
}

// The tests beside the code that swap what is copied find each protection missing that a test build leaves out.
func TestSwapTestsFindWhatIsMissing(t *testing.T) {
	for _, c := range []struct{ dir, without, says string }{
		{"pkg/agent/guest", "copy by descriptor", "has a file that is outside of it"},
		{"pkg/agent/guest", "resolve inside the root", "outside of the root"},
		{"cmd/sandboxctl", "stay below the destination", "wrote outside of its destination"},
		{"cmd/sandboxctl", "stay below the source", "from outside of its source"},
	} {
		program := filepath.Join(buildOnce(t, []string{"test", "-c", "-tags", "sandboxd_weaken"}, "./"+c.dir), filepath.Base(c.dir)+".test")
		cmd := exec.Command(program, "-test.run", "^TestCopyWhileSwapped$")
		cmd.Env = append(os.Environ(), weakenVariable+"="+c.without)
		out, err := harness.Output(cmd)
		var failed *exec.ExitError
		if !errors.As(err, &failed) || !bytes.Contains(out, []byte(c.says)) {
			t.Errorf("%s without %q: %v\n%s", c.dir, c.without, err, out)
		}
	}
}
