package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// allowedFindings are what runtimetest may find fault with, each with its reason; docs/parity.md has them too. One that is not
// found any more fails the test, so that the list stays true.
var allowedFindings = map[string]string{
	"has expected soft RLIMIT_NOFILE":               "runtimetest is a Go program, and Go raises its own soft limit to the hard one before main: TestUlimit looks with a shell",
	"has expected sysctl net.ipv4.ping_group_range": "the kernel writes a tab where the configuration has a blank",
}

// withheld are parts of the configuration that runtimetest is not shown, for it would end there and compare nothing further.
var withheld = []struct{ readonlyPath, reason string }{
	{"/proc/sysrq-trigger", "runtimetest reads each read-only path, and the kernel answers EIO to every read of this one: TestRefusedInside writes to it"},
}

// runtimetest, of the authors of the OCI runtime-spec, compares what it sees from inside with the effective configuration.
// It is the workload's own process, and waits for the configuration at a FIFO of its image.
func TestRuntimetestPasses(t *testing.T) {
	d := shared
	d.Watch(t)
	archive := filepath.Join(t.TempDir(), "runtimetest.tar")
	ref, err := name.NewTag("example.com/runtimetest:1")
	must(t, err)
	must(t, tarball.WriteToFile(archive, ref, runtimetestImage(t)))
	d.Call(t, "image", "import", "--name", "runtimetest", archive)
	defer d.Call(t, "image", "rm", "runtimetest")
	found := map[string]bool{}
	for _, iso := range isolations {
		for what, flags := range map[string][]string{
			"as it comes": {"--ulimit", "nofile=100:200"},
			"with much asked for": {"--read-only", "--tmpfs", "/scratch", "--cap-add", "NET_ADMIN", "--cap-drop", "CHOWN", "-u", "0:0",
				"--ulimit", "nofile=100:200", "--ulimit", "core=0", "-w", "/etc", "-e", "A=b", "--hostname", "compared", "--memory", "256m", "--pids", "64"},
		} {
			w := d.Wall(iso)
			what := iso + ", " + what
			id := w.Create(t, append(flags, "runtimetest", "/runtimetest", "--path", "/conf", "--compliance-level", "should")...)
			d.Call(t, "start", id)
			config := shown(t, d.Call(t, "inspect", "--oci", id).Stdout, iso)
			// The writer may not live to see its own end: the workload's process, once it has read, may be faster, and takes it along.
			r := w.Command("exec", "-i", id, "/bin/sh", "-c", "cat >/conf/config.json").WithStdin(strings.NewReader(config)).Run()
			if r.Code != 0 && r.Code != 137 {
				t.Errorf("%s: cannot hand over the configuration: exit code %d, %s", what, r.Code, r.Stderr)
			}
			code := d.Call(t, "wait", id).Stdout
			logs := d.Call(t, "logs", id)
			// What it finds is in its report; its exit code says whether it came to the end.
			if code != "0\n" || !strings.Contains(logs.Stdout, "\n1..") {
				t.Errorf("%s: runtimetest ended early, with exit code %s: %s%s", what, code, abridged(logs.Stdout), logs.Stderr)
			}
			checkFindings(t, what, logs.Stdout, found)
			d.Call(t, "rm", id)
		}
	}
	for finding := range allowedFindings {
		if !found[finding] {
			t.Errorf("allowed, but not found any more: %s", finding)
		}
	}
}

// shown is the configuration as runtimetest gets it.
func shown(t *testing.T, effective, isolation string) string {
	t.Helper()
	config := new(specs.Spec)
	must(t, json.Unmarshal([]byte(effective), config))
	for _, w := range withheld {
		i := slices.Index(config.Linux.ReadonlyPaths, w.readonlyPath)
		if i < 0 {
			t.Fatalf("the configuration has no read-only path %s", w.readonlyPath)
		}
		config.Linux.ReadonlyPaths = slices.Delete(config.Linux.ReadonlyPaths, i, i+1)
	}
	// Compared below, where there are any: a container without would be one on the host's own ids.
	if want := map[string]int{"container": 1, "vm": 0}[isolation]; len(config.Linux.UIDMappings) != want || len(config.Linux.GIDMappings) != want {
		t.Errorf("in a %s: id mappings %v and %v, want %d", isolation, config.Linux.UIDMappings, config.Linux.GIDMappings, want)
	}
	b, err := json.Marshal(config)
	must(t, err)
	return string(b)
}

// checkFindings reads a report in the Test Anything Protocol.
func checkFindings(t *testing.T, what, report string, found map[string]bool) {
	t.Helper()
	passed := 0
	for line := range strings.Lines(report) {
		line = strings.TrimSpace(line)
		_, finding, _ := strings.Cut(line, " - ")
		switch {
		case strings.HasPrefix(line, "ok ") && !strings.Contains(line, "# SKIP"):
			passed++
		case strings.HasPrefix(line, "not ok ") && allowedFindings[finding] != "":
			found[finding] = true
		case strings.HasPrefix(line, "not ok "):
			t.Errorf("%s: runtimetest found fault: %s", what, finding)
		}
	}
	// Capabilities alone make five sets of forty.
	if passed < 250 {
		t.Errorf("%s: only %d comparisons", what, passed)
	}
	t.Logf("%s: %d comparisons passed", what, passed)
}

// runtimetestImage is busybox, runtimetest, and the FIFO /conf/config.json.
func runtimetestImage(t *testing.T) v1.Image {
	t.Helper()
	program, err := os.ReadFile(filepath.Join(harness.Cache, "tools", "runtimetest"))
	if err != nil {
		t.Fatalf("%v: run scripts/tools.sh runtimetest", err)
	}
	base, err := tarball.LayerFromFile(filepath.Join(harness.Cache, "images", "busybox.tar"))
	must(t, err)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range []struct {
		header  tar.Header
		content []byte
	}{
		{tar.Header{Name: "runtimetest", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))}, program},
		{tar.Header{Name: "conf", Typeflag: tar.TypeDir, Mode: 0o755}, nil},
		{tar.Header{Name: "conf/config.json", Typeflag: tar.TypeFifo, Mode: 0o666}, nil},
	} {
		must(t, w.WriteHeader(&f.header))
		_, err := w.Write(f.content)
		must(t, err)
	}
	must(t, w.Close())
	own, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	must(t, err)
	img, err := mutate.AppendLayers(empty.Image, base, own)
	must(t, err)
	config, err := img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	img, err = mutate.ConfigFile(img, config)
	must(t, err)
	return img
}
