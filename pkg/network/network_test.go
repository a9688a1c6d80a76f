package network

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestAttachAndDetach(t *testing.T) {
	r := newRig(t, fakeConf{})
	t.Setenv("SECRET", "of the daemon")
	n, err := r.Attach(t.Context(), testID, "fake", r.netns)
	if err != nil {
		t.Fatal(err)
	}
	if n.Name != "fake" || n.Interface != "eth0" || n.MTU != mtuOfFake || len(n.MAC) != 17 ||
		len(n.Addresses) != 1 || n.Addresses[0].String() != "10.9.8.7/24" ||
		len(n.DNS.Nameservers) != 1 || n.DNS.Search[0] != "fake.test" || n.DNS.Options[0] != "ndots:1" {
		t.Errorf("joined: %+v", n)
	}
	if len(n.Routes) != 2 || n.Routes[0].Destination.String() != "10.9.8.0/24" || n.Routes[0].Gateway.IsValid() ||
		n.Routes[1].Destination.String() != "0.0.0.0/0" || n.Routes[1].Gateway.String() != "10.9.8.1" {
		t.Errorf("routes, those on the link first: %+v", n.Routes)
	}
	if rec, err := readRecord(r.dir(testID)); err != nil || rec.Joined == nil {
		t.Errorf("record after ADD: %+v, %v", rec, err)
	}
	if held, err := pinned(r.pin(testID)); !held || err != nil {
		t.Errorf("pinned: %t, %v", held, err)
	}
	if ids, err := r.List(); err != nil || !slices.Equal(ids, []string{testID}) {
		t.Errorf("list: %q, %v", ids, err)
	}
	// The operator changes his mind meanwhile: DEL is of what was added.
	r.write("fake.conflist", "no longer", 0o644)
	r.reopen()
	for range 2 {
		if err := r.Detach(t.Context(), testID); err != nil {
			t.Error(err)
		}
	}
	r.wantCalls("ADD netns=true", "ADD done", "DEL netns=true", "DEL done")
	r.wantNothing()
}

// Whatever a plugin does, it has not done in the end.
func TestFailedAttachIsUndone(t *testing.T) {
	for add, want := range map[string]string{
		"fail":    "no address: of 254 (code 100)",
		"die":     `said "a bug"`,
		"hang":    "did not end in time and was killed",
		"garbage": "invalid character",
		"flood":   "more than 1048576 bytes",
		"nothing": "made no interface eth0",
	} {
		t.Run(add, func(t *testing.T) {
			r := newRig(t, fakeConf{Add: add})
			begin := time.Now()
			_, err := r.Attach(t.Context(), testID, "fake", r.netns)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("attach: %v, want %q in it", err, want)
			}
			if took := time.Since(begin); took > 20*testTimeout {
				t.Errorf("it took %v", took)
			}
			if calls := r.called(); !slices.Equal(calls[len(calls)-2:], []string{"DEL netns=true", "DEL done"}) {
				t.Errorf("calls: %q", calls)
			}
			r.wantNothing()
		})
	}
	for dns, want := range map[string]string{
		`{"nameservers":["1.1.1.1\nsearch evil"]}`: "is no address",
		`{"search":["a\nnameserver 6.6.6.6"]}`:     "no name of a domain",
		`{"options":["x\ny"]}`:                     "no option",
	} {
		r := newRig(t, fakeConf{DNS: dns})
		if _, err := r.Attach(t.Context(), testID, "fake", r.netns); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("attach with DNS %s: %v, want %q in it", dns, err, want)
		}
		r.wantNothing()
	}
}

// What cannot be taken back is not forgotten.
func TestFailedDetachIsFoundAgain(t *testing.T) {
	r := newRig(t, fakeConf{Del: "fail"})
	if _, err := r.Attach(t.Context(), testID, "fake", r.netns); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Detach(t.Context(), testID); err == nil || !strings.Contains(err.Error(), "not now") {
			t.Errorf("detach: %v", err)
		}
		r.reopen()
		if ids, err := r.List(); err != nil || !slices.Equal(ids, []string{testID}) {
			t.Errorf("list: %q, %v", ids, err)
		}
	}
	// A second start before that does not begin on top of it, and leaves what is there.
	if _, err := r.Attach(t.Context(), testID, "fake", r.netns); err == nil {
		t.Error("joined twice")
	}
	rec, err := readRecord(r.dir(testID))
	if err != nil {
		t.Fatal(err)
	}
	rec.Conflist = json.RawMessage(r.conflist("fake", fakeConf{}))
	if err := writeRecord(r.dir(testID), rec); err != nil {
		t.Fatal(err)
	}
	if err := r.Detach(t.Context(), testID); err != nil {
		t.Error(err)
	}
	r.wantNothing()
}

const crashEnv = "SANDBOXD_NETWORK_TEST_CRASH"

// crashMain is a daemon that joins and is killed at it.
func crashMain(config string) {
	var c Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		panic(err)
	}
	m, err := New(c)
	if err != nil {
		panic(err)
	}
	_, err = m.Attach(context.Background(), testID, "fake", os.NewFile(3, "netns"))
	panic(err)
}

// A daemon is killed while a plugin runs. The next one lets it finish, or ends it, and only then takes back what it did.
func TestKilledDuringADD(t *testing.T) {
	for _, c := range []struct {
		add  string
		want []string
	}{
		{"slow", []string{"ADD netns=true", "ADD done", "DEL netns=true", "DEL done"}},
		{"hang", []string{"ADD netns=true", "DEL netns=true", "DEL done"}},
	} {
		t.Run(c.add, func(t *testing.T) {
			r := newRig(t, fakeConf{Add: c.add})
			config, err := json.Marshal(r.cfg)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = []string{crashEnv + "=" + string(config)}
			cmd.ExtraFiles = []*os.File{r.netns}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(20 * time.Second); !slices.Contains(r.called(), "ADD netns=true"); {
				if time.Now().After(deadline) {
					t.Fatal("the plugin was not called")
				}
				time.Sleep(time.Millisecond)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // killed
			r.reopen()
			if ids, err := r.List(); err != nil || !slices.Equal(ids, []string{testID}) {
				t.Errorf("list: %q, %v", ids, err)
			}
			if err := r.Detach(t.Context(), testID); err != nil {
				t.Error(err)
			}
			r.wantCalls(c.want...)
			r.wantNothing()
		})
	}
}

// Whatever the last daemon had come to: each state that a death can leave is taken back.
func TestDetachFromEveryState(t *testing.T) {
	const withNS, without = "DEL netns=true", "DEL netns=false"
	for name, c := range map[string]struct {
		leave func(t *testing.T, r *rig)
		del   string // none if empty
	}{
		"nothing": {func(*testing.T, *rig) {}, ""},
		"a directory without a record": {func(t *testing.T, r *rig) {
			must(t, os.Mkdir(r.dir(testID), 0o700))
			must(t, os.WriteFile(filepath.Join(r.dir(testID), recordFile+".tmp"), []byte("{"), 0o600))
		}, ""},
		"a record and no pin": {func(t *testing.T, r *rig) {
			leaveRecord(t, r)
		}, without},
		"a record and the file of a pin": {func(t *testing.T, r *rig) {
			leaveRecord(t, r)
			must(t, os.WriteFile(r.pin(testID), nil, 0o400))
		}, without},
		"a record and a pin": {func(t *testing.T, r *rig) {
			leaveRecord(t, r)
			must(t, pin(r.netns, r.pin(testID)))
		}, withNS},
		"joined": {join, withNS},
		"joined, and then the host was booted": {func(t *testing.T, r *rig) {
			join(t, r)
			must(t, inNamespace(r.pin(testID), deleteInterface))
			must(t, unix.Unmount(r.pin(testID), unix.MNT_DETACH))
			must(t, os.RemoveAll(r.run))
		}, without},
		"joined, and half a result": {func(t *testing.T, r *rig) {
			join(t, r)
			results, err := filepath.Glob(r.dir(testID) + "/results/*")
			if err != nil || len(results) != 1 {
				t.Fatalf("results: %q, %v", results, err)
			}
			must(t, os.WriteFile(results[0], []byte(`{"kind":"cniCach`), 0o600))
		}, withNS},
		"left, but the record": {func(t *testing.T, r *rig) {
			join(t, r)
			rec, err := readRecord(r.dir(testID))
			must(t, err)
			must(t, r.del(t.Context(), testID, rec))
			must(t, unpin(r.pin(testID)))
			must(t, os.Remove(r.calls))
		}, without},
		"only a pin": {func(t *testing.T, r *rig) {
			must(t, pin(r.netns, r.pin(testID)))
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fakeConf{})
			c.leave(t, r)
			r.reopen()
			if err := r.Detach(t.Context(), testID); err != nil {
				t.Error(err)
			}
			calls := r.called()
			i := slices.IndexFunc(calls, func(s string) bool { return strings.HasPrefix(s, "DEL netns") })
			switch {
			case c.del == "" && i >= 0, c.del != "" && i < 0:
				t.Errorf("calls: %q, want %q", calls, c.del)
			case i >= 0 && (calls[i] != c.del || calls[i+1] != "DEL done"):
				t.Errorf("calls: %q, want %q", calls, c.del)
			}
			r.wantNothing()
		})
	}
}

func join(t *testing.T, r *rig) {
	t.Helper()
	_, err := r.Attach(t.Context(), testID, "fake", r.netns)
	must(t, err)
}

func leaveRecord(t *testing.T, r *rig) {
	t.Helper()
	must(t, os.Mkdir(r.dir(testID), 0o700))
	list, err := r.find("fake")
	must(t, err)
	must(t, writeRecord(r.dir(testID), record{Network: "fake", Conflist: list.Bytes, PluginDirs: r.cfg.PluginDirs}))
}

func deleteInterface() error {
	link, err := netlink.LinkByName(ifName)
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestUnknownNetwork(t *testing.T) {
	r := newRig(t, fakeConf{})
	r.write("lan.conflist", r.conflist("lan", fakeConf{}), 0o644)
	err := r.Check("wan")
	if spec.KindOf(err) != spec.KindInvalid || !strings.Contains(err.Error(), "fake, lan") {
		t.Errorf("unknown network: %v", err)
	}
	if _, err := r.Attach(t.Context(), testID, "../lan", r.netns); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("attach to an unknown network: %v", err)
	}
	must(t, r.Check("lan"))
	must(t, os.RemoveAll(r.cfg.ConfDir))
	if err := r.Check("lan"); spec.KindOf(err) != spec.KindInvalid || !strings.Contains(err.Error(), "no usable conflist") {
		t.Errorf("without a directory: %v", err)
	}
}
