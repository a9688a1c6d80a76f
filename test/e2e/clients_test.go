package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// buildPatience is what a build of an example, or of the tool that writes descriptors, gets on a busy machine.
	buildPatience = 8 * time.Minute

	// What both examples print; the isolation is put in.
	exampleSays = `created: ISOLATION_%
started: WORKLOAD_STATE_RUNNING
exec: code 4, stdout "through stdin\n", stderr "to stderr\n"
waited: code 3
output: "begun\nended\n"
deleted
refused: code 5, reason NOT_FOUND, field ""
refused: code 3, reason INVALID, field "spec.isolation"
`
)

// program runs one that is no part of sandboxd, and answers with what it wrote.
func program(t *testing.T, patience time.Duration, env []string, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = harness.Root
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := harness.Output(cmd)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// The examples of docs/clients.md, in Go and in JavaScript, behind both walls, through the Unix socket and over TCP with
// certificates: the whole life of a workload, and the details of two errors.
func TestExampleClients(t *testing.T) {
	d, _, overTCP := accessDaemon(t)
	dir := t.TempDir()
	goClient, descriptors := filepath.Join(dir, "go-client"), filepath.Join(dir, "sandboxd.binpb")
	program(t, buildPatience, nil, "go", "build", "-o", goClient, "./examples/go-client")
	program(t, buildPatience, nil, "scripts/proto.sh", "descriptors", descriptors)
	modules := filepath.Join(harness.Cache, "node", "node_modules")
	if _, err := os.Stat(modules); err != nil {
		t.Fatalf("no packages of the example in JavaScript: run scripts/setup.sh node: %v", err)
	}

	var tcp []string // the same flags in both
	for _, variable := range overTCP {
		name, value, _ := strings.Cut(variable, "=")
		tcp = append(tcp, "--"+strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, "SANDBOXD_"), "_", "-")), value)
	}
	for _, iso := range harness.Isolations {
		t.Run(iso, func(t *testing.T) {
			d.Watch(t)
			for way, flags := range map[string][]string{"unix": {"--address", d.Address}, "tcp": tcp} {
				flags = append(flags, "--image", busybox, "--isolation", iso, "--label", "tenant=a")
				want := strings.Replace(exampleSays, "%", strings.ToUpper(iso), 1)
				for what, got := range map[string]string{
					"go": program(t, harness.CallTimeout, nil, goClient, flags...),
					"node": program(t, harness.CallTimeout, []string{"NODE_PATH=" + modules}, "node",
						append([]string{"examples/node-client/client.js", "--descriptors", descriptors}, flags...)...),
				} {
					if got != want {
						t.Errorf("%s over %s says\n%swant\n%s", what, way, got, want)
					}
				}
			}
		})
	}
}
