package network

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A conflist decides which programs run as root: who else can write it, or them, is root. Doctor says what is wrong.
func TestUnusableNetworks(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, r *rig)
		want  string
	}{
		"usable":        {func(*testing.T, *rig) {}, ""},
		"no JSON":       {func(_ *testing.T, r *rig) { r.write("fake.conflist", "{", 0o644) }, "no JSON"},
		"no name":       {func(_ *testing.T, r *rig) { r.write("fake.conflist", r.conflist("", fakeConf{}), 0o644) }, "name"},
		"name of a way": {func(_ *testing.T, r *rig) { r.write("fake.conflist", r.conflist("../fake", fakeConf{}), 0o644) }, "name"},
		"called none":   {func(_ *testing.T, r *rig) { r.write("fake.conflist", r.conflist("none", fakeConf{}), 0o644) }, "means no network"},
		"without plugins": {func(_ *testing.T, r *rig) {
			r.write("fake.conflist", `{"cniVersion":"1.0.0","name":"fake","plugins":[]}`, 0o644)
		}, "plugin"},
		"too large":          {func(_ *testing.T, r *rig) { r.write("fake.conflist", strings.Repeat(" ", maxConfBytes+1), 0o644) }, "bytes"},
		"writable by others": {func(_ *testing.T, r *rig) { r.write("fake.conflist", r.conflist("fake", fakeConf{}), 0o646) }, "can be written by others"},
		"of another user":    {func(t *testing.T, r *rig) { must(t, os.Chown(filepath.Join(r.cfg.ConfDir, "fake.conflist"), 1000, 0)) }, "belongs to uid 1000"},
		"a FIFO":             {func(t *testing.T, r *rig) { replace(t, r, func(p string) error { return unix.Mkfifo(p, 0o644) }) }, "no regular file"},
		"a directory":        {func(t *testing.T, r *rig) { replace(t, r, func(p string) error { return os.Mkdir(p, 0o755) }) }, "no regular file"},
		"plugin missing":     {func(t *testing.T, r *rig) { must(t, os.Remove(filepath.Join(r.cfg.PluginDirs[0], "fake"))) }, "containernetworking-plugins"},
		"plugin elsewhere": {func(_ *testing.T, r *rig) {
			r.write("fake.conflist", strings.Replace(r.conflist("fake", fakeConf{}), `"type":"fake"`, `"type":"../plugins/fake"`, 1), 0o644)
		}, "../plugins/fake"},
		"plugin writable by others":     {func(t *testing.T, r *rig) { plugin(t, r, 0o757, 0) }, "can be written by others"},
		"plugin of another user":        {func(t *testing.T, r *rig) { plugin(t, r, 0o755, 1000) }, "belongs to uid 1000"},
		"plugins' directory for others": {func(t *testing.T, r *rig) { must(t, os.Chmod(r.cfg.PluginDirs[0], 0o777)) }, "can write to"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fakeConf{})
			c.spoil(t, r)
			checks := r.Checks()
			if len(checks) != 1 {
				t.Fatalf("checks: %+v", checks)
			}
			err := r.Check("fake")
			if c.want == "" {
				if err != nil || checks[0].Result != "ok" {
					t.Errorf("check: %v, doctor: %+v", err, checks[0])
				}
				return
			}
			if err == nil {
				t.Error("the network can be used")
			}
			if checks[0].Result != "warning" || checks[0].Advice == "" || !strings.Contains(checks[0].Finding, c.want) {
				t.Errorf("doctor: %+v, want %q in it", checks[0], c.want)
			}
			if _, err := r.Attach(t.Context(), testID, "fake", r.netns); err == nil {
				t.Error("joined")
			}
			r.wantCalls("")
			r.wantNothing()
		})
	}
}

func replace(t *testing.T, r *rig, with func(string) error) {
	t.Helper()
	path := filepath.Join(r.cfg.ConfDir, "fake.conflist")
	must(t, os.Remove(path))
	must(t, with(path))
}

func plugin(t *testing.T, r *rig, mode os.FileMode, uid int) {
	t.Helper()
	path := filepath.Join(r.cfg.PluginDirs[0], "fake")
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755))
	must(t, os.Chmod(path, mode))
	must(t, os.Chown(path, uid, 0))
}

func TestSecondOfOneNameIsNotUsed(t *testing.T) {
	r := newRig(t, fakeConf{})
	r.write("zz.conflist", r.conflist("fake", fakeConf{Add: "fail"}), 0o644)
	r.write("readme.txt", "of no account", 0o666)
	checks := r.Checks()
	if len(checks) != 2 || checks[0].Result != "ok" || checks[1].Result != "warning" || !strings.Contains(checks[1].Finding, "fake.conflist already") {
		t.Errorf("doctor: %+v", checks)
	}
	join(t, r)
	must(t, r.Detach(t.Context(), testID))
}

func FuzzParseConf(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"lan","plugins":[{"type":"bridge","ipam":{"type":"host-local"}}]}`))
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"lan","loadOnlyInlinedPlugins":true,"disableCheck":"true","plugins":[{"type":"a"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseConf(b)
		if err != nil {
			return
		}
		if !namePattern.MatchString(list.Name) || len(list.Plugins) == 0 {
			t.Errorf("accepted %q with %d plugins", list.Name, len(list.Plugins))
		}
		_ = pluginsOf(list)
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"network":"lan","conflist":{},"pluginDirs":["/x"],"joined":{"name":"lan","addresses":["10.0.0.1/8"],"routes":[{"destination":"::/0","gateway":"fe80::1"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecord(b); err == nil && r.Version != recordVersion {
			t.Errorf("accepted version %d", r.Version)
		}
	})
}
