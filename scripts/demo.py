"""The demo's program: says where it finds itself, then waits to be stopped."""

import os
import signal
import sys


def read(path):
    with open(path) as f:
        return f.read().strip()


def stop(signum, frame):
    print("asked to stop: goodbye", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, stop)
primes = [n for n in range(2, 50) if all(n % d for d in range(2, n))]
print("python   ", sys.version.split()[0], "adds the primes below 50:", sum(primes))
print("pid      ", os.getpid(), "   user", os.getuid(), "   host name", os.uname().nodename)
print("kernel   ", os.uname().release)
print("boot id  ", read("/proc/sys/kernel/random/boot_id"))
print("ready", flush=True)
while True:
    signal.pause()
