package guest

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// rootfs is a container's root while it is built. The agent still has its old root, so every name in the new one is
// resolved from dir (openIn), and what the old one has to give (device nodes) is within reach.
type rootfs struct {
	config *specs.Spec
	// What the sandbox was joined to; nil for nothing.
	network *network
	// The new root, mounted somewhere in the agent's namespace.
	dir *os.File
	// /dev/null of the new root once its nodes are there, known to be that device.
	null *os.File
	// /dev of the old root: the host's, or the guest kernel's devtmpfs.
	oldDev *os.File
	// How the agent moves into the new root.
	enter func(*rootfs) error
	// A procfs for the agent alone.
	home *os.File
	// What the agent keeps.
	result root
}

// build is the way from a mounted root to a container, in this order. Every step is fatal.
//
// Where a root is made ahead of time, those that are somebody's own come last, in a root that was prepared for them (prepare,
// finish): it is writable, and nothing is mounted over what they write.
var build = []struct {
	name string
	do   func(*rootfs) error
	own  bool // is the workload's own: nothing to prepare
	why  string
}{
	{"write /etc files", (*rootfs).writeEtc, true, "before mounts can cover /etc and the root may become read-only"},
	{"make the working directory", (*rootfs).makeWorkdir, true, "for the workload's own process, as docker does; before mounts, so that it is the image's"},
	{"mount file systems", (*rootfs).mounts, false, "proc needs an unmasked proc in the namespace: the old root's"},
	{"make device nodes", (*rootfs).makeDevices, false, "after /dev is mounted"},
	{"keep descriptors", (*rootfs).keep, false, "before anything hides what the agent needs"},
	{"set kernel parameters", (*rootfs).sysctls, false, "before /proc/sys becomes read-only"},
	{"make paths read-only", (*rootfs).readonlyPaths, false, "after everything is mounted"},
	{"mask paths", (*rootfs).maskedPaths, false, "last of the mounts: nothing may lie over a mask"},
	{"make the root read-only", (*rootfs).readonlyRoot, false, "after the last file is made in it"},
	{"enter the root", func(r *rootfs) error { return r.enter(r) }, false, "nothing of the old root is needed any more"},
	{"go to the agent's own proc", (*rootfs).goHome, false, "stages are started from there: stageProgram; after the root, which changes the working directory"},
	{"set the host name", (*rootfs).hostname, true, ""},
	{"bring up loopback", (*rootfs).loopback, false, "a new network namespace has it down"},
}

func (r *rootfs) run() (*root, error) {
	if err := r.refuse(); err != nil {
		return nil, err
	}
	if err := r.take(func(bool) bool { return true }); err != nil {
		return nil, err
	}
	return &r.result, nil
}

// prepare takes the steps that are the same for every workload of such a config.
func (r *rootfs) prepare() error {
	if err := r.refuse(); err != nil {
		return err
	}
	if r.config.Process != nil || r.config.Hostname != "" {
		return errors.New("somebody's own root cannot be prepared")
	}
	if !spec.Preparable(r.config) {
		return errors.New("such a root cannot be prepared: a step of its own would come too late")
	}
	// What is written last must lie where it would have been written first.
	etc, err := openIn(r.dir, "/etc", unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
	switch {
	case err == nil:
		err = etc.Close()
	case errors.Is(err, unix.ENOENT):
		err = nil
	}
	if err != nil {
		return fmt.Errorf("such a root cannot be prepared: %w", err)
	}
	return r.take(func(own bool) bool { return !own })
}

// finish takes the other steps, for a workload of such a config.
func (r *rootfs) finish(config *specs.Spec) (*root, error) {
	if err := r.refuse(); err != nil {
		return nil, err
	}
	if !spec.PreparedFor(r.config, config) {
		return nil, errors.New("the root was prepared for another configuration")
	}
	r.config = config
	if err := r.take(func(own bool) bool { return own }); err != nil {
		return nil, err
	}
	return &r.result, nil
}

// take takes the steps that which says.
func (r *rootfs) take(which func(own bool) bool) error {
	for _, step := range build {
		if !which(step.own) || weaken.Without(step.name) {
			continue
		}
		end := phase("root: " + step.name)
		err := step.do(r)
		end()
		if err != nil {
			return fmt.Errorf("cannot %s: %w", step.name, err)
		}
	}
	return nil
}

// refuse names what a config can ask for and this agent does not do, rather than leave it out.
func (r *rootfs) refuse() error {
	c := r.config
	if c.Linux == nil {
		return errors.New("the config has no linux section")
	}
	switch {
	case c.Hooks != nil:
		return errors.New("hooks are not supported")
	case len(c.Linux.Devices) > 0:
		return errors.New("devices are not supported")
	case c.Linux.Seccomp != nil:
		return errors.New("linux.seccomp must come compiled")
	case c.Linux.RootfsPropagation != "" && c.Linux.RootfsPropagation != "private":
		return errors.New("root propagation other than private is not supported")
	}
	return nil
}

func (r *rootfs) makeWorkdir() error {
	if r.config.Process == nil || r.config.Process.Cwd == "" {
		return nil
	}
	dir, err := makeDirIn(r.dir, r.config.Process.Cwd, 0o755, 0)
	for _, fault := range workdirFaults {
		if errors.Is(err, fault) {
			return &stageFailure{agentv1.ExecFailure_REASON_BAD_WORKDIR, fmt.Sprintf("%s: %v", r.config.Process.Cwd, err)}
		}
	}
	if err != nil {
		return err
	}
	return dir.Close()
}

// workdirFaults are what is wrong with a working directory that the image cannot have, by no fault of this host's.
var workdirFaults = []error{errDotDot, unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EXDEV, unix.ENAMETOOLONG, unix.EEXIST}

func (r *rootfs) mounts() error {
	for _, m := range r.config.Mounts {
		if weaken.Without(m.Destination) {
			continue
		}
		if err := r.mount(m); err != nil {
			return fmt.Errorf("%s: %w", m.Destination, err)
		}
	}
	return nil
}

// kernelMounts are the file systems that may be mounted, and what each must not be tricked into.
var kernelMounts = map[string]struct {
	// No symbolic link of the image may be in its way: other protections rest on these being where they say.
	fixed bool
}{
	"proc":   {fixed: true},
	"sysfs":  {fixed: true},
	"devpts": {fixed: true},
	"mqueue": {fixed: true},
	"tmpfs":  {},
}

func (r *rootfs) mount(m specs.Mount) error {
	if !path.IsAbs(m.Destination) {
		return errors.New("the destination is not absolute")
	}
	if len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0 {
		return errUnsupportedMount
	}
	o := parseMountOptions(m.Options)
	if o.bind {
		return r.bind(m, o)
	}
	if weaken.Without("attributes of mounts") {
		o.attrs = 0
	}
	if weaken.Without("hide processes") {
		o.data = slices.DeleteFunc(o.data, func(s string) bool { return strings.HasPrefix(s, "hidepid=") })
	}
	kind, known := kernelMounts[m.Type]
	if !known {
		return fmt.Errorf("type %q: %w", m.Type, errUnsupportedMount)
	}
	var how uint64
	isDev := path.Clean(m.Destination) == "/dev"
	if kind.fixed || isDev {
		how = unix.RESOLVE_NO_SYMLINKS
	}
	if isDev {
		o.attrs |= unix.MOUNT_ATTR_NODEV // its nodes are mounts of their own: bindNode
	}
	target, err := makeDirIn(r.dir, m.Destination, 0o755, how)
	if err != nil {
		return err
	}
	defer target.Close()
	mount, err := newMount(m.Type, m.Source, o)
	if err != nil {
		return err
	}
	defer mount.Close()
	return attach(mount, target)
}

// bind mounts a directory or file of the agent's old root. The daemon decides which one a caller may have.
func (r *rootfs) bind(m specs.Mount, o mountOptions) error {
	if len(o.data) > 0 {
		return fmt.Errorf("option %q: %w", o.data[0], errUnsupportedMount)
	}
	fd, err := unix.Open(m.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", m.Source, err)
	}
	source := os.NewFile(uintptr(fd), m.Source)
	defer source.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("cannot examine %s: %w", m.Source, err)
	}
	var target *os.File
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		target, err = makeDirIn(r.dir, m.Destination, 0o755, 0)
	} else {
		target, err = makeFileIn(r.dir, m.Destination)
	}
	if err != nil {
		return err
	}
	defer target.Close()
	mount, err := cloneMount(source, o.recursive, o.attrs)
	if err != nil {
		return err
	}
	defer mount.Close()
	return attach(mount, target)
}

// makeFileIn opens path in root as something to mount on, making an empty file, and its directory, if nothing is there.
func makeFileIn(root *os.File, name string) (*os.File, error) {
	f, err := openIn(root, name, unix.O_PATH, 0)
	if err == nil || !errors.Is(err, unix.ENOENT) {
		return f, err
	}
	parent, err := makeDirIn(root, path.Dir(path.Clean(name)), 0o755, 0)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if err := unix.Mknodat(int(parent.Fd()), path.Base(path.Clean(name)), unix.S_IFREG|0o644, 0); err != nil {
		return nil, fmt.Errorf("cannot make %s: %w", name, err)
	}
	return openIn(root, name, unix.O_PATH, 0)
}

// keep opens what the agent needs later.
func (r *rootfs) keep() error {
	var err error
	if r.result.dir, err = openIn(r.dir, "/", unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		return err
	}
	if r.result.proc, err = openIn(r.dir, "/proc", unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS); err != nil {
		return err
	}
	if err := checkFilesystem(r.result.proc, unix.PROC_SUPER_MAGIC); err != nil && !weaken.Without("check that proc is proc") {
		return err
	}
	if r.result.null, err = openIn(r.dir, "/dev/null", unix.O_RDWR, unix.RESOLVE_NO_SYMLINKS); err != nil {
		return err
	}
	if err := checkNode(r.result.null, nullNode); err != nil {
		return err
	}
	if r.home, err = newMount("proc", "proc", mountOptions{attrs: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}); err != nil {
		return err
	}
	r.result.pts, err = openIn(r.dir, "/dev/pts", unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
	if isMissing(err) {
		return nil // no terminals then
	}
	if err != nil {
		return err
	}
	return checkFilesystem(r.result.pts, unix.DEVPTS_SUPER_MAGIC)
}

// checkFilesystem makes sure that f lies on the file system it should.
func checkFilesystem(f *os.File, magic int64) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("cannot examine the file system of %s: %w", f.Name(), err)
	}
	if int64(fs.Type) != magic {
		return fmt.Errorf("%s lies on a file system of type %#x, not %#x", f.Name(), fs.Type, magic)
	}
	return nil
}

func (r *rootfs) readonlyRoot() error {
	if r.config.Root == nil || !r.config.Root.Readonly {
		return nil
	}
	return setMountAttrs(r.dir, false, unix.MOUNT_ATTR_RDONLY)
}

func (r *rootfs) goHome() error {
	if err := unix.Fchdir(int(r.home.Fd())); err != nil {
		return err
	}
	return r.home.Close() // the working directory keeps it
}

func (r *rootfs) hostname() error { return setHostname(r.config.Hostname) }

func (r *rootfs) loopback() error { return loopbackUp() }
