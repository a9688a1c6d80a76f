package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// killHelper imports args[1] into the store args[0] and removes it again, for ever.
func killHelper(args []string) error {
	data, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	s, err := Open(args[0], nil)
	if err != nil {
		return err
	}
	for {
		fmt.Println("importing")
		image, err := s.Import(context.Background(), bytes.NewReader(data), "x")
		if err != nil {
			return err
		}
		if err := s.Remove(image.Digest, nil); err != nil {
			return err
		}
	}
}

// Killed at whatever instant, a store holds the whole image or nothing when it is opened again.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	archive := filepath.Join(dir, "archive.tar")
	data := makeTar(t, fileEntry("big", strings.Repeat("0123456789abcdef", 1<<17)), fileEntry("small", "s"), hardlinkEntry("link", "big"))
	if err := os.WriteFile(archive, data, 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	whole, err := shaFile(importBytes(t, newStore(t), data, "x").Path)
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	const rounds = 16
	found := 0
	for round := range rounds {
		store := filepath.Join(dir, fmt.Sprint(round))
		wait := 2 * took * time.Duration(round) / rounds
		killAfter(t, wait, store, archive)
		s, err := Open(store, nil)
		if err != nil {
			t.Fatal(err)
		}
		image, err := s.Get("x")
		if err != nil {
			wantEmpty(t, s)
		} else {
			found++
			if sum, err := shaFile(image.Path); err != nil || sum != whole {
				t.Errorf("killed after %v: half an image was taken for a whole one: %v", wait, err)
			}
		}
		importBytes(t, s, data, "x")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("the image was there after %d of %d kills", found, rounds)
}

// killAfter starts the helper, and kills it so long after it began its first import.
func killAfter(t *testing.T, wait time.Duration, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperEnv+"=kill")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Errorf("the helper did not begin: %v", err)
	}
	<-time.After(wait)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Errorf("the helper ended by itself: %v %s", err, errs.Bytes())
	}
}
