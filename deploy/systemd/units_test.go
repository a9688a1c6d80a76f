// Package systemd holds the units; this test holds them to what the daemon relies on.
package systemd

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// required settings, each with what breaks without it.
var required = []struct{ unit, section, setting, reason string }{
	{"sandboxd.service", "Service", "Type=notify", "others that start after it would find no socket's answer yet"},
	{"sandboxd.service", "Service", "KillMode=process", "stopping the daemon would kill every sandbox"},
	{"sandboxd.service", "Service", "Delegate=yes", "systemd would rearrange the sandboxes' cgroups"},
	{"sandboxd.service", "Service", "RuntimeDirectoryPreserve=yes", "stopping the daemon would remove the sockets of living sandboxes"},
	{"sandboxd.service", "Service", "TasksMax=infinity", "all sandboxes together would share the default limit of tasks"},
	{"sandboxd.service", "Service", "Restart=on-failure", "a crashed daemon would stay away"},
	{"sandboxd.service", "Service", "WatchdogSec=180s", "a daemon that hangs would stay so"},
	{"sandboxd.service", "Unit", "Requires=sandboxd.socket", "it would not get its socket"},
	{"sandboxd.socket", "Socket", "SocketMode=0660", "any user could ask for sandboxes as root"},
}

func TestRequiredSettings(t *testing.T) {
	for _, r := range required {
		b, err := os.ReadFile(r.unit)
		if err != nil {
			t.Fatal(err)
		}
		if !hasSetting(string(b), r.section, r.setting) {
			t.Errorf("%s: [%s] lacks %s: %s", r.unit, r.section, r.setting, r.reason)
		}
	}
}

func hasSetting(unit, section, setting string) bool {
	in := ""
	for line := range strings.Lines(unit) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			in = strings.Trim(line, "[]")
		} else if in == section && line == setting {
			return true
		}
	}
	return false
}

// verify runs systemd-analyze on the units as they would be installed, but for the program, which is a stand-in.
func verify(t *testing.T, edit func(name, unit string) string) (string, error) {
	t.Helper()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is missing: install package systemd to run this")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "sandboxd")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"verify", "--man=no"}
	for _, name := range []string{"sandboxd.service", "sandboxd.socket"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		unit := strings.ReplaceAll(edit(name, string(b)), "/usr/bin/sandboxd", program)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(unit), 0o644); err != nil {
			t.Fatal(err)
		}
		args = append(args, path)
	}
	out, err := exec.CommandContext(t.Context(), analyze, args...).CombinedOutput()
	// What it says of other units of this machine is not about ours.
	var ours []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "sandboxd") || strings.Contains(line, dir) {
			ours = append(ours, line)
		}
	}
	return strings.Join(ours, ""), err
}

func TestSystemdAccepts(t *testing.T) {
	out, err := verify(t, func(_, unit string) string { return unit })
	if err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// Without this, a systemd-analyze that checks nothing would pass for a good one.
func TestSystemdRefuses(t *testing.T) {
	for name, edit := range map[string]func(name, unit string) string{
		"unknown setting": func(_, unit string) string {
			return strings.Replace(unit, "KillMode=process", "KilMode=process", 1)
		},
		"bad value": func(_, unit string) string {
			return strings.Replace(unit, "SocketMode=0660", "SocketMode=group", 1)
		},
		"missing program": func(_, unit string) string {
			return strings.Replace(unit, "/usr/bin/sandboxd", "/nonexistent/sandboxd", 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := verify(t, edit); err == nil && out == "" {
				t.Error("systemd-analyze verify accepted it")
			}
		})
	}
}

const decision = "../../docs/decisions/0011-the-unit-and-the-package.md"

// security is what systemd-analyze says: the settings that are open, and the score.
func security(t *testing.T, unit string) (open []string, score string) {
	t.Helper()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is missing: install package systemd to run this")
	}
	path := filepath.Join(t.TempDir(), "sandboxd.service")
	if err := os.WriteFile(path, []byte(unit), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), analyze, "security", "--offline=true", "--no-pager", "--json=short", path).Output()
	if err != nil {
		t.Fatalf("systemd-analyze security: %v", err)
	}
	var rows []struct {
		Set  *bool  `json:"set"`
		Name string `json:"name"`
	}
	if err := json.Unmarshal(out, &rows); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	for _, r := range rows {
		if r.Set != nil && !*r.Set {
			open = append(open, r.Name)
		}
	}
	out, err = exec.CommandContext(t.Context(), analyze, "security", "--offline=true", "--no-pager", path).Output()
	_, after, found := strings.Cut(string(out), "exposure level for sandboxd.service: ")
	if err != nil || !found {
		t.Fatalf("systemd-analyze security: %v in %s", err, out)
	}
	return open, strings.Fields(after)[0]
}

// reasons are the rows of the decision's table.
func reasons(t *testing.T) (text string, rows map[string]string) {
	t.Helper()
	b, err := os.ReadFile(decision)
	if err != nil {
		t.Fatal(err)
	}
	rows = map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, reason, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "` | ")
		if ok && strings.HasPrefix(line, "| `") {
			rows[strings.ReplaceAll(name, `\|`, "|")] = strings.Trim(reason, " |\n")
		}
	}
	return string(b), rows
}

// Each line that systemd-analyze marks has a reason, each reason a line, and the score is the documented one.
func TestEveryOpenLineHasAReason(t *testing.T) {
	b, err := os.ReadFile("sandboxd.service")
	if err != nil {
		t.Fatal(err)
	}
	open, score := security(t, string(b))
	text, rows := reasons(t)
	for _, name := range open {
		if rows[name] == "" {
			t.Errorf("%s is open and has no reason in %s", name, decision)
		}
		delete(rows, name)
	}
	for name := range rows {
		t.Errorf("%s has a reason to be open in %s and is not", name, decision)
	}
	if !strings.Contains(text, "says **"+score+"**") {
		t.Errorf("systemd-analyze says %s, and %s does not", score, decision)
	}
	// A line opened again is found, or the comparison shows nothing.
	again, _ := security(t, strings.Replace(string(b), "CAP_SYS_BOOT ", "", 1))
	if len(again) != len(open)+1 {
		t.Errorf("%d open lines, and with one capability more %d", len(open), len(again))
	}
}
