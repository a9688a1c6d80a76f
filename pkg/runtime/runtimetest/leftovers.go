package runtimetest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// leftovers lists whatever on the host bears a sandbox's id: files below dir, cgroups, mounts, loop devices, and
// processes by their command line, their cgroup or a descriptor they hold. This process's own descriptors do not count.
func leftovers(dir, id string) []string {
	var found []string
	add := func(what, which string) { found = append(found, fmt.Sprintf("%s %s", what, which)) }

	walkNamed(dir, id, func(path string) { add("file", path) })
	walkNamed("/sys/fs/cgroup", id, func(path string) { add("cgroup", path) })
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		for line := range strings.Lines(string(mounts)) {
			if strings.Contains(line, id) {
				add("mount", strings.TrimSpace(line))
			}
		}
	}
	for _, device := range loopDevices(id) {
		add("loop device", device)
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, process := range processes {
		if process == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		if isOrphanOfOurs(process) {
			continue
		}
		for _, file := range []string{"cmdline", "cgroup"} {
			if content, err := os.ReadFile(filepath.Join(process, file)); err == nil && strings.Contains(string(content), id) {
				add("process", process+": "+file)
			}
		}
		descriptors, _ := filepath.Glob(process + "/fd/*")
		for _, fd := range descriptors {
			if target, err := os.Readlink(fd); err == nil && strings.Contains(target, id) {
				add("descriptor", fd+": "+target)
			}
		}
	}
	return found
}

// loopSettle is how long the kernel may take to give back the loop device of a file that has lost its name.
const loopSettle = 15 * time.Second

// loopDevices lists those whose file bears the id: at once if the file has its name still, otherwise only those that stay.
func loopDevices(id string) (found []string) {
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		found = nil
		named := false
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, file := range files {
			// A device that is let go of between the two calls is gone.
			if name, err := os.ReadFile(file); err == nil && strings.Contains(string(name), id) {
				found = append(found, file+": "+strings.TrimSpace(string(name)))
				named = named || !strings.HasSuffix(strings.TrimSpace(string(name)), "(deleted)")
			}
		}
		if len(found) == 0 || named || time.Since(begin) > loopSettle {
			return found
		}
	}
}

// isOrphanOfOurs reaps an ended process that came to this one, a test's subreaper, when its parent, a daemon's spawner,
// had ended. On a host it comes to init, which reaps it.
func isOrphanOfOurs(process string) bool {
	stat, err := os.ReadFile(filepath.Join(process, "stat"))
	if err != nil {
		return false
	}
	// After the name, which may hold anything.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 2 || fields[0] != "Z" || fields[1] != strconv.Itoa(os.Getpid()) {
		return false
	}
	pid, err := strconv.Atoi(filepath.Base(process))
	if err != nil {
		return false
	}
	got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
	return err == nil && got == pid || errors.Is(err, unix.ECHILD)
}

// walkNamed calls found for each file below dir whose name contains id, and not for what lies below such a one.
func walkNamed(dir, id string, found func(path string)) {
	// Cgroups and files of others come and go while this looks.
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if strings.Contains(d.Name(), id) {
			found(path)
			if d.IsDir() {
				return fs.SkipDir
			}
		}
		return nil
	})
}
