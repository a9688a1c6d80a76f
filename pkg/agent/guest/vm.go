package guest

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// bootFile is what the daemon gives a guest in its initramfs: see spec.VMBoot.
const bootFile = "/boot.json"

// initramfsMounts are what the agent itself needs of its kernel, before there is a container.
var initramfsMounts = []struct {
	fstype, target string
	attrs          uint64
	reason         string
}{
	{"proc", "/proc", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, "a container's own can only be mounted where one is"},
	{"sysfs", "/sys", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, "says which disk is which"},
	{"devtmpfs", "/dev", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC, "the kernel puts the disks' nodes there"},
}

// RunVM is the agent's life as PID 1 of a guest kernel. It never returns: the machine is powered off at the end of it,
// whatever the end was.
func RunVM() {
	if err := runVM(); err != nil {
		fmt.Fprintln(os.Stderr, "sandbox-agent:", err) // the console, where there is one
	}
	unix.Sync()
	// With -no-reboot QEMU exits on a restart too, and every guest kernel knows how to do that one.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}

func runVM() error {
	if err := checkPidOne(); err != nil {
		return err
	}
	unix.Umask(0)
	for _, m := range initramfsMounts {
		if err := mountInInitramfs(m.fstype, m.target, m.attrs); err != nil {
			return err
		}
	}
	boot, token, err := readBootFile()
	if err != nil {
		return err
	}
	if err := loadModules(boot.Modules); err != nil {
		return err
	}
	for _, path := range boot.Unused {
		if err := unix.Unlink(path); err != nil {
			return fmt.Errorf("cannot remove %s: %w", path, err)
		}
	}
	random, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("cannot open the random device: %w", err)
	}
	w := &vmWall{pidOne: newPidOne(), boot: boot, random: random}
	w.root = sync.OnceValues(w.mountRoot)
	listener, err := w.reachHost(token)
	if err != nil {
		return err
	}
	if token == nil {
		// A clone, which may wait from here on: what it has done by then nobody waits for. An error is the container's, later.
		_, _ = w.root()
	}
	err = serveAsPidOne(newService(w), w.pidOne, listener, func(*Service) error { return nil })
	return errors.Join(err, w.settleDisk())
}

// reachHost makes the way to the daemon, and waits on it until the guest is told who it is if it was not at its birth.
func (w *vmWall) reachHost(token *[spec.TokenLen]byte) (*dialListener, error) {
	dial, adopted := dialHost(w.boot.VsockPort), func([spec.TokenLen]byte) {}
	if w.boot.Port != "" {
		port, err := openPort(w.boot.Port)
		if err != nil {
			return nil, err
		}
		dial, adopted = port.dial, port.adopted
	}
	readopt := func(conn net.Conn) ([]byte, error) { return w.readopt(conn, adopted) }
	if token != nil {
		adopted(*token)
		l := newDialListener(dial, spec.Preface(*token))
		l.readopt = readopt
		return l, nil
	}
	if err := dropCaches(); err != nil {
		return nil, fmt.Errorf("cannot drop caches: %w", err)
	}
	age()
	first, taken := adopt(dial, w.random)
	adopted(taken)
	l := newDialListener(dial, spec.Preface(taken))
	l.begun, l.readopt = first, readopt
	return l, nil
}

func mountInInitramfs(fstype, target string, attrs uint64) error {
	if err := unix.Mkdir(target, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("cannot make %s: %w", target, err)
	}
	dir, err := openDir(target)
	if err != nil {
		return err
	}
	defer dir.Close()
	mount, err := newMount(fstype, fstype, mountOptions{attrs: attrs})
	if err != nil {
		return err
	}
	defer mount.Close()
	return attach(mount, dir)
}

// readBootFile also removes the file: nothing that comes later may read the token.
func readBootFile() (*spec.VMBoot, *[spec.TokenLen]byte, error) {
	b, err := os.ReadFile(bootFile)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the boot file: %w", err)
	}
	if err := unix.Unlink(bootFile); err != nil {
		return nil, nil, fmt.Errorf("cannot remove the boot file: %w", err)
	}
	return parseBoot(b)
}

// parseBoot answers with no token for a guest that becomes a template.
func parseBoot(b []byte) (*spec.VMBoot, *[spec.TokenLen]byte, error) {
	boot := &spec.VMBoot{}
	if err := json.Unmarshal(b, boot); err != nil {
		return nil, nil, fmt.Errorf("cannot decode the boot file: %w", err)
	}
	if boot.Version != spec.ProtocolVersion {
		return nil, nil, fmt.Errorf("cannot serve protocol version %d: this agent speaks %d", boot.Version, spec.ProtocolVersion)
	}
	if boot.Token == "" {
		return boot, nil, nil
	}
	if hex.DecodedLen(len(boot.Token)) != spec.TokenLen {
		return nil, nil, fmt.Errorf("cannot use a token of %d digits", len(boot.Token))
	}
	var token [spec.TokenLen]byte
	if _, err := hex.Decode(token[:], []byte(boot.Token)); err != nil {
		return nil, nil, fmt.Errorf("cannot decode the token: %w", err)
	}
	boot.Token = ""
	return boot, &token, nil
}

// vmWall is the agent's place in a guest kernel.
type vmWall struct {
	pidOne
	boot   *spec.VMBoot
	random *os.File // the kernel's, whatever the workload makes of its /dev
	disk   *os.File // the writable layer's root; nil before the container is entered
	// Nil without one.
	network *network
	// mountRoot, once.
	root func() (*os.File, error)
}

// configure implements wall.
func (w *vmWall) configure(hostname string, now time.Time, entropy []byte, n *network) error {
	if err := addEntropy(w.random, entropy); err != nil {
		return err
	}
	if err := setClock(now); err != nil {
		return err
	}
	if w.network = n; n != nil {
		if err := n.setUp(); err != nil {
			return fmt.Errorf("cannot set up network %s: %w", n.name, err)
		}
	}
	return setHostname(hostname)
}

// ownClock implements wall.
func (*vmWall) ownClock() bool { return true }

// enter implements wall.
func (w *vmWall) enter(config *specs.Spec, filter []byte) (*root, error) {
	for _, m := range config.Mounts {
		if parseMountOptions(m.Options).bind {
			return nil, fmt.Errorf("cannot mount %s: a guest sees no directory of the host", m.Destination)
		}
	}
	var err error
	if w.cgroup, err = workloadCgroup(config); err != nil {
		return nil, err
	}
	dir, err := w.root()
	if err != nil {
		return nil, err
	}
	oldDev, err := openDir("/dev")
	if err != nil {
		return nil, err
	}
	defer oldDev.Close()
	fs := &rootfs{config: config, network: w.network, dir: dir, oldDev: oldDev, enter: func(r *rootfs) error { return moveInto(r.dir) }}
	root, err := fs.run()
	if err != nil {
		return nil, err
	}
	if err := undumpable(); err != nil {
		return nil, err
	}
	// For a test: of who may trace, undumpable keeps nobody off, and who may not has fewer capabilities than an agent that may.
	if weaken.Without("hold the right to trace") {
		if err := keepCapabilities(^uint64(1 << unix.CAP_SYS_PTRACE)); err != nil {
			return nil, err
		}
	}
	return root, filterSelf(filter)
}

func (*vmWall) sync() { unix.Sync() }

// oomKills implements wall.
func (*vmWall) oomKills(proc *os.File) (uint64, error) {
	vmstat, err := readProc(proc, "vmstat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(vmstat)) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(value), 10, 64)
		}
	}
	return 0, errors.New("cannot count kills for want of memory: /proc/vmstat has no oom_kill")
}
