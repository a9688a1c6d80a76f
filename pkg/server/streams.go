package server

import (
	"errors"
	"io"

	"google.golang.org/grpc"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// pieceBytes is the largest piece of a byte stream in one message to a client.
const pieceBytes = 256 << 10

func (s *workloadService) StreamLogs(r *sandboxdv1.StreamLogsRequest, stream grpc.ServerStreamingServer[sandboxdv1.StreamLogsResponse]) error {
	o := workload.LogOptions{Follow: r.GetFollow(), Tail: -1, Since: timeFromAPI(r.GetSince()), Console: r.GetConsole()}
	if r.Tail != nil {
		o.Tail = int(r.GetTail())
	}
	return s.Workloads.Logs(stream.Context(), r.GetId(), o, func(e workload.LogEntry) error {
		if e.Dropped > 0 {
			return stream.Send(&sandboxdv1.StreamLogsResponse{DroppedBytes: e.Dropped})
		}
		return pieces(e.Data, func(data []byte) error {
			return stream.Send(&sandboxdv1.StreamLogsResponse{
				Time: timeToAPI(e.Time), Stream: streams.toAPI(e.Stream), Data: data,
			})
		})
	})
}

func (s *workloadService) WatchEvents(r *sandboxdv1.WatchEventsRequest, stream grpc.ServerStreamingServer[sandboxdv1.WatchEventsResponse]) error {
	permit := permitOf(stream.Context())
	return s.Workloads.Watch(stream.Context(), r.GetId(), timeFromAPI(r.GetSince()), func(e workload.Event) error {
		if !permit.hears(e) {
			return nil
		}
		return stream.Send(&sandboxdv1.WatchEventsResponse{Event: eventToAPI(e)})
	})
}

func (s *workloadService) CopyIn(stream grpc.ClientStreamingServer[sandboxdv1.CopyInRequest, sandboxdv1.CopyInResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return firstError(err)
	}
	start := first.GetStart()
	if start == nil {
		return errNoStart
	}
	body := &byteStream{recv: func() ([]byte, error) {
		r, err := stream.Recv()
		if err == nil && r.GetStart() != nil {
			err = errTwoStarts
		}
		return r.GetData(), err
	}}
	if err := s.Workloads.CopyIn(stream.Context(), start.GetId(), start.GetPath(), body); err != nil {
		return err
	}
	return stream.SendAndClose(&sandboxdv1.CopyInResponse{})
}

func (s *workloadService) CopyOut(r *sandboxdv1.CopyOutRequest, stream grpc.ServerStreamingServer[sandboxdv1.CopyOutResponse]) error {
	return s.Workloads.CopyOut(stream.Context(), r.GetId(), r.GetPath(), writerFunc(func(data []byte) error {
		return stream.Send(&sandboxdv1.CopyOutResponse{Data: data})
	}))
}

var (
	errNoStart   = spec.Invalidf("start", "the first request of the stream must carry start")
	errTwoStarts = spec.Invalidf("start", "only the first request of the stream may carry start")
)

// firstError explains a stream that ended before its first request.
func firstError(err error) error {
	if errors.Is(err, io.EOF) {
		return errNoStart
	}
	return err
}

// byteStream reads the bytes of a client's stream. The client sends no faster than Read is called: gRPC's flow control
// holds it back.
type byteStream struct {
	recv func() ([]byte, error)
	rest []byte
	err  error
}

func (b *byteStream) Read(p []byte) (int, error) {
	for len(b.rest) == 0 {
		if b.err != nil {
			return 0, b.err
		}
		b.rest, b.err = b.recv()
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

// writerFunc is a writer that hands its bytes on in pieces, each one sent before the next: a client that does not read
// holds back whoever writes.
type writerFunc func(data []byte) error

func (w writerFunc) Write(p []byte) (int, error) {
	if err := pieces(p, w); err != nil {
		return 0, err
	}
	return len(p), nil
}

// pieces calls fn with data in pieces that fit in a message.
func pieces(data []byte, fn func([]byte) error) error {
	for len(data) > 0 {
		n := min(len(data), pieceBytes)
		if err := fn(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}
