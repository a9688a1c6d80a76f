// Package pkg holds what the Debian package is made of; these tests make it, look into it and install it.
package pkg

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	root = "../.."
	// Where nfpm is not built yet it has to be.
	buildPatience = 5 * time.Minute
	// A call of dpkg or of one of the programs.
	callPatience = time.Minute
)

// call runs a program and answers with its output.
func call(t *testing.T, patience time.Duration, env []string, name string, args ...string) string {
	t.Helper()
	out, err := try(t, patience, env, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func try(t *testing.T, patience time.Duration, env []string, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), env...)
	stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// build makes the package of a version and answers with its path.
func build(t *testing.T, version string) string {
	t.Helper()
	if path := built[version]; path != "" {
		return path
	}
	built[version] = buildInto(t, version, filepath.Join(work, version))
	return built[version]
}

// What the tests share: making a package takes seconds.
var (
	work  string
	built = map[string]string{}
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	var err error
	if work, err = os.MkdirTemp("", "package-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(work)
	return m.Run()
}

func buildInto(t *testing.T, version, dir string) string {
	t.Helper()
	call(t, buildPatience, []string{"PACKAGE_VERSION=" + version, "PACKAGE_DATE=1700000000"}, root+"/scripts/package.sh", dir)
	found, err := filepath.Glob(dir + "/sandboxd_*.deb")
	if err != nil || len(found) != 1 {
		t.Fatalf("%q, %v", found, err)
	}
	return found[0]
}

// content is every path of the package that does not come from the commands, with mode and owner.
var content = map[string]fs.FileMode{
	"usr/bin/sandboxd":                                    0o755,
	"usr/bin/sandboxctl":                                  0o755,
	"usr/libexec/sandboxd/sandbox-agent":                  0o755,
	"usr/libexec/sandboxd/sandbox-vsock":                  0o755,
	"usr/lib/systemd/system/sandboxd.service":             0o644,
	"usr/lib/systemd/system/sandboxd.socket":              0o644,
	"usr/lib/sysusers.d/sandboxd.conf":                    0o644,
	"usr/lib/tmpfiles.d/sandboxd.conf":                    0o644,
	"etc/sandboxd":                                        0o750 | fs.ModeDir,
	"etc/sandboxd/config.yaml":                            0o640,
	"etc/sandboxd/policy.yaml":                            0o640,
	"etc/sandboxd/access.yaml":                            0o640,
	"usr/share/doc/sandboxd/copyright":                    0o644,
	"usr/share/doc/sandboxd/operations.md":                0o644,
	"usr/share/doc/sandboxd/dependencies.md":              0o644,
	"usr/share/doc/sandboxd/grafana.json":                 0o644,
	"usr/share/man/man8/sandboxd.8.gz":                    0o644,
	"usr/share/bash-completion/completions/sandboxctl":    0o644,
	"usr/share/zsh/vendor-completions/_sandboxctl":        0o644,
	"usr/share/fish/vendor_completions.d/sandboxctl.fish": 0o644,
}

func TestContent(t *testing.T) {
	deb := build(t, "1.0.0")
	dir := t.TempDir()
	call(t, callPatience, nil, "dpkg-deb", "--extract", deb, dir)
	seen := map[string]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		seen[name] = true
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if st.Uid != 0 || st.Gid != 0 {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
		want, listed := content[name]
		switch {
		case listed:
			if info.Mode() != want {
				t.Errorf("%s has mode %v, want %v", name, info.Mode(), want)
			}
		case d.IsDir():
			if info.Mode().Perm() != 0o755 {
				t.Errorf("directory %s has mode %v", name, info.Mode())
			}
		case !strings.HasPrefix(name, "usr/share/man/man1/sandboxctl") || info.Mode().Perm() != 0o644:
			t.Errorf("%s (%v) is nothing that should be there", name, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range content {
		if !seen[name] {
			t.Errorf("%s is missing", name)
		}
	}
	conffiles := call(t, callPatience, nil, "dpkg-deb", "--info", deb, "conffiles")
	if got := strings.Fields(conffiles); !slices.Equal(got, []string{"/etc/sandboxd/access.yaml", "/etc/sandboxd/config.yaml", "/etc/sandboxd/policy.yaml"}) {
		t.Errorf("conffiles %q", got)
	}
	control := call(t, callPatience, nil, "dpkg-deb", "--field", deb)
	for _, want := range []string{"Package: sandboxd\n", "Version: 1.0.0\n", "Depends: e2fsprogs", "Recommends: qemu-system-x86"} {
		if !strings.Contains(control, want) {
			t.Errorf("control lacks %q:\n%s", want, control)
		}
	}
	// The installed daemon takes the installed file, and finds its other programs where it looks for them.
	if out := call(t, callPatience, nil, dir+"/usr/bin/sandboxd", "--config", dir+"/etc/sandboxd/config.yaml", "--version"); !strings.HasPrefix(out, "sandboxd ") {
		t.Errorf("%q", out)
	}
	commented, err := os.ReadFile(dir + "/etc/sandboxd/config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile(`(?m)^#([a-z-]+: )`).ReplaceAll(commented, []byte("$1"))
	everything := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(everything, all, 0o600); err != nil {
		t.Fatal(err)
	}
	call(t, callPatience, nil, dir+"/usr/bin/sandboxd", "--config", everything, "--version")
	if bytes.Equal(all, commented) {
		t.Error("no commented key was found")
	}
	testManual(t, dir)
	for shell, file := range map[string]string{"bash": "usr/share/bash-completion/completions/sandboxctl", "zsh": "usr/share/zsh/vendor-completions/_sandboxctl", "fish": "usr/share/fish/vendor_completions.d/sandboxctl.fish"} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || !bytes.Contains(b, []byte("sandboxctl __complete")) && !bytes.Contains(b, []byte("__complete")) {
			t.Errorf("completion of %s: %v", shell, err)
		}
	}
	call(t, callPatience, nil, "bash", "-n", dir+"/usr/share/bash-completion/completions/sandboxctl")
}

func TestSameTreeSameBytes(t *testing.T) {
	var packages [][]byte
	for _, path := range []string{build(t, "1.0.0"), buildInto(t, "1.0.0", t.TempDir()), build(t, "1.1.0")} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, b)
	}
	if !bytes.Equal(packages[0], packages[1]) {
		t.Error("the same tree made two different packages")
	}
	if bytes.Equal(packages[0], packages[2]) {
		t.Error("two versions made the same package: the comparison shows nothing")
	}
}

// long finds the long flags of a help text and of a page as it is shown.
var long = regexp.MustCompile(`(?m)^\s+(?:-\w, )?--([a-z0-9-]+)`)

func flagsOf(s string) map[string]bool {
	out := map[string]bool{}
	for _, m := range long.FindAllStringSubmatch(s, -1) {
		out[m[1]] = true
	}
	return out
}

// testManual holds each page to what its command says of itself.
func testManual(t *testing.T, dir string) {
	pages, flags := map[string]bool{}, 0
	check := func(page string, command ...string) string {
		pages[filepath.Base(page)] = true
		help := call(t, callPatience, []string{"COLUMNS=200"}, command[0], append(command[1:], "--help")...)
		shown := show(t, dir, page)
		have, want := flagsOf(shown), flagsOf(help)
		if len(want) == 0 {
			t.Errorf("%v: no flag in\n%s", command, help)
		}
		for f := range want {
			flags++
			if !have[f] {
				t.Errorf("%s lacks --%s\n%s", page, f, shown)
			}
		}
		return help
	}
	check("man8/sandboxd.8.gz", dir+"/usr/bin/sandboxd")
	var walk func(words []string)
	walk = func(words []string) {
		name := strings.Join(append([]string{"sandboxctl"}, words...), "-")
		help := check("man1/"+name+".1.gz", append([]string{dir + "/usr/bin/sandboxctl"}, words...)...)
		for _, c := range subcommands(help) {
			if c == "help" { // shows the others' help
				continue
			}
			walk(append(slices.Clone(words), c))
		}
	}
	walk(nil)
	files, err := os.ReadDir(dir + "/usr/share/man/man1")
	if err != nil {
		t.Fatal(err)
	}
	if len(files)+1 != len(pages) {
		t.Errorf("%d pages, %d commands", len(files)+1, len(pages))
	}
	if len(pages) < 20 || flags < 100 {
		t.Errorf("only %d pages and %d flags were compared", len(pages), flags)
	}
}

// subcommands are the names in the lists of a help text.
func subcommands(help string) (names []string) {
	in := false
	for line := range strings.Lines(help) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasSuffix(line, ":") && !strings.HasPrefix(line, " "):
			in = slices.Contains([]string{"Workloads:", "Looking at them:", "Images, policy, daemon:", "Available Commands:", "Additional Commands:"}, line)
		case in && strings.HasPrefix(line, "  "):
			names = append(names, strings.Fields(line)[0])
		}
	}
	return names
}

// show is a page as a reader sees it, as far as this test reads: roff's escapes resolved, requests left out.
func show(t *testing.T, dir, page string) string {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "usr/share/man", page))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		if !strings.HasPrefix(line, ".") {
			out.WriteString("  " + strings.NewReplacer(`\fB`, "", `\fI`, "", `\fP`, "", `\-`, "-", `\&`, "", `\e`, `\`).Replace(line))
		}
	}
	return out.String()
}

// TestLifeOnAHost installs, upgrades, removes and purges the package on a copy of this host's own file system (an overlay,
// seen by nobody else), where its scripts find everything but a running systemd. test/testhost does it with one.
func TestLifeOnAHost(t *testing.T) {
	one, two := build(t, "1.0.0"), build(t, "1.1.0")
	script, err := filepath.Abs("life.sh")
	if err != nil {
		t.Fatal(err)
	}
	out := call(t, 2*callPatience, nil, "unshare", "--mount", "--propagation", "private", "bash", script, one, two)
	want := []string{"installed 1.0.0 0", "config kept", "upgraded 1.1.0", "removed", "state kept", "purged", "changed:", "changed with a leftover:", "/var/lib/sandboxd"}
	if got := strings.TrimSpace(out); !hasLines(got, want) {
		t.Errorf("got\n%s\nwant these lines, in order, and nothing after the last: %q", got, want)
	}
}

func hasLines(got string, want []string) bool {
	lines := strings.Split(got, "\n")
	i := 0
	for _, line := range lines {
		if i < len(want) && line == want[i] {
			i++
		}
	}
	return i == len(want) && lines[len(lines)-1] == want[len(want)-1]
}
