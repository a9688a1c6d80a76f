# What no process of a container does, whatever its capabilities: a third list beside the system call filter and the masked
# paths, kept by another part of the kernel. Loaded by sandboxd; it names nothing of any one sandbox.
profile sandboxd-container flags=(attach_disconnected,mediate_deleted) {
  file,
  network,
  capability,
  umount,

  # Its own processes only: not the agent, which is unconfined, and which signals it.
  signal (send, receive) peer=sandboxd-container,
  signal (receive) peer=unconfined,
  ptrace (trace, read, tracedby, readby) peer=sandboxd-container,
  unix,
  dbus,

  # A fresh procfs would have no masks over it; a bind could lay one thing over another.
  deny mount,
  deny pivot_root,

  # Settings of the kernel, not all of which it divides by namespace, and what the masks hide.
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /proc/sys/{abi,debug,dev,fs,kernel,user,vm}/** w,
  deny /proc/{acpi,asound,bus,driver,fs,irq,scsi,tty}/** w,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/** w,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/fs/cgroup/** w,
}
