package guest

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/rawfork"
)

func TestParseStatus(t *testing.T) {
	c := &confined{Args: []string{"x"}}
	calls := &rawfork.Calls{}
	for _, step := range []int{4, reportStep, executeStep} {
		calls.Must("", 0).Step = step
	}
	report := func(call, errno uint32) string {
		return string(binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, call), errno))
	}
	for said, want := range map[string]agentv1.ExecFailure_Reason{
		"":                                agentv1.ExecFailure_REASON_CONFINEMENT, // it died
		report(0, uint32(unix.EPERM)):     agentv1.ExecFailure_REASON_BAD_USER,
		report(1, uint32(unix.EPIPE)):     agentv1.ExecFailure_REASON_CONFINEMENT,
		"R" + report(2, 2):                agentv1.ExecFailure_REASON_NOT_FOUND,
		"R" + report(2, 13):               agentv1.ExecFailure_REASON_NOT_EXECUTABLE,
		"R" + report(3, 2):                agentv1.ExecFailure_REASON_CONFINEMENT, // no such call
		"R" + report(1<<32-1, 2):          agentv1.ExecFailure_REASON_CONFINEMENT,
		"Rgarbage":                        agentv1.ExecFailure_REASON_CONFINEMENT,
		"garbage":                         agentv1.ExecFailure_REASON_CONFINEMENT,
		report(0, uint32(unix.EPERM))[1:]: agentv1.ExecFailure_REASON_CONFINEMENT, // cut short
	} {
		if got := c.parseStatus(calls, []byte(said)); got == nil || got.Reason != want {
			t.Errorf("%q: %+v", said, got)
		}
	}
	if got := c.parseStatus(calls, []byte{childReady}); got != nil {
		t.Errorf("a process that runs: %+v", got)
	}
}

// FuzzParseStatus: whatever is in a new process's pipe, it runs only if that is the one byte.
func FuzzParseStatus(f *testing.F) {
	for _, said := range []string{"", "R", "RR", "R\x00\x00\x00\x00\x02\x00\x00\x00", "\x00\x00\x00\x00\x01\x00\x00\x00", "\xff\xff\xff\xff\x00\x00\x00\x00", "\x00\x00\x00\x80\x02\x00\x00\x00", "\x02\x00"} {
		f.Add([]byte(said), 1)
	}
	f.Fuzz(func(t *testing.T, said []byte, step int) {
		c := &confined{Args: []string{"x"}}
		if step < executeStep || step >= len(confinement) {
			return // the agent's own, and no part of what is read
		}
		calls := &rawfork.Calls{}
		for _, s := range []int{step, reportStep, executeStep} {
			calls.Must("", 0).Step = s
		}
		failure := c.parseStatus(calls, said)
		if runs := string(said) == string(childReady); runs != (failure == nil) {
			t.Errorf("after %q: %+v", said, failure)
		}
		if failure != nil && (failure.Message == "" || failure.Reason == agentv1.ExecFailure_REASON_UNSPECIFIED) {
			t.Errorf("after %q nothing says why: %+v", said, failure)
		}
	})
}

// FuzzUser: whatever files an image brings, who is found has ids that the kernel knows, and numbers that were asked for stay.
func FuzzUser(f *testing.F) {
	f.Add("app:x:1000:1000::/home/app:/bin/sh\n", "app:x:1000:\nmore:x:7:app\n", "app")
	f.Add("app:x:4294967296:1::/:\n", "", "app")
	f.Add("a:x:-1:0::/:\n::::\n:", "a:x:0:a,a,a\n", "a:a")
	f.Fuzz(func(t *testing.T, passwd, group, name string) {
		who, err := userSpec{Name: name, UID: 7, GID: 8}.find(strings.NewReader(passwd), strings.NewReader(group))
		if err != nil {
			return
		}
		if who.uid > maxID || who.gid > maxID || who.home == "" || !slices.Contains(who.groups, who.gid) {
			t.Errorf("%+v", who)
		}
		if name == "" && (who.uid != 7 || who.gid != 8) {
			t.Errorf("asked for 7 and 8: %+v", who)
		}
	})
}

func FuzzParseBoot(f *testing.F) {
	f.Add([]byte(`{"version":1,"token":"` + strings.Repeat("ab", 32) + `","vsockPort":1023,"imageSerial":"i","diskSerial":"d"}`))
	f.Add([]byte(`{"version":1,"token":"` + strings.Repeat("zz", 32) + `"}`))
	f.Add([]byte(`{"version":1,"port":"p"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		boot, token, err := parseBoot(b)
		if err != nil {
			return
		}
		// None is what a guest that becomes a template has, which is adopted by whoever comes first: never by accident.
		if boot.Token != "" || token != nil && *token == [len(token)]byte{} && !bytes.Contains(b, []byte(strings.Repeat("0", 64))) {
			t.Errorf("boot %+v, token %x", boot, token)
		}
	})
}

// FuzzUnpack feeds streams to unpack: whatever they say, nothing comes to be outside the directory.
func FuzzUnpack(f *testing.F) {
	add := func(headers ...tar.Header) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			_ = w.WriteHeader(&h)
		}
		_ = w.Close()
		f.Add(b.Bytes())
	}
	add(tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}, tar.Header{Name: "d/f", Typeflag: tar.TypeReg, Mode: 0o644})
	add(tar.Header{Name: "../up", Typeflag: tar.TypeReg})
	add(tar.Header{Name: "/abs", Typeflag: tar.TypeReg})
	add(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, tar.Header{Name: "l/f", Typeflag: tar.TypeReg})
	add(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../../.."}, tar.Header{Name: "l/f", Typeflag: tar.TypeReg})
	add(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "../outside"})
	f.Fuzz(func(t *testing.T, stream []byte) {
		dir := t.TempDir()
		for _, d := range []string{"root", "root/to"} {
			if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "outside"), []byte("untouched"), 0o600); err != nil {
			t.Fatal(err)
		}
		root, err := openDir(filepath.Join(dir, "root"))
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		_ = unpack(root, "/to", bytes.NewReader(stream))
		names, err := os.ReadDir(dir)
		if err != nil || len(names) != 2 {
			t.Fatalf("outside the root there are %v, %v", names, err)
		}
		var st os.FileInfo
		if st, err = os.Stat(filepath.Join(dir, "outside")); err != nil || st.Mode() != 0o600 || st.Size() != 9 {
			t.Fatalf("a file outside was changed: %v, %v", st, err)
		}
	})
}

// TestOpenInStaysInside: what an image can link to.
func TestOpenInStaysInside(t *testing.T) {
	dir := t.TempDir()
	inside := filepath.Join(dir, "root")
	for _, d := range []string{"root/etc", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"etc/which": "outside", "root/etc/which": "inside"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"absolute": "/etc/which", "up": "../../../../etc/which", "chain": "up", "far": dir + "/etc/which", "magic": "/proc/self/root/etc/which"} {
		if err := os.Symlink(target, filepath.Join(inside, name)); err != nil {
			t.Fatal(err)
		}
	}
	root, err := openDir(inside)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, want := range map[string]bool{"/absolute": true, "/up": true, "/chain": true, "/../../etc/which": true, "/far": false, "/magic": false} {
		f, err := openIn(root, name, os.O_RDONLY, 0)
		if err != nil {
			if want {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		b := make([]byte, 10)
		n, _ := f.Read(b)
		f.Close()
		if !want || string(b[:n]) != "inside" {
			t.Errorf("%s opened %q", name, b[:n])
		}
	}
}
