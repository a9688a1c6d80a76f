package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func configFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFlagsWinOverTheFile(t *testing.T) {
	path := configFile(t, "state-dir: /from/file\nrun-dir: /from/file\nvm-accel: auto\nlog-level: debug\n")
	c, _, err := parseConfig([]string{"--config", path, "--run-dir", "/from/flag"})
	if err != nil {
		t.Fatal(err)
	}
	if c.stateDir != "/from/file" || c.runDir != "/from/flag" || c.vmAccel != "auto" || c.logLevel != "debug" || c.idDir != "/run/sandboxd/ids" {
		t.Errorf("%+v", c)
	}
}

// Every flag is a key, but for those of this one call.
func TestEveryFlagIsAKey(t *testing.T) {
	values := map[string]string{
		"listen": "unix:///x,tcp://1.2.3.4:5", "socket-group": "g", "state-dir": "/s", "run-dir": "/r", "id-dir": "/i", "policy": "/p",
		"access": "/ac", "audit-log": "/au", "max-memory": "5g", "max-pids": "7", "max-workloads-per-caller": "8", "min-disk-free": "9m", "metrics-addr": "127.0.0.1:1", "audit-log-size": "3m", "audit-log-keep": "2", "tls-cert": "/tc", "tls-key": "/tk", "tls-client-ca": "/ca", "vm-accel": "tcg",
		"vm-kernel": "/k", "vm-kvm-trial": "3s", "agent": "/a", "vsock-helper": "/v", "cgroup-parent": "c", "log-level": "warn", "log-format": "json", "trace": "/t", "cni-conf-dir": "/n", "cni-plugin-dir": "/q", "agent-pool": "3",
		"vm-templates": "on", "vm-templates-max": "3", "vm-templates-mib": "512", "vm-templates-shared": "true", "vm-templates-label": "owner", "vm-pool": "2", "vm-pool-mib": "700",
		"vm-snapshots-max": "5", "vm-snapshots-mib": "2048",
	}
	var lines []string
	for key, value := range values {
		lines = append(lines, key+": "+value)
	}
	c, f, err := parseConfig([]string{"--config", configFile(t, strings.Join(lines, "\n"))})
	if err != nil {
		t.Fatal(err)
	}
	f.VisitAll(func(flag *pflag.Flag) {
		switch flag.Name {
		case "config", "version", "help", "man":
			return
		}
		if want, ok := values[flag.Name]; !ok || strings.Trim(flag.Value.String(), "[]") != want { // a list of one
			t.Errorf("--%s is %q from the file, want %q: is this flag new?", flag.Name, flag.Value, want)
		}
	})
	if c.agent != "/a" {
		t.Errorf("%+v", c)
	}
}

func TestConfigRefused(t *testing.T) {
	for _, c := range []struct{ file, says string }{
		{"stat-dir: /x\n", `unknown key "stat-dir"`},
		{"# comment\nstate-dir: /x\nnosuch: 1\n", "line 3"},
		{"config: /other\n", "unknown key"},
		{"version: true\n", "unknown key"},
		{"state-dir: [/a, /b]\n", "one plain value"},
		{"state-dir:\n", "one plain value"},
		{"state-dir: /a\nstate-dir: /b\n", "already defined"},
		{"- a list\n", "config file"},
		{"state-dir: relative\n", "absolute"},
		{"vm-accel: fast\n", "kvm, auto or tcg"},
		{"vm-templates: maybe\n", "on or off"},
		{"vm-templates-max: 0\n", "between 1 and 1024"},
		{"vm-pool: 65\nvm-templates: on\n", "between 0 and 64"},
		{"vm-pool: 1\n", "--vm-templates on"},
		{"vm-pool-mib: 0\n", "between 1 and"},
		{"log-format: xml\n", "console or json"},
		{"listen: tcp://1.2.3.4:5\n", "Unix socket"},
		{"listen: unix:///a,unix:///b\n", "one address"},
		{"listen: unix:///a,tcp://nowhere\n", "tcp://"},
		{"listen: unix:///a,tcp://1.2.3.4:5\n", "--access"},
		{"listen: unix:///a,tcp://1.2.3.4:5\naccess: /a\ntls-cert: /c\ntls-key: /k\n", "--tls-client-ca"},
		{"tls-client-ca: /ca\n", "--listen names no address"},
		{"listen: unix://relative\n", "unix:///"},
		{"listen: unix:///" + strings.Repeat("x", 200) + "\n", "107"},
		{"cgroup-parent: ../up\n", "--cgroup-parent"},
		{"cgroup-parent: /abs\n", "--cgroup-parent"},
	} {
		if _, _, err := parseConfig([]string{"--config", configFile(t, c.file)}); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, want an error that says %q", c.file, err, c.says)
		}
	}
	for _, args := range [][]string{{"--nosuch"}, {"argument"}, {"--config", "/nonexistent"}, {"--state-dir", "relative"}} {
		if _, _, err := parseConfig(args); err == nil {
			t.Errorf("%q was accepted", args)
		}
	}
	if _, _, err := parseConfig([]string{"--config", configFile(t, strings.Repeat("#\n", maxConfigBytes))}); err == nil {
		t.Error("a huge file was accepted")
	}
	c, _, err := parseConfig([]string{"--listen", "tcp://:1,unix:///a,tcp://[::1]:2", "--access", "/a", "--tls-cert", "/c", "--tls-key", "/k", "--tls-client-ca", "/ca"})
	socket, tcp, addressErr := c.addresses()
	if err != nil || addressErr != nil || socket != "/a" || !slices.Equal(tcp, []string{":1", "[::1]:2"}) {
		t.Errorf("three addresses: %v %v %q %q", err, addressErr, socket, tcp)
	}
	// An empty file says nothing, and that is fine.
	if _, _, err := parseConfig([]string{"--config", configFile(t, "")}); err != nil {
		t.Errorf("an empty file: %v", err)
	}
}

func TestProgramsAreFound(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{plain, dir, filepath.Join(dir, "none")} {
		if _, err := program("agent", bad, "sandbox-agent"); err == nil {
			t.Errorf("%s was accepted as a program", bad)
		}
	}
	if err := os.Chmod(plain, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := program("agent", plain, "sandbox-agent"); err != nil || got != plain {
		t.Errorf("%q %v", got, err)
	}
	// This test program stands for sandboxd: what is beside it is found.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := program("agent", "", filepath.Base(self)); err != nil || got != self {
		t.Errorf("%q %v, want %s", got, err, self)
	}
	if _, err := program("agent", "", "sandboxd-test-nonexistent"); err == nil || !strings.Contains(err.Error(), "--agent") {
		t.Errorf("%v, want an error that names the flag", err)
	}
}

func TestHelpAndVersion(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"-h"}, {"--version"}} {
		var out strings.Builder
		if err := run(args, &out); err != nil || !strings.Contains(out.String(), "sandboxd") {
			t.Errorf("%v: %q %v", args, out.String(), err)
		}
	}
}
