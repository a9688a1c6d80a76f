package harness

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// Snapshot is everything that a daemon of ours has on this host, kind by kind: what is there, and how to name it.
type Snapshot map[string]map[string]bool

// Kind of thing that a sandbox is made of, with how to list those that are d's.
type Kind struct {
	Name string
	List func(d *Daemon) ([]string, error)
}

var kinds = append([]Kind{
	{"process", listProcesses},
	{"mount", ListMounts},
	{"loop device", listLoops},
	{"cgroup", listCgroups},
	{"network namespace", listNetworkNamespaces},
	{"network device", listNetworkDevices},
	{"file", listFiles},
	{"descriptor of the daemon", listDescriptors},
}, NetworkKinds...)

// Removal is over when the call that asked for it answers, but for what the kernel does behind: a killed process's
// memory, an autoclear loop device, a connection's last descriptor.
const SettleTimeout = 15 * time.Second

func TakeSnapshot(t *testing.T, d *Daemon) Snapshot {
	t.Helper()
	s, err := look(d)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func look(d *Daemon) (Snapshot, error) {
	s := Snapshot{}
	for _, k := range kinds {
		found, err := k.List(d)
		if err != nil {
			return nil, fmt.Errorf("cannot list each %s: %w", k.Name, err)
		}
		s[k.Name] = map[string]bool{}
		for _, f := range found {
			s[k.Name][f] = true
		}
	}
	return s, nil
}

// newIn names what is there after and was not before.
func (before Snapshot) newIn(after Snapshot) []string {
	var found []string
	for kind, things := range after {
		for thing := range things {
			if !before[kind][thing] {
				found = append(found, kind+": "+thing)
			}
		}
	}
	slices.Sort(found)
	return found
}

// Leaks waits for everything that was not there before to go, and names what stays.
func (before Snapshot) Leaks(d *Daemon, within time.Duration) ([]string, error) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for deadline := time.Now().Add(within); ; <-tick.C {
		after, err := look(d)
		if err != nil {
			return nil, err
		}
		found := before.newIn(after)
		if len(found) == 0 || time.Now().After(deadline) {
			return found, nil
		}
	}
}

func (before Snapshot) WantNothingNew(t *testing.T, d *Daemon) {
	t.Helper()
	found, err := before.Leaks(d, SettleTimeout)
	if err != nil {
		t.Error(err)
	}
	if len(found) > 0 {
		t.Errorf("the test left on the host:\n\t%s", strings.Join(found, "\n\t"))
	}
}

// leftAfterDaemon names what is on the host after a daemon has removed its workloads and ended, but for the two
// directories it was given and the images and records in them.
func leftAfterDaemon(d *Daemon, within time.Duration) ([]string, error) {
	own := map[string]bool{}
	for _, dir := range []string{d.RunDir, d.StateDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			own[filepath.Join(dir, e.Name())] = true
		}
	}
	before := Snapshot{"file": {}}
	files, err := listFiles(d)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		// Empty directories, images and records may stay. A socket, or anything of a sandbox, may not.
		sandbox := strings.Contains(f, "/sandbox/") || strings.HasPrefix(f, "socket ")
		before["file"][f] = own[f] || !sandbox && strings.HasPrefix(f, d.StateDir) || strings.HasPrefix(f, "directory ") && !hasID(f)
	}
	if before["mount"], err = mountsElsewhere(d); err != nil {
		return nil, err
	}
	before["network device"] = hostNetwork
	return before.Leaks(d, within)
}

// hasID reports whether a path names a workload: 32 hexadecimal digits.
func hasID(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if len(part) == 32 && strings.Trim(part, "0123456789abcdef") == "" {
			return true
		}
	}
	return false
}

// hostNetwork are the network devices of the host itself, from before any daemon ran.
var hostNetwork = func() map[string]bool {
	found := map[string]bool{}
	devices, err := listNetworkDevices(nil)
	if err != nil {
		panic(err)
	}
	for _, d := range devices {
		found[d] = true
	}
	return found
}()

func listProcesses(d *Daemon) ([]string, error) {
	var found []string
	spawners := map[int]bool{}
	for _, p := range descendants() {
		// What can't be read has just ended.
		command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		if err != nil {
			continue
		}
		// A daemon forks its containers from a small process, which is part of it: one, for as long as it lives.
		if string(command) == "sandboxd-spawner\x00" && isChild(p.parent) && !spawners[p.parent] {
			spawners[p.parent] = true
			continue
		}
		found = append(found, fmt.Sprintf("%d %s, child of %d: %s", p.pid, p.name, p.parent, strings.ReplaceAll(Abridged(string(command)), "\x00", " ")))
	}
	return found, nil
}

// sandboxMounts are the file systems that sandboxes are made of. A mount of another kind counts only where it has to do
// with the daemon's directories: proc, tmpfs and the like come and go on a host for many reasons, and a sandbox has them
// on top of one of these.
var sandboxMounts = map[string]bool{"overlay": true, "erofs": true, "ext4": true, "nsfs": true, "cgroup": true, "cgroup2": true}

func ListMounts(d *Daemon) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// id parent major:minor root where options … - type source options
		fields := strings.Fields(lines.Text())
		rest := fields[slices.Index(fields, "-")+1:]
		ours := d != nil && (strings.Contains(lines.Text(), d.RunDir) || strings.Contains(lines.Text(), d.StateDir))
		if !ours && !sandboxMounts[rest[0]] {
			continue
		}
		found = append(found, fmt.Sprintf("%s on %s, source %s", rest[0], fields[4], rest[1]))
	}
	return found, lines.Err()
}

// mountsElsewhere are those that have nothing to do with d's directories.
func mountsElsewhere(d *Daemon) (map[string]bool, error) {
	all, err := ListMounts(d)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for _, m := range all {
		found[m] = !strings.Contains(m, d.RunDir) && !strings.Contains(m, d.StateDir)
	}
	return found, nil
}

func listLoops(d *Daemon) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, f := range files {
		backing, err := os.ReadFile(f)
		if err != nil {
			continue // detached meanwhile
		}
		// An image's, kept for the next workload, is the daemon's own, and so is an emptied layer as long as it lives.
		b := string(backing)
		own := strings.HasPrefix(b, d.StateDir+"/images/") || d.Running() && strings.HasPrefix(b, d.spareLayers())
		if strings.HasPrefix(b, d.StateDir) && !own {
			found = append(found, fmt.Sprintf("%s backed by %s", strings.Split(f, "/")[3], strings.TrimSpace(b)))
		}
	}
	return found, nil
}

// cgroupParents are the directories of d's own group, one in each hierarchy that has it.
func cgroupParents(d *Daemon) ([]string, error) {
	mounts, err := ListMounts(d)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, m := range mounts {
		if !strings.HasPrefix(m, "cgroup") {
			continue
		}
		parent := filepath.Join(strings.TrimSuffix(strings.Fields(m)[2], ","), d.CgroupParent())
		if _, err := os.Stat(parent); err == nil {
			found = append(found, parent)
		}
	}
	return found, nil
}

// listCgroups finds the groups of d's workloads in every hierarchy there is.
func listCgroups(d *Daemon) ([]string, error) {
	parents, err := cgroupParents(d)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, parent := range parents {
		groups, err := filepath.Glob(filepath.Join(parent, "*"))
		if err != nil {
			return nil, err
		}
		for _, g := range groups {
			if info, err := os.Stat(g); err == nil && info.IsDir() {
				found = append(found, g)
			}
		}
	}
	return found, nil
}

// listNetworkNamespaces finds those, besides this process's and the daemon's own, that something keeps alive: a name in
// /run/netns, or a process below us. (One that a descriptor keeps is found among the daemon's descriptors.)
func listNetworkNamespaces(d *Daemon) ([]string, error) {
	found := map[string]bool{}
	names, err := filepath.Glob("/run/netns/*")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		found[n] = true
	}
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	daemons := ours
	if d != nil && d.network != nil {
		if daemons, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", d.network.file.Fd())); err != nil {
			return nil, err
		}
	}
	for _, p := range descendants() {
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.pid)); err == nil && ns != ours && ns != daemons {
			found[fmt.Sprintf("%s of process %d", ns, p.pid)] = true
		}
	}
	return slices.Collect(maps.Keys(found)), nil
}

func listNetworkDevices(*Daemon) ([]string, error) {
	entries, err := os.ReadDir("/sys/class/net")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		found = append(found, e.Name())
	}
	return found, nil
}

// kept matches what a daemon makes once, below its state directory, and keeps for the next workload. Nothing else may
// be new there after a test, a half-made one of these included.
var kept = regexp.MustCompile(`^disk-templates/ext4-\d+-\d+$|` + // a formatted disk of each size
	`^spare-layers$|` + // see countSpareLayers for what is in it
	`^audit/audit\.log(\.\d+)?$|` + // bounded by --audit-log-keep
	`^microvm/templates(/[0-9a-f]{64}(/memory|/state|/meta\.json)?)?$|` +
	`^microvm/(kernel|initramfs)$|^microvm/kernel/[0-9a-f]{64}(/release|/vmlinux)?$|^microvm/initramfs/[0-9a-f]{64}\.cpio$`) // of the guest kernel

// maxSpareLayers is how many emptied layers a daemon may keep, as docs/decisions/0010 says.
const maxSpareLayers = 4

func (d *Daemon) spareLayers() string { return filepath.Join(d.StateDir, "spare-layers") }

// countSpareLayers is how many a daemon keeps. Those of one that has ended are a leak, and so are more than it may have.
func (d *Daemon) countSpareLayers() int {
	entries, err := os.ReadDir(d.spareLayers())
	if err != nil || !d.Running() {
		return 0
	}
	return min(len(entries), maxSpareLayers)
}

func listFiles(d *Daemon) ([]string, error) {
	var found []string
	spares := d.countSpareLayers()
	for _, dir := range []string{d.RunDir, d.StateDir, idDir} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // removed meanwhile
			case err != nil:
				return err
			case kept.MatchString(strings.TrimPrefix(path, d.StateDir+"/")):
			case filepath.Dir(path) == d.spareLayers() && spares > 0:
				spares--
				return fs.SkipDir
			case e.Type()&fs.ModeSocket != 0:
				found = append(found, "socket "+path)
			case e.IsDir():
				found = append(found, "directory "+path)
			default:
				found = append(found, path)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// listDescriptors counts what the daemon holds open by what it is, so that what is opened anew under another number is
// no leak, and one more of the same is.
func listDescriptors(d *Daemon) ([]string, error) {
	if !d.Running() {
		return nil, nil
	}
	found, err := descriptorsOf(d.Cmd.Process.Pid)
	// It has a mount of each spare layer.
	mounts := 0
	for _, f := range found {
		if strings.HasPrefix(f, "/ (number ") {
			mounts++
		}
	}
	spare := map[string]bool{}
	for i := range min(d.countSpareLayers(), mounts) {
		spare[fmt.Sprintf("/ (number %d)", mounts-i)] = true
	}
	return slices.DeleteFunc(found, func(f string) bool { return spare[f] }), err
}

func descriptorsOf(pid int) ([]string, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	count := map[string]int{}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		// socket:[123], pipe:[123] and net:[123]: the number is a name, not a kind.
		if kind, _, ok := strings.Cut(target, ":["); ok && !strings.HasPrefix(target, "anon_inode") {
			target = kind
		}
		if strings.HasPrefix(target, "/memfd:sandboxd-template-") {
			continue // for as long as there is the template, of which there are few
		}
		count[target]++
	}
	var found []string
	for target, n := range count {
		for i := range n {
			found = append(found, fmt.Sprintf("%s (number %d)", target, i+1))
		}
	}
	return found, nil
}
