package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// copyPiece is how much of a stream is sent at a time.
const copyPiece = 512 << 10

// CopyIn unpacks the tar stream r below the directory path of the container.
func (c *Client) CopyIn(ctx context.Context, containerID, path string, r io.Reader) error {
	p, err := c.startCopy(ctx, containerID, path, agentv1.CopyRequest_DIRECTION_IN)
	if err != nil {
		return err
	}
	defer p.end(ctx)
	if err := p.send(ctx, r); err != nil {
		return err
	}
	return p.copyResult(ctx, "cannot copy to "+path)
}

// send writes r to the process, which may stop taking it: then its result says why.
func (p *Process) send(ctx context.Context, r io.Reader) error {
	piece := make([]byte, copyPiece)
	var offset uint64
	for eof := false; !eof; {
		n, err := io.ReadFull(r, piece)
		eof = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !eof {
			return fmt.Errorf("cannot read what is to be copied: %w", err)
		}
		// Once more even when all bytes are accepted: the end must be too.
		for left := piece[:n]; ; {
			accepted, closed, err := p.WriteInput(ctx, offset, left, eof)
			if err != nil {
				return err
			}
			if closed {
				return nil
			}
			took := accepted - offset
			if took > uint64(len(left)) {
				return protocolError("%d bytes of input accepted of %d", took, len(left))
			}
			left, offset = left[took:], accepted
			if len(left) == 0 {
				break
			}
		}
	}
	return nil
}

// CopyOut writes the file or directory path of the container to w as a tar stream, its entries named from path's last
// element on; KindNotFound if there is no such path. What the stream says is the sandbox's claim: whoever unpacks it must not let it lead anywhere.
func (c *Client) CopyOut(ctx context.Context, containerID, path string, w io.Writer) error {
	p, err := c.startCopy(ctx, containerID, path, agentv1.CopyRequest_DIRECTION_OUT)
	if err != nil {
		return err
	}
	defer p.end(ctx)
	var offset uint64
	for eof := false; !eof; {
		var chunks []Chunk
		if chunks, eof, err = p.ReadOutput(ctx, offset); err != nil {
			return err
		}
		for _, chunk := range chunks {
			if _, err := w.Write(chunk.Data); err != nil {
				return fmt.Errorf("cannot write what was copied: %w", err)
			}
			offset += uint64(len(chunk.Data))
		}
	}
	return p.copyResult(ctx, "cannot copy from "+path)
}

func (c *Client) startCopy(ctx context.Context, containerID, path string, d agentv1.CopyRequest_Direction) (*Process, error) {
	p := c.Process("copy-" + rand.Text())
	err := c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.Copy(ctx, &agentv1.CopyRequest{ContainerId: containerID, ProcessId: p.ID, Direction: d, Path: path})
		return err
	})
	if err != nil {
		c.abandon(p)
	}
	return p, err
}

// copyMissingCode is a copy's exit code when what was to be read is not there: ENOENT's number.
const copyMissingCode = 2

func (p *Process) copyResult(ctx context.Context, what string) error {
	exit, complaint, err := p.wait(ctx)
	switch {
	case err != nil:
		return err
	case exit.Code == 0:
		return nil
	case complaint == "":
		complaint = fmt.Sprintf("the copy ended with code %d", exit.Code)
	}
	failure := spec.Invalidf("path", "%s: %s", what, complaint)
	if exit.Code == copyMissingCode {
		failure.Kind = spec.KindNotFound
	}
	return failure
}
