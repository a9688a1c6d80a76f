package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// PullOptions say how to pull.
type PullOptions struct {
	// Plain HTTP is allowed, also to a registry that is not on loopback.
	Insecure bool
	// Called with progress, one call at a time; it must not block for long. May be nil.
	Progress func(Progress)
}

const (
	dialTimeout = 30 * time.Second
	// headerTimeout is how long a registry may think before it answers.
	headerTimeout = 60 * time.Second
	// stallTimeout is how long a download may give nothing before it is given up.
	stallTimeout = 60 * time.Second
)

// Pull fetches an image from a registry, by tag (latest if ref has none) or digest, and gives it that name. Credentials are
// those of the daemon's user: docker's and podman's configuration files.
func (s *Store) Pull(ctx context.Context, ref string, o PullOptions) (Image, error) {
	var opts []name.Option
	if o.Insecure {
		opts = append(opts, name.Insecure)
	}
	canonical, err := canonicalName(ref)
	if err != nil {
		return Image{}, err
	}
	parsed, err := name.ParseReference(ref, opts...)
	if err != nil {
		return Image{}, spec.Invalidf("reference", "cannot pull %s: it is not a reference to an image in a registry: write registry/repository:tag", quote(ref))
	}
	ctx, done, err := s.use(ctx)
	if err != nil {
		return Image{}, err
	}
	defer done()
	im := s.newImporter(ctx, o.Progress)
	defer im.release()
	image, err := im.pull(parsed, canonical, o.Insecure)
	if err != nil {
		return Image{}, subject("pull", quote(ref), registryError(err))
	}
	return image, nil
}

func (im *importer) pull(ref name.Reference, canonical string, insecure bool) (Image, error) {
	im.progress.report(Progress{Phase: PhaseResolve})
	guard := newGuard(ref.Context().RegistryStr(), insecure, im.limits.document)
	defer guard.base.CloseIdleConnections()
	puller, err := remote.NewPuller(
		remote.WithTransport(guard),
		remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithUserAgent("sandboxd"),
	)
	if err != nil {
		return Image{}, err
	}
	desc, err := puller.Get(im.ctx, ref)
	if err != nil {
		return Image{}, err
	}
	d := desc.Descriptor
	if want, ok := ref.(name.Digest); ok && d.Digest.String() != want.DigestStr() {
		return Image{}, invalidf("the registry gave %s instead of %s", d.Digest, want.DigestStr())
	}
	from := &registry{puller: puller, repo: ref.Context(), first: d.Digest, manifest: desc.Manifest}
	src, err := resolve(im.ctx, from, d, im.limits)
	if err != nil {
		return Image{}, err
	}
	return im.installSource(src, []string{canonical})
}

// registry is a repository as a source of blobs.
type registry struct {
	puller *remote.Puller
	repo   name.Repository
	// The document that the reference led to, fetched already.
	first    v1.Hash
	manifest []byte
}

func (r *registry) document(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if d.Digest == r.first {
		return r.manifest, nil
	}
	desc, err := r.puller.Get(ctx, r.repo.Digest(d.Digest.String()))
	if err != nil {
		return nil, err
	}
	return desc.Manifest, nil
}

func (r *registry) open(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	if !isDigest(d.Digest.String()) {
		return nil, invalidf("it refers to %s, which is not a sha256 digest", quote(d.Digest.String()))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	layer, err := r.puller.Layer(ctx, r.repo.Digest(d.Digest.String()))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	body, err := layer.Compressed()
	if err != nil {
		cancel(nil)
		return nil, err
	}
	return newDownload(ctx, cancel, body, d.Size), nil
}

var (
	errStalled = spec.Errorf(spec.KindUnavailable, "the registry gave nothing for %v", stallTimeout)
	errBroken  = errors.New("the download broke off")
)

// download is a blob on its way. It is given up when nothing comes.
type download struct {
	body   io.ReadCloser
	left   int64
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func newDownload(ctx context.Context, cancel context.CancelCauseFunc, body io.ReadCloser, size int64) *download {
	return &download{body, size, ctx, cancel, time.AfterFunc(stallTimeout, func() { cancel(errStalled) })}
}

func (d *download) Read(p []byte) (int, error) {
	n, err := d.body.Read(p)
	d.timer.Reset(stallTimeout)
	d.left -= int64(n)
	switch {
	case err == nil || errors.Is(err, io.EOF):
	case d.ctx.Err() != nil:
		err = context.Cause(d.ctx)
	case d.left <= 0:
		// All has come, so it is the library's check of the digest that failed, in an error that cannot be told from others.
		// Our own check says it better.
		err = io.EOF
	default:
		err = fmt.Errorf("%w: %w", errBroken, err)
	}
	return n, err
}

func (d *download) Close() error {
	d.timer.Stop()
	d.cancel(nil)
	return d.body.Close()
}

// guard is what every request of a pull goes through, redirects and token requests included. The library takes plain HTTP
// for private networks and .local names too; here it is for loopback, and only if the registry itself is there, or where
// the caller said so.
type guard struct {
	base     *http.Transport
	insecure bool
	loopback bool
	document int64
}

func newGuard(registryHost string, insecure bool, document int64) *guard {
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.DialContext = (&net.Dialer{Timeout: dialTimeout}).DialContext
	base.TLSHandshakeTimeout = dialTimeout
	base.ResponseHeaderTimeout = headerTimeout
	return &guard{base, insecure, isLoopback(registryHost), document}
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !g.insecure && (!g.loopback || !isLoopback(req.URL.Host)) {
		return nil, spec.Errorf(spec.KindInvalid, "%s speaks plain HTTP, which anybody on the way can read and change: allow it with --insecure if you trust the network", req.URL.Host)
	}
	resp, err := g.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if strings.Contains(req.URL.Path, "/manifests/") {
		// One more byte than allowed, for readDocument to refuse it by.
		resp.Body = &limitedBody{io.LimitReader(resp.Body, g.document+1), resp.Body}
	}
	return resp, nil
}

type limitedBody struct {
	io.Reader
	io.Closer
}

func isLoopback(hostport string) bool {
	host := (&url.URL{Host: hostport}).Hostname()
	if ip := net.ParseIP(host); ip != nil {
		return ip.IsLoopback()
	}
	return host == "localhost"
}

// registryError gives a registry's answer, or its silence, the kind a caller can act on.
func registryError(err error) error {
	err = classify(err)
	if isTyped(err) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var answer *transport.Error
	var connection *net.OpError
	var request *url.Error
	switch {
	case errors.As(err, &answer):
		return answerError(answer.StatusCode, err)
	case errors.As(err, &connection) || errors.As(err, &request) || errors.Is(err, errBroken):
		return spec.Errorf(spec.KindUnavailable, "cannot reach the registry, try again later: %w", err)
	case isHostError(err):
		return err
	}
	return invalidf("the registry's answer makes no sense: %w", err)
}

func answerError(status int, err error) error {
	switch status {
	case http.StatusNotFound:
		return spec.Errorf(spec.KindNotFound, "the registry does not have it: %w", err)
	case http.StatusUnauthorized, http.StatusForbidden:
		return spec.Errorf(spec.KindNotFound, "the registry does not have it, or not for us: log in as the daemon's user (docker login): %w", err)
	case http.StatusTooManyRequests:
		return spec.Errorf(spec.KindUnavailable, "the registry wants fewer requests: try again later, or log in: %w", err)
	}
	return spec.Errorf(spec.KindUnavailable, "the registry failed, try again later: %w", err)
}
