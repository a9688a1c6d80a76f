package guest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// maxProcFile bounds what is read of a file in /proc.
const maxProcFile = 64 << 10

// Stats implements agentv1.AgentServiceService.
func (s *Service) Stats(context.Context, *agentv1.StatsRequest) (*agentv1.StatsResponse, error) {
	s.mu.Lock()
	c := s.container
	s.mu.Unlock()
	if c == nil {
		return nil, wrongState("the sandbox has no container yet")
	}
	out := &agentv1.StatsResponse{}
	if err := memoryStats(c.root.proc, out); err != nil {
		return nil, internal("%v", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(c.root.dir.Fd()), &fs); err != nil {
		return nil, internal("cannot examine the root file system: %v", err)
	}
	out.DiskTotalBytes = fs.Blocks * uint64(fs.Frsize)
	out.DiskUsedBytes = (fs.Blocks - fs.Bfree) * uint64(fs.Frsize)
	pids, err := countPids(c.root.proc)
	if err != nil {
		return nil, internal("%v", err)
	}
	out.Pids = pids
	if out.OomKills, err = s.wall.oomKills(c.root.proc); err != nil {
		return nil, internal("%v", err)
	}
	return out, nil
}

func memoryStats(proc *os.File, out *agentv1.StatsResponse) error {
	info, err := readProc(proc, "meminfo")
	if err != nil {
		return err
	}
	fields := map[string]*uint64{
		"MemTotal": &out.MemoryTotalBytes, "MemAvailable": &out.MemoryAvailableBytes, "Cached": &out.MemoryCacheBytes,
	}
	for lines := bufio.NewScanner(bytes.NewReader(info)); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		if into := fields[name]; into != nil {
			kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return fmt.Errorf("cannot understand %s of meminfo: %w", name, err)
			}
			*into = kib << 10
		}
	}
	statm, err := readProc(proc, "self/statm")
	if err != nil {
		return err
	}
	var size, resident uint64
	if _, err := fmt.Sscan(string(statm), &size, &resident); err != nil {
		return fmt.Errorf("cannot understand statm: %w", err)
	}
	out.AgentRssBytes = resident * uint64(os.Getpagesize())
	return nil
}

// countPids counts the processes in the sandbox's pid namespace, kernel threads of a guest included.
func countPids(proc *os.File) (uint64, error) {
	fd, err := unix.Openat(int(proc.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("cannot open proc: %w", err)
	}
	dir := os.NewFile(uintptr(fd), "proc")
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return 0, fmt.Errorf("cannot list proc: %w", err)
	}
	var n uint64
	for _, name := range names {
		if name[0] >= '1' && name[0] <= '9' {
			n++
		}
	}
	return n, nil
}

func readProc(proc *os.File, name string) ([]byte, error) {
	fd, err := unix.Openat(int(proc.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s of proc: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxProcFile))
	if err != nil {
		return nil, fmt.Errorf("cannot read %s of proc: %w", name, err)
	}
	return b, nil
}
