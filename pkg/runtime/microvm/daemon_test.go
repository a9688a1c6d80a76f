package microvm

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// daemonVariable makes the test program a daemon that starts a VM: what it is to do, as JSON.
	daemonVariable = "SANDBOXD_TEST_MICROVM_DAEMON"
)

// daemonOrders are what such a daemon is told.
type daemonOrders struct {
	Dir, Programs, Kernel, CgroupParent string
	Sandbox                             spec.Sandbox
}

// runDaemon starts a VM, says so, and waits to be killed.
func runDaemon() {
	var o daemonOrders
	if err := json.Unmarshal([]byte(os.Getenv(daemonVariable)), &o); err != nil {
		panic(err)
	}
	config := benchConfig(o.Dir, o.Programs, o.Kernel)
	config.CgroupParent, config.Logger = o.CgroupParent, zap.NewNop()
	r, err := New(config)
	if err == nil {
		_, err = r.Start(context.Background(), o.Sandbox)
	}
	fmt.Println(err)
	select {}
}

// startInAnotherDaemon starts s in a process of its own, and kills that.
func (b *bench) startInAnotherDaemon(t *testing.T, s spec.Sandbox) {
	t.Helper()
	orders, err := json.Marshal(daemonOrders{Dir: b.dir, Programs: b.programs, Kernel: b.config.Kernel, CgroupParent: b.config.CgroupParent, Sandbox: s})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(testContext(t), os.Args[0])
	cmd.Env = append(os.Environ(), daemonVariable+"="+string(orders))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "<nil>" {
		t.Errorf("the other daemon: %s", lines.Text())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the other daemon ended otherwise than killed: %v", err)
	}
}

// TestAVMOutlivesItsDaemon: a daemon is killed with SIGKILL; another finds the VM, and its process is still counting.
func TestAVMOutlivesItsDaemon(t *testing.T) {
	b := newBench(t)
	s := b.sandbox()
	b.startInAnotherDaemon(t, s)

	first := b.runtime(t)
	ctx := testContext(t)
	i, err := first.Attach(ctx, s.ID)
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{Sandbox: s, Instance: i, client: agent.New(i.Dial, i.Done())}
	v.configure(t)
	counter := rand.Text()
	if _, err := v.launch(ctx, counter, "for i in 1 2 3 4 5; do echo $i; done; read nothing < /dev/null; exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	if same, err := first.Attach(ctx, s.ID); err != nil || same != i {
		t.Errorf("attaching twice: %v, %v", same, err)
	}
	// This daemon leaves in peace.
	v.client.Close()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}

	second := b.runtime(t)
	t.Cleanup(func() { b.remove(t, second, s.ID) })
	if i, err = second.Attach(ctx, s.ID); err != nil {
		t.Fatal(err)
	}
	if f := i.Facts(); f != v.Facts() {
		t.Errorf("facts %+v, and %+v before", f, v.Facts())
	}
	v = &vm{Sandbox: s, Instance: i, client: agent.New(i.Dial, i.Done())}
	defer v.client.Close()
	var text strings.Builder
	for text.Len() < len("1\n2\n3\n4\n5\n") {
		chunks, eof, err := v.client.Process(counter).ReadOutput(ctx, uint64(text.Len()))
		if err != nil || eof {
			t.Fatalf("output of the process that an earlier daemon started: eof %v, %v", eof, err)
		}
		for _, c := range chunks {
			text.Write(c.Data)
		}
	}
	if text.String() != "1\n2\n3\n4\n5\n" {
		t.Errorf("the output is %q", text.String())
	}
	if u, err := i.Usage(); err != nil || u.CPUTime == 0 || u.DiskBytes == 0 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if err := i.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, i)
	b.remove(t, second, s.ID)
}

// TestRemoveWhatADeadDaemonLeft needs no Attach before it.
func TestRemoveWhatADeadDaemonLeft(t *testing.T) {
	b := newBench(t)
	s := b.sandbox()
	b.startInAnotherDaemon(t, s)
	r := b.runtime(t)
	if ids, err := r.List(testContext(t)); err != nil || len(ids) != 1 || ids[0] != s.ID {
		t.Errorf("list %v, %v", ids, err)
	}
	b.remove(t, r, s.ID)
}
