package microvm

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func (b *boot) awaitAgent(ctx context.Context, i *instance) error {
	if b.clone != nil || b.making != nil || b.restore != nil {
		if err := b.goOn(ctx, i); err != nil {
			return b.explain(ctx, i, err)
		}
	}
	conn, err := i.Dial(ctx)
	if err == nil && b.clone != nil {
		conn, err = i.adopt(ctx, conn)
	}
	if err == nil && b.restore != nil {
		conn, err = i.readopt(ctx, conn)
	}
	if err != nil {
		return b.explain(ctx, i, err)
	}
	i.mu.Lock()
	i.first = conn
	i.mu.Unlock()
	if b.initrd == nil {
		return nil
	}
	return forgetInitramfs(b.initrd)
}

func (b *boot) explain(ctx context.Context, i *instance, err error) error {
	select {
	case <-i.done:
		return spec.Errorf(spec.KindInternal, "the VM ended before its agent answered: %s", i.Why())
	default:
	}
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err // the caller has gone, or the transport failed
	}
	state, qerr := i.state(context.WithoutCancel(ctx))
	if qerr != nil {
		state = qerr.Error()
	}
	said := strings.TrimSpace(quote(i.voices.qemu) + " " + quote(i.voices.guest))
	if said == "" {
		said = "none"
	}
	return spec.Errorf(spec.KindUnavailable, "the guest's agent did not answer in time (QEMU's state: %s; its and the guest kernel's messages: %s)", state, said)
}

func (i *instance) state(ctx context.Context) (state string, err error) {
	q, err := i.monitor(ctx)
	if err != nil {
		return "", err
	}
	defer q.Close() //nolint:errcheck // only asked
	return q.status(ctx)
}

func (i *instance) monitor(ctx context.Context) (*qmp, error) {
	conn, err := dialUnix(ctx, i.dir, qmpSocket)
	if err != nil {
		return nil, fmt.Errorf("cannot ask QEMU: %w", err)
	}
	return newQMP(ctx, conn)
}
