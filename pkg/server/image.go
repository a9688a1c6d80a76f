package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// progressEvery is how often at most a pull tells of one layer: more than a person sees is wasted.
const progressEvery = 100 * time.Millisecond

type imageService struct {
	sandboxdv1.UnsafeImageServiceServer
	*Server
}

func (s *imageService) ImportImage(stream grpc.ClientStreamingServer[sandboxdv1.ImportImageRequest, sandboxdv1.ImportImageResponse]) error {
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
	img, err := s.Images.Import(stream.Context(), body, start.GetName())
	if err != nil {
		return err
	}
	s.announce(workload.EventImageAdded, "image imported", img.Digest, img.Names...)
	return stream.SendAndClose(&sandboxdv1.ImportImageResponse{Image: imageToAPI(img)})
}

func (s *imageService) PullImage(r *sandboxdv1.PullImageRequest, stream grpc.ServerStreamingServer[sandboxdv1.PullImageResponse]) error {
	p := &pullProgress{stream: stream, last: make(map[string]time.Time), complete: make(map[string]bool)}
	began := time.Now()
	img, err := s.Images.Pull(stream.Context(), r.GetReference(), image.PullOptions{Insecure: r.GetInsecure(), Progress: p.report})
	p.end()
	s.Metrics.Pull(err, time.Since(began))
	if err != nil {
		return err
	}
	s.announce(workload.EventImageAdded, "image pulled", img.Digest, img.Names...)
	return stream.Send(&sandboxdv1.PullImageResponse{Response: &sandboxdv1.PullImageResponse_Image{Image: imageToAPI(img)}})
}

// pullProgress tells a client how a pull fares. Layers are fetched side by side, so reports come from many goroutines.
type pullProgress struct {
	stream grpc.ServerStreamingServer[sandboxdv1.PullImageResponse]

	mu       sync.Mutex
	last     map[string]time.Time // of the last report, by phase and layer
	complete map[string]bool
	ended    bool
}

func (p *pullProgress) report(progress image.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := progress.Phase + " " + progress.Layer
	// The end of a step is always told, but once.
	complete := progress.Total > 0 && progress.Done >= progress.Total
	if p.ended || p.complete[key] || (!complete && time.Since(p.last[key]) < progressEvery) {
		return
	}
	p.last[key], p.complete[key] = time.Now(), complete
	// A client that went away ends the pull through the context; its progress concerns nobody.
	_ = p.stream.Send(&sandboxdv1.PullImageResponse{
		Response: &sandboxdv1.PullImageResponse_Progress{Progress: progressToAPI(progress)},
	})
}

// end lets no straggler send after, or while, the handler sends the image.
func (p *pullProgress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
}

// ListImages answers oldest first. A page's token is the key of its last image, so pages stay right while images come
// and go.
func (s *imageService) ListImages(ctx context.Context, r *sandboxdv1.ListImagesRequest) (*sandboxdv1.ListImagesResponse, error) {
	images, err := s.Images.List()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(images, func(a, b image.Image) int { return cmp.Compare(imageKey(a), imageKey(b)) })
	answer := &sandboxdv1.ListImagesResponse{}
	for _, img := range images {
		img, seen := s.seen(ctx, img)
		if !seen || imageKey(img) <= r.GetPageToken() {
			continue
		}
		if len(answer.Images) == pageSize(r.GetPageSize()) {
			last := answer.Images[len(answer.Images)-1]
			answer.NextPageToken = imageKey(image.Image{Digest: last.GetDigest(), CreatedAt: timeFromAPI(last.GetCreatedAt())})
			break
		}
		answer.Images = append(answer.Images, imageToAPI(img))
	}
	return answer, nil
}

// imageKey orders images by time and digest.
func imageKey(i image.Image) string {
	return fmt.Sprintf("%020d-%s", max(i.CreatedAt.UnixNano(), 0), i.Digest)
}

func (s *imageService) GetImage(ctx context.Context, r *sandboxdv1.GetImageRequest) (*sandboxdv1.GetImageResponse, error) {
	img, err := s.Images.Get(r.GetReference())
	if err != nil {
		return nil, err
	}
	img, _ = s.seen(ctx, img)
	return &sandboxdv1.GetImageResponse{Image: imageToAPI(img)}, nil
}

func (s *imageService) RemoveImage(_ context.Context, r *sandboxdv1.RemoveImageRequest) (*sandboxdv1.RemoveImageResponse, error) {
	img, err := s.Images.Get(r.GetReference())
	if err != nil {
		return nil, err
	}
	if err := s.Images.Remove(r.GetReference(), s.Workloads.ImageInUse); err != nil {
		return nil, err
	}
	s.announce(workload.EventImageRemoved, "image removed", img.Digest, r.GetReference())
	return &sandboxdv1.RemoveImageResponse{}, nil
}

func (s *imageService) announce(t workload.EventType, message, digest string, names ...string) {
	s.Workloads.Announce(workload.Event{
		Time: time.Now().UTC(), Type: t, Message: message,
		Attributes: map[string]string{"digest": digest, "image": strings.Join(names, ",")},
	})
}
