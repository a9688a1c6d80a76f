package client

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// Logs calls fn with each piece of a workload's output until it ends, fn fails or ctx is done.
func (c *Client) Logs(ctx context.Context, request *sandboxdv1.StreamLogsRequest, fn func(*sandboxdv1.StreamLogsResponse) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Workloads.StreamLogs(ctx, request)
	if err != nil {
		return err
	}
	return each(stream, fn)
}

// Watch calls fn with each event until fn fails or ctx is done.
func (c *Client) Watch(ctx context.Context, request *sandboxdv1.WatchEventsRequest, fn func(*sandboxdv1.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Workloads.WatchEvents(ctx, request)
	if err != nil {
		return err
	}
	return each(stream, func(r *sandboxdv1.WatchEventsResponse) error { return fn(r.GetEvent()) })
}

// CopyIn unpacks a tar stream below a directory of a running workload.
func (c *Client) CopyIn(ctx context.Context, id, path string, tar io.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Workloads.CopyIn(ctx)
	if err != nil {
		return err
	}
	start := &sandboxdv1.CopyInStart{Id: id, Path: path}
	err = sendAll(tar,
		func() error {
			return stream.Send(&sandboxdv1.CopyInRequest{Request: &sandboxdv1.CopyInRequest_Start{Start: start}})
		},
		func(data []byte) error {
			return stream.Send(&sandboxdv1.CopyInRequest{Request: &sandboxdv1.CopyInRequest_Data{Data: data}})
		})
	if err != nil {
		return err
	}
	_, err = stream.CloseAndRecv()
	return err
}

// CopyOut writes a tar stream of a file or directory of a running workload: its first entry is what was asked for,
// under its base name. What it says comes from inside the sandbox: unpack it as one unpacks a stranger's archive.
func (c *Client) CopyOut(ctx context.Context, id, path string, tar io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Workloads.CopyOut(ctx, &sandboxdv1.CopyOutRequest{Id: id, Path: path})
	if err != nil {
		return err
	}
	return each(stream, func(r *sandboxdv1.CopyOutResponse) error {
		_, err := tar.Write(r.GetData())
		return err
	})
}

// ImportImage sends an archive; name may be empty when the archive names itself.
func (c *Client) ImportImage(ctx context.Context, name string, archive io.Reader) (*sandboxdv1.Image, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Images.ImportImage(ctx)
	if err != nil {
		return nil, err
	}
	start := &sandboxdv1.ImportImageStart{Name: name}
	err = sendAll(archive,
		func() error {
			return stream.Send(&sandboxdv1.ImportImageRequest{Request: &sandboxdv1.ImportImageRequest_Start{Start: start}})
		},
		func(data []byte) error {
			return stream.Send(&sandboxdv1.ImportImageRequest{Request: &sandboxdv1.ImportImageRequest_Data{Data: data}})
		})
	if err != nil {
		return nil, err
	}
	answer, err := stream.CloseAndRecv()
	return answer.GetImage(), err
}

// PullImage fetches an image from a registry; progress, unless nil, is called as it goes.
func (c *Client) PullImage(ctx context.Context, request *sandboxdv1.PullImageRequest, progress func(*sandboxdv1.PullProgress)) (*sandboxdv1.Image, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Images.PullImage(ctx, request)
	if err != nil {
		return nil, err
	}
	var image *sandboxdv1.Image
	err = each(stream, func(r *sandboxdv1.PullImageResponse) error {
		if p := r.GetProgress(); p != nil && progress != nil {
			progress(p)
		}
		if i := r.GetImage(); i != nil {
			image = i
		}
		return nil
	})
	if err == nil && image == nil {
		err = noEOF(io.EOF)
	}
	return image, err
}

// ListWorkloads answers with every page of a list.
func (c *Client) ListWorkloads(ctx context.Context, request *sandboxdv1.ListWorkloadsRequest) ([]*sandboxdv1.Workload, error) {
	var all []*sandboxdv1.Workload
	for {
		page, err := c.Workloads.ListWorkloads(ctx, request)
		if err != nil {
			return nil, err
		}
		all = append(all, page.GetWorkloads()...)
		if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
			return all, nil
		}
	}
}

// ListUsage asks for all pages: what every workload that runs or is paused uses.
func (c *Client) ListUsage(ctx context.Context, request *sandboxdv1.ListUsageRequest) ([]*sandboxdv1.Usage, error) {
	page := proto.CloneOf(request)
	page.PageSize = 1000
	var all []*sandboxdv1.Usage
	for {
		r, err := c.Workloads.ListUsage(ctx, page)
		if err != nil {
			return nil, err
		}
		all = append(all, r.GetUsages()...)
		if page.PageToken = r.GetNextPageToken(); page.PageToken == "" {
			return all, nil
		}
	}
}

// ListImages answers with every image, oldest first.
func (c *Client) ListImages(ctx context.Context) ([]*sandboxdv1.Image, error) {
	var all []*sandboxdv1.Image
	request := &sandboxdv1.ListImagesRequest{}
	for {
		page, err := c.Images.ListImages(ctx, request)
		if err != nil {
			return nil, err
		}
		all = append(all, page.GetImages()...)
		if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
			return all, nil
		}
	}
}

// each calls fn with every message of a stream.
func each[M any](stream grpc.ServerStreamingClient[M], fn func(*M) error) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := fn(m); err != nil {
			return err
		}
	}
}

// sendAll sends a start and then the bytes of r in pieces. It returns only errors of r: that the daemon has ended the
// stream is no error here, since its answer says why.
func sendAll(r io.Reader, start func() error, piece func([]byte) error) error {
	if start() != nil {
		return nil
	}
	buf := make([]byte, pieceBytes)
	for {
		n, err := r.Read(buf)
		if n > 0 && piece(buf[:n]) != nil {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
