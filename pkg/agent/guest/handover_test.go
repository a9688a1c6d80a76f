package guest

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func FuzzHandoverID(f *testing.F) {
	for _, seed := range []string{"", "\xfd", "\xfdexec-1", "\x00\x00\x00\x01", "\xfd" + strings.Repeat("x", 200)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		id, ok := handoverID(message)
		if ok != (id != "") || len(id) > maxIDLen {
			t.Errorf("%q: %q, %v", message, id, ok)
		}
	})
}

func FuzzPassedDescriptors(f *testing.F) {
	f.Add(unix.UnixRights())
	f.Add([]byte{16, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, control []byte) { _, _ = passedDescriptors(control) })
}

// sorted is a listener with a handover behind it.
func sorted(t *testing.T) (l *sortingListener, h *handover, dial func() *net.UnixConn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	inner, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h = &handover{}
	l = newSortingListener(inner, h)
	t.Cleanup(func() { l.Close() })
	return l, h, func() *net.UnixConn {
		t.Helper()
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn.(*net.UnixConn)
	}
}

func TestHandover(t *testing.T) {
	_, h, dial := sorted(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	conn := dial()
	if _, _, err := conn.WriteMsgUnix([]byte("\xfdp1"), unix.UnixRights(int(w.Fd()), int(w.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	w.Close()
	files, err := h.take("p1")
	if err != nil || len(files) != spec.HandoverDescriptors {
		t.Fatalf("%d descriptors, %v", len(files), err)
	}
	for _, f := range files {
		if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("a descriptor would be inherited: flags %x, %v", flags, err)
		}
	}
	closeAll(files)
	r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("somebody keeps an end: %d, %v", n, err)
	}
	if len(h.parcels) != 0 {
		t.Error("it is remembered")
	}
}

// Whatever a connection begins with, calls get through, and descriptors that come in the wrong way are closed.
func TestHandoverOfTheWrongKind(t *testing.T) {
	l, h, dial := sorted(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fd := int(w.Fd())
	for message, rights := range map[string][]byte{
		"\xfdnone":                          nil,
		"\xfdone":                           unix.UnixRights(fd),
		"\xfdthree":                         unix.UnixRights(fd, fd, fd),
		"\xfd":                              unix.UnixRights(fd, fd),
		"\xfd" + strings.Repeat("long", 64): unix.UnixRights(fd, fd),
	} {
		conn := dial()
		if _, _, err := conn.WriteMsgUnix([]byte(message), rights, nil); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if n, err := conn.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
			t.Errorf("%.10q: it is not closed: %d, %v", message, n, err)
		}
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("somebody keeps an end: %d, %v", n, err)
	}
	if len(h.parcels) != 0 {
		t.Errorf("%d are kept", len(h.parcels))
	}
	dial() // says nothing, and holds up nobody
	call := dial()
	if _, err := call.Write([]byte{0, 0, 0, 1}); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	first := make([]byte, 4)
	if n, err := conn.Read(first); n != 4 || err != nil || first[3] != 1 {
		t.Errorf("a call's first bytes are %v, %v", first[:n], err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	closed := make(chan struct{})
	go func() { l.Close(); close(closed) }()
	select {
	case <-closed:
	case <-ctx.Done():
		t.Error("the silent connection keeps the listener from closing")
	}
}
