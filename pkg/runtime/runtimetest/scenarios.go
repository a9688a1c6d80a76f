package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/runtime"
)

func isNotRunning(err error) bool { return errors.Is(err, runtime.ErrNotRunning) }

func lifecycle(h *host) {
	s := h.start()
	if ids := h.listed(); !slices.Equal(ids, []string{s.id}) {
		h.Errorf("List says %v", ids)
	}
	out, code, err := s.sh("echo out; echo err >&2; exit 7")
	if err != nil || code != 7 || !strings.Contains(out, "out\n") || !strings.Contains(out, "err\n") {
		h.Fatalf("%q, exit code %d, %v", out, code, err)
	}
	if !h.factory.NoWalls && len(leftovers(h.dir, s.id)) == 0 {
		h.Error("nothing on the host bears the id of a running sandbox: the search for leftovers is blind")
	}
	h.remove(s.id)
	s.expectEnded()
	if ids := h.listed(); len(ids) > 0 {
		h.Errorf("List says %v after Remove", ids)
	}
	if _, err := h.runtime.Attach(h.ctx, s.id); !isNotRunning(err) {
		h.Errorf("Attach after Remove: %v", err)
	}
	h.remove(s.id) // once more
}

func failedStart(h *host) {
	id := newID()
	h.ids = append(h.ids, id)
	bad := map[string]string{"no such image": filepath.Join(h.dir, "missing.erofs")}
	if !h.factory.NoWalls {
		// A fake looks into no image.
		garbage := filepath.Join(h.TempDir(), "garbage.erofs")
		if err := os.WriteFile(garbage, []byte(strings.Repeat("no image", 1<<16)), 0o600); err != nil {
			h.Fatal(err)
		}
		bad["garbage"] = garbage
	}
	for what, image := range bad {
		s := h.spec(id)
		s.ImagePath = image
		instance, err := h.runtime.Start(h.ctx, s)
		if err == nil {
			// A VM's image is first looked at by its agent: then creating the container must fail.
			c := h.connect(id, instance)
			if err = c.create(); err == nil {
				h.Fatalf("%s: started", what)
			}
			h.remove(id)
		}
		if ids := h.listed(); len(ids) > 0 {
			h.Errorf("%s: List says %v", what, ids)
		}
		if left := leftovers(h.dir, id); len(left) > 0 {
			h.Errorf("%s: left: %v", what, left)
		}
		if _, err := h.runtime.Attach(h.ctx, id); !isNotRunning(err) {
			h.Errorf("%s: Attach: %v", what, err)
		}
	}
	h.startID(id).expect("echo fine", "fine")
}

func cancelledStart(h *host) {
	id := newID()
	h.ids = append(h.ids, id)
	// Cancelled before, and at moments that lie in different steps of a start.
	for _, after := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond, 200 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(h.ctx, after)
		instance, err := h.runtime.Start(ctx, h.spec(id))
		cancel()
		if err == nil {
			// It was quicker than the caller changed his mind: then it runs.
			h.connect(id, instance)
			h.remove(id)
			continue
		}
		if left := leftovers(h.dir, id); len(left) > 0 {
			h.Errorf("cancelled after %v: left: %v", after, left)
		}
		if ids := h.listed(); len(ids) > 0 {
			h.Errorf("cancelled after %v: List says %v", after, ids)
		}
	}
	h.startID(id).expect("echo fine", "fine")
}

func restart(h *host) {
	s := h.start()
	p, err := s.launch("long", "echo before; read line; echo got $line; exit 9", true)
	if err != nil {
		h.Fatal(err)
	}
	// The output is there, and not acknowledged.
	if chunks, _, err := p.ReadOutput(h.ctx, 0); err != nil || len(chunks) == 0 {
		h.Fatalf("%v, %v", chunks, err)
	}
	s.agent.Close()
	h.restart()

	if ids := h.listed(); !slices.Equal(ids, []string{s.id}) {
		h.Errorf("List says %v after a restart", ids)
	}
	next := h.attach(s.id)
	if next.instance.Facts() != s.instance.Facts() {
		h.Errorf("facts changed from %+v to %+v", s.instance.Facts(), next.instance.Facts())
	}
	p = next.agent.Process("long")
	if _, _, err := p.WriteInput(h.ctx, 0, []byte("it\n"), true); err != nil {
		h.Fatal(err)
	}
	out, code, err := next.finish(p)
	if err != nil || out != "before\ngot it\n" || code != 9 {
		h.Errorf("%q, exit code %d, %v", out, code, err)
	}
	next.expect("echo and more", "and more")
	h.remove(s.id)
	next.expectEnded()
}

func unknownID(h *host) {
	id := newID()
	if instance, err := h.runtime.Attach(h.ctx, id); !isNotRunning(err) {
		h.Errorf("Attach: %v, %v; want ErrNotRunning", instance, err)
	}
	for range 2 {
		if err := h.runtime.Remove(h.ctx, id); err != nil {
			h.Errorf("Remove: %v", err)
		}
		if err := h.runtime.Release(h.ctx, id); err != nil {
			h.Errorf("Release: %v", err)
		}
	}
	if ids := h.listed(); len(ids) > 0 {
		h.Errorf("List says %v", ids)
	}
	if left := leftovers(h.dir, id); len(left) > 0 {
		h.Errorf("left: %v", left)
	}
}

func kill(h *host) {
	s := h.start()
	if _, err := s.launch("long", "trap '' TERM INT; while :; do sleep 1; done", false); err != nil {
		h.Fatal(err)
	}
	for range 3 {
		if err := s.instance.Kill(); err != nil {
			h.Fatalf("Kill: %v", err)
		}
	}
	s.expectEnded()
	if _, err := h.runtime.Attach(h.ctx, s.id); !isNotRunning(err) {
		h.Errorf("Attach to a killed sandbox: %v", err)
	}
	if ids := h.listed(); !slices.Equal(ids, []string{s.id}) {
		h.Errorf("List says %v: what was killed is not removed", ids)
	}
}

func killedWhileAway(h *host) {
	s := h.start()
	s.agent.Close()
	h.restart()
	if err := h.attach(s.id).instance.Kill(); err != nil {
		h.Fatal(err)
	}
	h.restart() // at once: perhaps it still dies
	deadline := h.within(endTimeout)
	for {
		_, err := h.runtime.Attach(h.ctx, s.id)
		if isNotRunning(err) {
			break
		}
		if err != nil || deadline.Err() != nil {
			h.Fatalf("Attach to a killed sandbox: %v", err)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-deadline.Done():
		}
	}
	if ids := h.listed(); !slices.Equal(ids, []string{s.id}) {
		h.Errorf("List says %v", ids)
	}
	h.remove(s.id)
}

func removeRunning(h *host) {
	s := h.start()
	if _, err := s.launch("long", "sleep 1000", false); err != nil {
		h.Fatal(err)
	}
	h.remove(s.id)
	s.expectEnded()
	if left := leftovers(h.dir, s.id); len(left) > 0 {
		h.Errorf("left: %v", left)
	}
}

func shutdown(h *host) {
	s := h.start()
	if _, err := s.launch("long", "sleep 1000", false); err != nil {
		h.Fatal(err)
	}
	if err := s.agent.Shutdown(h.ctx, 0); err != nil {
		h.Fatal(err)
	}
	s.expectEnded()
}

func release(h *host) {
	id := newID()
	h.ids = append(h.ids, id)
	s := h.startID(id)
	s.expect("echo kept > /kept; mkdir /dir; rm /etc/motd; cat /kept", "kept")
	if err := s.agent.Shutdown(h.ctx, 0); err != nil {
		h.Fatal(err)
	}
	s.expectEnded()
	for range 2 {
		if err := h.runtime.Release(h.ctx, id); err != nil {
			h.Fatalf("Release: %v", err)
		}
	}
	if _, err := h.runtime.Attach(h.ctx, id); !isNotRunning(err) {
		h.Errorf("Attach after Release: %v", err)
	}
	if ids := h.listed(); !slices.Equal(ids, []string{id}) {
		h.Errorf("List says %v: the writable layer is still on the host", ids)
	}

	h.restart()
	s = h.startID(id)
	s.expect("cat /kept; ls -d /dir; test -e /etc/motd || echo deleted", "kept\n/dir\ndeleted")
	h.remove(id)
	s.expectEnded()

	h.startID(id).expect("test -e /kept || cat /etc/motd", "welcome")
}

func parallel(h *host) {
	n := h.factory.Parallel
	if n == 0 {
		n = defaultParallel
	}
	for range n {
		h.ids = append(h.ids, newID())
	}
	each := func(what string, do func(id string) error) {
		failures := make([]error, n)
		var all sync.WaitGroup
		for i, id := range h.ids {
			all.Go(func() { failures[i] = do(id) })
		}
		all.Wait()
		for i, err := range failures {
			if err != nil {
				h.Errorf("%s %d of %d: %v", what, i+1, n, err)
			}
		}
		if h.Failed() {
			h.FailNow()
		}
	}
	each("start", func(id string) error {
		s, err := h.tryStart(id)
		if err != nil {
			return err
		}
		out, code, err := s.sh("test ! -e /mine && hostname > /mine && cat /mine && exit 3")
		if want := "host-" + id[:8] + "\n"; err != nil || out != want || code != 3 {
			return fmt.Errorf("%q, exit code %d, %w; want %q", out, code, err, want)
		}
		return nil
	})
	if ids := h.listed(); len(ids) != n {
		h.Errorf("List says %v", ids)
	}
	each("remove", func(id string) error { return h.runtime.Remove(h.ctx, id) })
}

func twoClients(h *host) {
	s := h.start()
	other := h.connect(s.id, s.instance)
	if _, err := s.launch("shared", "read x; exit 5", true); err != nil {
		h.Fatal(err)
	}
	other.expect("echo other", "other")
	s.expect("echo first", "first")
	if _, _, err := other.agent.Process("shared").WriteInput(h.ctx, 0, nil, true); err != nil {
		h.Fatal(err)
	}
	exit, err := s.agent.Process("shared").Wait(h.ctx)
	if err != nil || exit.Code != 5 {
		h.Errorf("%+v, %v", exit, err)
	}
	// A connection that breaks is nothing to anyone else.
	for range 3 {
		conn, err := s.instance.Dial(h.ctx)
		if err != nil {
			h.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			h.Fatal(err)
		}
	}
	s.expect("echo still", "still")
}

func dialGivesUp(h *host) {
	s := h.start()
	ctx, cancel := context.WithCancel(h.ctx)
	cancel()
	done := make(chan error, 1)
	go func() {
		conn, err := s.instance.Dial(ctx)
		if conn != nil {
			err = errors.Join(err, conn.Close())
		}
		done <- err
	}()
	select {
	case err := <-done:
		if isNotRunning(err) {
			h.Errorf("Dial says %v of a sandbox that runs", err)
		}
	case <-time.After(endTimeout):
		h.Fatal("Dial waits on although its caller has gone")
	}
	s.expect("echo fine", "fine")
}

func usage(h *host) {
	s := h.start()
	s.expect("dd if=/dev/zero of=/file bs=1M count=8 2>/dev/null && sync; echo $?", "0")
	u, err := s.instance.Usage()
	if err != nil {
		h.Fatal(err)
	}
	r := Resources
	if time.Since(u.Time) > scenarioTimeout || u.CPUTime <= 0 || u.MemoryBytes == 0 || u.Pids == 0 {
		h.Errorf("usage %+v", u)
	}
	if u.MemoryLimitBytes < r.MemoryBytes || u.MemoryBytes > u.MemoryLimitBytes {
		h.Errorf("memory %d, limit %d, asked for %d", u.MemoryBytes, u.MemoryLimitBytes, r.MemoryBytes)
	}
	if u.DiskLimitBytes != r.DiskBytes || u.DiskBytes < 8<<20 || u.DiskBytes > u.DiskLimitBytes {
		h.Errorf("disk %d, limit %d, asked for %d", u.DiskBytes, u.DiskLimitBytes, r.DiskBytes)
	}
}

func diskLimit(h *host) {
	s := h.start()
	out, code, err := s.sh("dd if=/dev/zero of=/big bs=1M count=80")
	if err != nil || code == 0 || !strings.Contains(out, "No space left") {
		h.Errorf("80 MiB into a layer of 64: %q, exit code %d, %v", out, code, err)
	}
	s.expect("rm /big; echo x > /small; cat /small", "x")
}

func loopback(h *host) {
	s := h.start()
	s.expect("ls /sys/class/net", "lo")
	s.expect("ping -c 1 -W 5 127.0.0.1 >/dev/null && echo up", "up")
}

func confinement(h *host) {
	s := h.start()
	// Docker's fourteen capabilities, bit by bit.
	const caps = "00000000a80425fb"
	for field, want := range map[string]string{
		"CapInh": "0000000000000000", "CapPrm": caps, "CapEff": caps, "CapBnd": caps, "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		s.expect("grep ^"+field+": /proc/self/status | tr -d ' \t'", field+":"+want)
	}
	for _, refused := range []string{
		"unshare -U true", "mount -t tmpfs none /tmp", "umount /proc/kcore", "hostname other",
		"echo 1 > /proc/sys/kernel/panic", "echo h > /proc/sysrq-trigger", "echo x > /sys/kernel/uevent_seqnum",
	} {
		if out, code, err := s.sh(refused); err != nil || code == 0 {
			h.Errorf("%s: %q, exit code %d, %v; want a refusal", refused, out, code, err)
		}
	}
	s.expect("cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c", "0")
	s.expect("cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
}

func facts(h *host) {
	s := h.start()
	f := s.instance.Facts()
	if f.HostPID <= 0 || f.AgentTransport == "" {
		h.Errorf("facts %+v", f)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", f.HostPID)); err != nil {
		h.Errorf("facts %+v name no process: %v", f, err)
	}
	if f.IDBase != 0 {
		for _, of := range []string{"uid_map", "gid_map"} {
			s.expect("echo $(cat /proc/self/"+of+")", fmt.Sprintf("0 %d %d", f.IDBase, idrange.Size))
		}
	}
}
