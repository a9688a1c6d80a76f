package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	gosyscall "syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// masked: what masks must hide. A mask is a null device or an empty directory (CVE-2025-31133: one that is not).
func masked() []try {
	return []try{read("/proc/kcore"), read("/proc/keys"), read("/proc/timer_list"), read("/proc/interrupts"), read("/sys/firmware")}
}

// kernelSettings that not all know namespaces, opened for writing and not written to.
func kernelSettings() []try {
	var tries []try
	for _, path := range []string{
		"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/overcommit_memory", "/proc/sys/net/ipv4/ip_forward",
		"/proc/irq/default_smp_affinity", "/proc/bus/pci/devices", "/sys/kernel/uevent_helper", "/sys/power/state",
	} {
		tries = append(tries, opened(path, unix.O_WRONLY))
	}
	return tries
}

func sysrq() []try { return []try{opened("/proc/sysrq-trigger", unix.O_WRONLY)} }

// releaseAgent is CVE-2022-0492 up to the mount: a cgroup hierarchy of one's own, whose release_agent the kernel would run.
func releaseAgent() []try {
	self, err := os.Executable()
	if err != nil {
		return []try{{"find myself", err}}
	}
	// A Go program has threads, and can't move into a user namespace itself.
	child := exec.Command(self, "cgroup-mounts")
	child.SysProcAttr = &gosyscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP,
		UidMappings: []gosyscall.SysProcIDMap{{Size: 1}}, GidMappings: []gosyscall.SysProcIDMap{{Size: 1}},
	}
	return append(cgroupMounts(), try{"mount in an own user namespace", child.Run()})
}

func cgroupMounts() []try {
	dir, err := os.MkdirTemp("/tmp", "cgroup")
	if err != nil {
		return []try{{"make a directory", err}}
	}
	var tries []try
	for _, kind := range [][2]string{{"cgroup", "memory"}, {"cgroup", "cpu"}, {"cgroup", "pids"}, {"cgroup2", ""}} {
		err := unix.Mount("none", dir, kind[0], 0, kind[1])
		if err == nil {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
		tries = append(tries, try{"mount " + kind[0] + " " + kind[1], err})
	}
	return tries
}

func keyrings() []try {
	kind, name, data := cString("user"), cString("attack"), []byte("x")
	// @s, the session's keyring, and @u, the user's: neither is divided by namespaces other than that of users.
	session, user := int32(unix.KEY_SPEC_SESSION_KEYRING), int32(unix.KEY_SPEC_USER_KEYRING)
	return []try{
		syscall("add_key", unix.SYS_ADD_KEY, pointer(kind), pointer(name), pointer(&data[0]), 1, uintptr(session)),
		syscall("request_key", unix.SYS_REQUEST_KEY, pointer(kind), pointer(name), 0, uintptr(user)),
		syscall("keyctl", unix.SYS_KEYCTL, unix.KEYCTL_GET_KEYRING_ID, uintptr(session), 1),
	}
}

func userNamespaces() []try {
	self, err := os.Executable()
	if err != nil {
		return []try{{"find myself", err}}
	}
	cloned := exec.Command(self, "true")
	cloned.SysProcAttr = &gosyscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER}
	args := [8]uint64{unix.CLONE_NEWUSER, 0, 0, 0, uint64(unix.SIGCHLD)} // struct clone_args
	pid, err := call(unix.SYS_CLONE3, pointer(&args), unsafe.Sizeof(args))
	if err == nil && pid == 0 {
		unix.Exit(0)
	}
	if err == nil {
		_, _ = unix.Wait4(int(pid), nil, 0, nil)
	}
	setns := func() error {
		fd, err := unix.Open("/proc/1/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Setns(fd, unix.CLONE_NEWUSER)
	}
	return []try{{"clone", cloned.Run()}, {"clone3", err}, {"setns to init's", setns()}, {"unshare", unix.Unshare(unix.CLONE_NEWUSER)}}
}

// mounts tries every call that could change what lies where, on things that do no harm.
func mounts() []try {
	dir, err := os.MkdirTemp("/tmp", "mount")
	if err != nil {
		return []try{{"make a directory", err}}
	}
	kind, path := cString("tmpfs"), cString(dir)
	root, empty := cString("/"), cString("")
	here := int32(unix.AT_FDCWD)
	return []try{
		{"mount tmpfs", unix.Mount("none", dir, "tmpfs", 0, "")},
		{"bind /proc", unix.Mount("/proc", dir, "", unix.MS_BIND, "")},
		{"a fresh proc", unix.Mount("none", dir, "proc", 0, "")},
		{"remount the root", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, "")},
		{"unmount /dev/shm", unix.Unmount("/dev/shm", unix.MNT_DETACH)},
		{"pivot_root", unix.PivotRoot("/", dir)},
		syscall("fsopen", unix.SYS_FSOPEN, pointer(kind), 0),
		syscall("open_tree", unix.SYS_OPEN_TREE, uintptr(here), pointer(root), unix.OPEN_TREE_CLONE),
		syscall("move_mount", unix.SYS_MOVE_MOUNT, uintptr(here), pointer(root), uintptr(here), pointer(path), 0),
		syscall("mount_setattr", unix.SYS_MOUNT_SETATTR, uintptr(here), pointer(root), 0, pointer(&unix.MountAttr{}), unsafe.Sizeof(unix.MountAttr{})),
		syscall("fspick", unix.SYS_FSPICK, uintptr(here), pointer(root), 0),
		{"open_by_handle_at", openByHandle(empty)},
		{"a mount namespace", unix.Unshare(unix.CLONE_NEWNS)},
	}
}

// openByHandle is how a container once read any file of the host's (shocker, 2014): by its number.
func openByHandle(*byte) error {
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	handle := unix.NewFileHandle(1, []byte{2, 0, 0, 0, 0, 0, 0, 0})
	opened, err := unix.OpenByHandleAt(fd, handle, unix.O_RDONLY)
	if err == nil {
		unix.Close(opened)
	}
	return err
}

// devices: nodes that the image brings, and such as the workload makes.
func devices() []try {
	var tries []try
	for _, n := range []struct {
		name         string
		mode         uint32
		major, minor uint32
	}{
		{"loop-control", unix.S_IFCHR, 10, 237},
		{"loop0", unix.S_IFBLK, 7, 0},
		{"vda", unix.S_IFBLK, 254, 0},
		{"memory", unix.S_IFCHR, 1, 1},
	} {
		tries = append(tries, opened("/nodes/"+n.name, unix.O_RDONLY))
		for _, dir := range []string{"/tmp", "/dev", "/dev/shm"} {
			path := fmt.Sprintf("%s/attack-%s", dir, n.name)
			if err := unix.Mknod(path, n.mode|0o600, int(unix.Mkdev(n.major, n.minor))); err != nil {
				tries = append(tries, try{"make " + path, err})
				continue
			}
			tries = append(tries, opened(path, unix.O_RDONLY))
			_ = os.Remove(path)
		}
	}
	return append(tries, opened("/dev/mem", unix.O_RDONLY), opened("/dev/kmsg", unix.O_RDONLY), opened("/dev/vda", unix.O_RDONLY))
}

func fsType(path string) (int64, error) {
	var fs unix.Statfs_t
	err := unix.Statfs(path, &fs)
	return int64(fs.Type), err
}

// fakeProc: with a link of the image in the way of a mount, /proc is something that the workload writes (CVE-2025-52881).
func fakeProc() []try {
	kind, err := fsType("/proc")
	if err == nil && kind == unix.PROC_SUPER_MAGIC {
		err = errors.New("it is proc")
	}
	return []try{{"see another file system at /proc", err}}
}

// fakeDev: links of the image where the runtime makes devices (CVE-2025-31133, CVE-2025-52565). The image's /dev has
// null and console pointing into /proc/sys.
func fakeDev() []try {
	var tries []try
	for _, name := range []string{"null", "console", "ptmx", "tty"} {
		target, err := os.Readlink("/dev/" + name)
		if err == nil && target == "pts/ptmx" {
			err = errors.New("ours")
		}
		tries = append(tries, try{"see the image's link /dev/" + name, err})
	}
	return tries
}

// tmpfsThroughLink looks where a mount went whose target was a link of the image (CVE-2021-30465). It was to lie over
// the sandbox's /tmp: if it does not, it lies outside.
func tmpfsThroughLink() []try {
	kind, err := fsType("/tmp")
	if err == nil && kind == unix.TMPFS_MAGIC {
		err = errors.New("it lies inside")
	}
	return []try{{"lead a mount out of the root", err}}
}

func cString(s string) *byte {
	b := append([]byte(s), 0)
	return &b[0]
}

func pointer[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }
