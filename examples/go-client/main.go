// Command go-client shows a workload's whole life through pkg/client: create, start, run a second process in it, wait, read
// what it wrote, delete, and what an error tells a program. It works the same in a container and in a VM.
//
//	go run ./examples/go-client -isolation vm -image docker.io/library/busybox:latest
//	go run ./examples/go-client -address tcp://10.0.0.1:7443 -tls-ca ca.pem -tls-cert me.pem -tls-key me.key -image ...
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// timeout bounds all of it: a call is bounded by its context alone.
const timeout = 5 * time.Minute

// options are the flags.
type options struct {
	address   string
	tls       client.TLS
	image     string
	isolation string
	label     string
}

func main() {
	var o options
	flag.StringVar(&o.address, "address", client.DefaultAddress, "where sandboxd answers: unix:///PATH or tcp://HOST:PORT")
	flag.StringVar(&o.tls.CA, "tls-ca", "", "over tcp://: authority of the daemon's certificate, PEM")
	flag.StringVar(&o.tls.Cert, "tls-cert", "", "over tcp://: the caller's certificate, PEM")
	flag.StringVar(&o.tls.Key, "tls-key", "", "over tcp://: its key, PEM")
	flag.StringVar(&o.image, "image", "docker.io/library/busybox:latest", "an image the daemon has, with a shell")
	flag.StringVar(&o.isolation, "isolation", "auto", "auto, container or vm")
	flag.StringVar(&o.label, "label", "example=go", "KEY=VALUE, which roles and rules may ask for")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	err := run(ctx, o, os.Stdout)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "go-client:", err)
		os.Exit(1)
	}
}

// dial picks the transport. On the same host the kernel says who calls; over TCP both sides show certificates.
func dial(o options) (*client.Client, error) {
	if strings.HasPrefix(o.address, "tcp://") {
		return client.DialTLS(o.address, o.tls)
	}
	return client.Dial(o.address)
}

func run(ctx context.Context, o options, out io.Writer) (err error) {
	isolation, ok := sandboxdv1.Isolation_value["ISOLATION_"+strings.ToUpper(o.isolation)]
	if !ok {
		return fmt.Errorf("cannot use -isolation %q: it is auto, container or vm", o.isolation)
	}
	key, value, _ := strings.Cut(o.label, "=")
	c, err := dial(o)
	if err != nil {
		return err
	}
	defer c.Close()

	created, err := c.Workloads.CreateWorkload(ctx, &sandboxdv1.CreateWorkloadRequest{
		Labels: map[string]string{key: value},
		Spec: &sandboxdv1.WorkloadSpec{
			Image:     o.image,
			Isolation: sandboxdv1.Isolation(isolation),
			Process: &sandboxdv1.ProcessSpec{
				Entrypoint: []string{"sh", "-c"},
				Command:    []string{"echo begun; while [ ! -e /tmp/end ]; do sleep 0.1; done; echo ended; exit 3"},
			},
			Resources: &sandboxdv1.Resources{MemoryBytes: 128 << 20},
		},
	})
	if err != nil {
		return err
	}
	id := created.GetWorkload().GetId()
	fmt.Fprintln(out, "created:", created.GetWorkload().GetStatus().GetIsolation())
	deleted := false
	defer func() {
		if !deleted { // also when ctx has ended
			tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			_, e := c.Workloads.DeleteWorkload(tidy, &sandboxdv1.DeleteWorkloadRequest{Id: id, Force: true})
			err = errors.Join(err, e)
		}
	}()

	started, err := c.Workloads.StartWorkload(ctx, &sandboxdv1.StartWorkloadRequest{Id: id})
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "started:", started.GetWorkload().GetStatus().GetState())

	// A second process in it, with input; when it is done the first one ends.
	var stdout, stderr bytes.Buffer
	p, err := c.Exec(ctx, &sandboxdv1.ExecStart{Id: id, Command: []string{"sh", "-c", "cat; echo to stderr >&2; touch /tmp/end; exit 4"}},
		client.Stdio{Stdin: strings.NewReader("through stdin\n"), Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		return err
	}
	defer p.Close()
	exit, err := p.Wait()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "exec: code %d, stdout %q, stderr %q\n", exit.GetCode(), stdout.String(), stderr.String())

	waited, err := c.Workloads.WaitWorkload(ctx, &sandboxdv1.WaitWorkloadRequest{Id: id})
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "waited: code", waited.GetWorkload().GetStatus().GetExitCode())

	var logged bytes.Buffer
	if err := c.Logs(ctx, &sandboxdv1.StreamLogsRequest{Id: id}, func(piece *sandboxdv1.StreamLogsResponse) error {
		logged.Write(piece.GetData())
		return nil
	}); err != nil {
		return err
	}
	fmt.Fprintf(out, "output: %q\n", logged.String())

	if _, err := c.Workloads.DeleteWorkload(ctx, &sandboxdv1.DeleteWorkloadRequest{Id: id}); err != nil {
		return err
	}
	deleted = true
	fmt.Fprintln(out, "deleted")
	return showErrors(ctx, c, id, o.image, out)
}

// showErrors makes two mistakes. What a program acts on is the code, the reason, and the field or rule at fault; the message
// is for people.
func showErrors(ctx context.Context, c *client.Client, gone, image string, out io.Writer) error {
	_, err := c.Workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: gone})
	if err := tell(out, err); err != nil {
		return err
	}
	// No isolation: forgetting to decide never means sharing the kernel.
	_, err = c.Workloads.CreateWorkload(ctx, &sandboxdv1.CreateWorkloadRequest{Spec: &sandboxdv1.WorkloadSpec{Image: image}})
	return tell(out, err)
}

func tell(out io.Writer, err error) error {
	var e *client.Error
	if !errors.As(err, &e) {
		return fmt.Errorf("a mistake was not refused as it should be: %w", err)
	}
	fmt.Fprintf(out, "refused: code %d, reason %s, field %q\n", e.Code, e.Reason, e.Field)
	return nil
}
