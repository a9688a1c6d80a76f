package harness

// Bomb is a program for Python that floods its output from when it finds /flood, and forks from when it finds /bomb: as long as it is let, in each of its
// processes, and goes on trying while it is not, so that the sandbox is full all the while. With MOST there is one that forks, so many
// times. Asked to end, the first of them does so well, and leaves what a second start needs.
const Bomb = `
import os, signal, time
first, most = os.getpid(), int(os.environ.get("MOST", 0))
def end(*_):
    for f in "/flood", "/bomb":
        if os.path.exists(f): os.unlink(f)
    os._exit(7)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while not os.path.exists("/bomb"):
    if os.path.exists("/flood"): print("flood\n" * 10000, flush=True)
    else: time.sleep(0.05)
said = children = 0
while True:
    if most and children == most:
        print("all", flush=True)
        time.sleep(3600)
    try:
        if os.fork() == 0:
            if most: time.sleep(3600)
        else: children += 1
    except OSError:
        if os.getpid() == first and not said:
            said = 1
            print("full", flush=True)
        time.sleep(0.1)
`
