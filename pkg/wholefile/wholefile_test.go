package wholefile

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestReplaceAndRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, write := range []func(string, []byte) error{Replace, ReplaceDurably} {
		for _, content := range []string{"longer at first", "", "short"} {
			if err := write(path, []byte(content)); err != nil {
				t.Fatal(err)
			}
			for _, read := range []func(string, int64) ([]byte, error){Read, ReadOwn} {
				if b, err := read(path, 15); err != nil || string(b) != content {
					t.Errorf("%q, %v, want %q", b, err, content)
				}
			}
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	path, link, fifo := filepath.Join(dir, "f"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(path, make([]byte, 16), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(path, link), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(path, 15); !errors.Is(err, ErrTooLarge) {
		t.Errorf("16 bytes of 15: %v", err)
	}
	if b, err := Read(link, 16); err != nil || len(b) != 16 {
		t.Errorf("through a link: %d bytes, %v", len(b), err)
	}
	if _, err := ReadOwn(link, 16); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("a link where a file of our own should be: %v", err)
	}
	for what, bad := range map[string]string{"a FIFO": fifo, "a directory": dir} {
		if _, err := Read(bad, 16); err == nil {
			t.Errorf("%s was read", what)
		}
	}
	if err := os.Symlink("/nowhere", path+temporary); err != nil {
		t.Fatal(err)
	}
	if err := Replace(path, nil); err == nil {
		t.Error("wrote through a link that lay in the way")
	}
}
