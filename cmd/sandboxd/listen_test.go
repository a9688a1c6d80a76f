package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait of the tests.
const patience = 30 * time.Second

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("run this test as root: it makes what belongs to root and to others")
	}
}

// inherited is set in a copy of this test program that takes a socket as from systemd.
const inherited = "SANDBOXD_TEST_INHERITED"

func TestMain(m *testing.M) {
	if os.Getenv(inherited) != "" {
		if err := answerInherited(); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// answerInherited answers one connection with where it listens.
func answerInherited() error {
	l, err := inheritedListener()
	if err != nil {
		return err
	}
	if l == nil {
		return errors.New("none was passed")
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS"} {
		if _, ok := os.LookupEnv(name); ok {
			return errors.New(name + " is still there for what the daemon starts")
		}
	}
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	_, err = conn.Write([]byte(l.Addr().String()))
	return errors.Join(err, conn.Close(), l.Close())
}

// activate runs this program as systemd would: with sockets from descriptor 3 on.
func activate(t *testing.T, pid, fds string, files ...*os.File) *exec.Cmd {
	t.Helper()
	// Only the child knows its own pid; exec keeps it.
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `LISTEN_PID=`+pid+` LISTEN_FDS=`+fds+` exec "$0"`, "/proc/self/exe")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[len(cmd.Args)-1] = self
	cmd.Env = []string{inherited + "=1"}
	cmd.ExtraFiles = files
	return cmd
}

func TestSocketActivation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var stderr strings.Builder
	cmd := activate(t, "$$", "1", file)
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 256)
	n, _ := conn.Read(buf)
	if err := cmd.Wait(); err != nil || string(buf[:n]) != path {
		t.Errorf("answer %q, %v: %s", buf[:n], err, stderr.String())
	}
	// Closing it must not remove systemd's socket.
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket is gone: %v", err)
	}
}

func TestSocketActivationRefused(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	file, err := tcp.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, c := range []struct{ pid, fds, says string }{
		{"1", "1", "none was passed"}, // meant for another process
		{"$$", "0", "none was passed"},
		{"$$", "2", "one ListenStream"},
		{"$$", "1", "no Unix stream socket"},
	} {
		if out, err := activate(t, c.pid, c.fds, file, file).CombinedOutput(); err == nil || !strings.Contains(string(out), c.says) {
			t.Errorf("LISTEN_PID=%s LISTEN_FDS=%s: %v, %q; want %q", c.pid, c.fds, err, out, c.says)
		}
	}
}

func TestNotify(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "n"), "@sandboxd-test-" + filepath.Base(t.TempDir())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		t.Setenv("NOTIFY_SOCKET", name)
		n := newNotifier()
		if _, ok := os.LookupEnv("NOTIFY_SOCKET"); ok {
			t.Error("what the daemon starts could speak for it")
		}
		if err := n.send("READY=1", "STATUS=x"); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 256)
		if err := l.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Read(buf); err != nil || string(buf[:got]) != "READY=1\nSTATUS=x" {
			t.Errorf("%q %v", buf[:got], err)
		}
	}
	if err := (notifier{}).send("READY=1"); err != nil {
		t.Errorf("without systemd: %v", err)
	}
}

func TestListen(t *testing.T) {
	needRoot(t)
	// As main does: the socket must never be open to all, not even for a moment.
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "run")
	path := filepath.Join(dir, "s")
	l, at, err := listen(path, "12345")
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || at != path || info.Mode().Perm() != 0o660 || info.Sys().(*syscall.Stat_t).Gid != 12345 {
		t.Errorf("socket at %s: %v %v", at, info, err)
	}
	// The group gets through the directory, and nobody else.
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o710 || info.Sys().(*syscall.Stat_t).Gid != 12345 {
		t.Errorf("directory: %v %v", info, err)
	}
	if _, _, err := listen(path, ""); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("a socket somebody answers on was taken: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket stayed: %v", err)
	}

	// One that a daemon left behind when it was killed.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if l, _, err = listen(path, ""); err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	l.Close()

	// What is no socket is not removed.
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := listen(path, ""); err == nil {
		t.Error("a file was taken for a socket")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("the file: %q %v", b, err)
	}
	if _, _, err := listen(path, "no-such-group-here"); err == nil || !strings.Contains(err.Error(), "groupadd") {
		t.Errorf("an unknown group: %v", err)
	}
}

func TestDirectories(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	path := filepath.Join(base, "a", "b")
	if err := makeDir(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info, err)
	}
	if err := makeDir(path); err != nil {
		t.Errorf("again: %v", err)
	}
	link, file, open, others := filepath.Join(base, "link"), filepath.Join(base, "file"), filepath.Join(base, "open"), filepath.Join(base, "others")
	err := errors.Join(os.Symlink(path, link), os.WriteFile(file, nil, 0o600), os.Mkdir(open, 0o700), os.Chmod(open, 0o777),
		os.Mkdir(others, 0o700), os.Chown(others, 12345, 0))
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{link, file, open, others} {
		if err := makeDir(bad); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	first, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockDir(dir); err == nil || !strings.Contains(err.Error(), "another sandboxd (pid ") {
		t.Errorf("a second daemon: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := lockDir(dir)
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	again.Close()
}

// A shared directory is not to be made root's own for a socket's sake.
func TestListenInSharedDirectory(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "shared")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777|fs.ModeSticky)); err != nil {
		t.Fatal(err)
	}
	l, _, err := listen(filepath.Join(dir, "s"), "")
	if err == nil {
		l.Close()
		t.Fatal("it listens where others can put a socket")
	}
	if strings.Contains(err.Error(), "chmod") || !strings.Contains(err.Error(), "choose a --listen") {
		t.Errorf("it said: %v", err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("the directory is now %v, %v", info, err)
	}
}
