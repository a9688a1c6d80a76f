package microvm

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/disk"
)

// Accelerators.
const (
	accelKVM = "kvm"
	accelTCG = "tcg"
)

// tcgBufferMiB bounds the code that QEMU translates for a guest under TCG; the default grows to an eighth of the host's
// memory. Filled, it is emptied and filled again.
const tcgBufferMiB = 64

// vmArgs is everything QEMU's command line depends on. Numbers of files are those QEMU has them under.
type vmArgs struct {
	// The sandbox's id: shows in ps.
	ID          string
	Accelerator string
	CPUs        uint32
	MemoryBytes uint64
	// Of the host's time stamp counter, for TCG; 0 if unknown.
	TSCKHz uint64
	// Path of the firmware; empty for QEMU's own choice.
	Firmware string
	// Paths, where QEMU sees them.
	Kernel, Initrd string
	// The listening Unix socket for QMP.
	QMP   int
	Vsock int
	// transportVhostUser, transportKernel or transportPort.
	Transport string
	CID       uint32
	// The disks; both zero where there are none.
	Image int
	Disk  int
	// What is written to the disk goes past the host's page cache: see disk.SetLoopDirect.
	DirectDisk bool
	// The network card's tap; zero without a network.
	Tap int
	// Have the guest's kernel say everything, which costs the boot about 150 ms: else it says what goes wrong.
	Verbose bool
	// A disk without content in the writable layer's place: a template's.
	BlankDisk bool
	// A file that is the guest's memory; 0 for memory of QEMU's own making.
	Memory int
	// What is written there is in the file (a template's), or else this VM's alone (a clone's).
	MemoryShared bool
	// Go on from a state instead of booting.
	Incoming bool
}

// arg is an option of QEMU; value is empty for one that takes none.
type arg struct{ option, value, reason string }

// table is QEMU's command line, in order.
func (a vmArgs) table() []arg {
	rows := []arg{
		{"-name", a.ID, "whose it is"},
		{"-no-user-config", "", "nothing but this command line counts"},
		{"-nodefaults", "", "no device that is not listed here"},
		{"-display", "none", ""},
		{"-monitor", "none", ""},
		{"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny", "seccomp: no exec, no setuid, no change of priorities"},
		{"-no-reboot", "", "a guest that resets or panics ends: a reboot would reuse the boot token"},
		{"-machine", a.machine(), "rtc=on: a guest without one waits seconds for it"},
		{"-accel", a.accel(), ""},
		{"-cpu", a.cpu(), "arat: without it the guest keeps a tick; rdrand: or it waits for randomness"},
		{"-smp", strconv.FormatUint(uint64(a.CPUs), 10), ""},
		{"-m", fmt.Sprintf("%dB", a.MemoryBytes), ""},
		a.memory(),
		{"-global", "virtio-mmio.force-legacy=false", "vhost-user-vsock is a modern device"},
		{"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=%s", a.QMP, onOff(a.Memory != 0)), "listening, so that a restarted daemon can connect; with its memory in a file it waits for a first one, who shows it its descriptors"},
		{"-mon", "chardev=qmp,mode=control", ""},
	}
	if !a.Incoming {
		rows = append(rows, []arg{
			{"-kernel", a.Kernel, "an ELF file, entered by PVH"},
			{"-initrd", a.Initrd, ""},
			{"-append", a.kernelCommandLine(), ""},
		}...)
	}
	if a.Firmware != "" {
		rows = append(rows, arg{"-bios", a.Firmware, "qboot does no more than a microvm needs"})
	}
	rows = append(rows, a.vsock()...)
	rows = append(rows, a.disks()...)
	rows = append(rows, a.network()...)
	if a.Incoming {
		rows = append(rows, arg{"-incoming", "defer", "goes on where the template stopped, when it is told from where"})
	}
	rows = append(rows,
		// Non-blocking: what nobody reads is lost, and nobody waits. A byte takes an exit from the guest, but a quiet kernel
		// says a line or two.
		arg{"-chardev", "stdio,id=console,signal=off", "standard output is a pipe to the daemon"},
		arg{"-serial", "chardev:console", "panics, and what the agent says last; a virtio console would come too late for some"})
	return rows
}

// argv is the whole command line after the program's name.
func (a vmArgs) argv() []string {
	var argv []string
	for _, row := range a.table() {
		argv = append(argv, row.option)
		if row.value != "" {
			argv = append(argv, row.value)
		}
	}
	return argv
}

func (a vmArgs) machine() string {
	return strings.Join([]string{
		"microvm", "memory-backend=memory", "x-option-roms=off",
		"pit=off", "pic=off", "rtc=on", "acpi=on",
		"isa-serial=on",
		"dump-guest-core=off", "mem-merge=off", // the guest's secrets stay in its memory
	}, ",")
}

func (a vmArgs) accel() string {
	if a.Accelerator == accelTCG {
		return fmt.Sprintf("tcg,thread=multi,tb-size=%d", tcgBufferMiB)
	}
	return "kvm"
}

func (a vmArgs) cpu() string {
	if a.Accelerator == accelTCG {
		// The fastest that TCG has for an x86-64-v1 userland, which Debian 12's is: models with more are slow at copying.
		return "qemu64,+arat,+rdrand"
	}
	return "host"
}

func (a vmArgs) kernelCommandLine() string {
	words := []string{
		"reboot=t panic=-1", // a panic resets at once, and -no-reboot ends QEMU
		"random.trust_cpu=on",
		"cryptomgr.notests",
		// Certificates are for modules' signatures, which an initramfs of our own does not need, and tracing is for nobody.
		"initcall_blacklist=crypto_kdf108_init,load_system_certificate_list,init_kprobe_trace,init_trace_printk_function_export",
	}
	if a.Accelerator == accelTCG {
		// TCG promises no security, and what the mitigations emulate costs time. Without the frequency the kernel
		// measures it against a timer that emulation can starve: boots then hang now and then.
		words = append(words, "mitigations=off")
		if a.TSCKHz > 0 {
			// The counter is the host's. Unless told that it is reliable the kernel takes it for broken when emulation was slow,
			// and counts ticks, of which emulation loses some: the clock was seen to be 4 % slow.
			words = append(words, fmt.Sprintf("tsc_early_khz=%d tsc=reliable", a.TSCKHz))
		}
	}
	words = append(words, "console=ttyS0")
	if !a.Verbose {
		words = append(words, "quiet") // only errors
	}
	return strings.Join(words, " ")
}

// memory is the guest's. A file is named by its descriptor's path: a sealed one opens for writing and can't be written.
func (a vmArgs) memory() arg {
	switch {
	case a.Memory == 0 && a.Incoming:
		return arg{"-object", fmt.Sprintf("memory-backend-ram,id=memory,size=%dB", a.MemoryBytes), "this VM's alone; in a file a page that is only read would be there, too"}
	case a.Memory == 0:
		return arg{"-object", fmt.Sprintf("memory-backend-memfd,id=memory,size=%dB,share=on", a.MemoryBytes), "vhost-user reads and writes the guest's memory"}
	}
	return arg{"-object", fmt.Sprintf("memory-backend-file,id=memory,mem-path=%s/%d,size=%dB,share=%s", descriptorsPath, a.Memory, a.MemoryBytes, onOff(a.MemoryShared)), "a template's memory is a file; its clones map it and copy what they write"}
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// blankDiskBytes is the size of the disk a template's guest sees: no layer is larger, so the clone's own fits whatever its
// size. The guest's kernel keeps thinking its disk that large; a file system on it is as large as it says itself.
const blankDiskBytes = disk.MaxSize

func (a vmArgs) vsock() []arg {
	switch a.Transport {
	case transportPort:
		return []arg{
			{"-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", a.Vsock), "listening, so that a restarted daemon can connect"},
			{"-device", "virtio-serial-device,max_ports=2", "the first is always a console's"},
			{"-device", "virtserialport,chardev=agent,name=" + portName, ""},
		}
	case transportKernel:
		return []arg{{"-device", fmt.Sprintf("vhost-vsock-device,guest-cid=%d,vhostfd=%d", a.CID, a.Vsock), "opened by the daemon: QEMU may not"}}
	}
	return []arg{
		{"-chardev", fmt.Sprintf("socket,id=vsock,fd=%d", a.Vsock), ""},
		{"-device", "vhost-user-vsock-device,chardev=vsock", ""},
	}
}

func (a vmArgs) disks() []arg {
	if a.Image == 0 {
		return nil
	}
	rows := []arg{
		{"-add-fd", fmt.Sprintf("set=1,fd=%d", a.Image), "opened O_RDONLY: a guest cannot write what QEMU cannot"},
		{"-blockdev", "driver=file,node-name=image-file,filename=/dev/fdset/1,read-only=on,auto-read-only=off,locking=off", "no locks: many VMs read one image"},
		{"-blockdev", "driver=raw,node-name=image,file=image-file,read-only=on", ""},
		{"-device", "virtio-blk-device,drive=image,serial=" + imageSerial, ""},
	}
	if a.BlankDisk {
		rows = append(rows, arg{"-blockdev", fmt.Sprintf("driver=null-co,node-name=disk,size=%d,read-zeroes=on", uint64(blankDiskBytes)), "in the place of the clones' own"})
	} else {
		rows = append(rows, []arg{
			{"-add-fd", fmt.Sprintf("set=2,fd=%d", a.Disk), ""},
			{"-blockdev", diskFileArg(a.DirectDisk), "locked: two VMs that write one disk destroy it; what the guest deletes, the host gets back"},
			{"-blockdev", "driver=raw,node-name=disk,file=disk-file,discard=unmap", ""},
		}...)
	}
	return append(rows, arg{"-device", "virtio-blk-device,drive=disk,serial=" + diskSerial, ""})
}

func (a vmArgs) network() []arg {
	if a.Tap == 0 {
		return nil
	}
	return []arg{
		{"-netdev", fmt.Sprintf("tap,id=network,fd=%d,vhost=off", a.Tap), "opened by the daemon, in a namespace that QEMU is not in"},
		{"-device", "virtio-net-device,netdev=network,mac=" + cardMAC, "the agent gives it the interface's address"},
	}
}

// fdPath names an open file of the calling process.
func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
