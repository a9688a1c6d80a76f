package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	gcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// testRegistry is a registry on loopback, whose answers a test may change on their way.
type testRegistry struct {
	t       *testing.T
	host    string
	mu      sync.Mutex
	meddle  func(w http.ResponseWriter, r *http.Request) bool
	fetched map[string]int
}

func newRegistry(t *testing.T) *testRegistry {
	// Whatever credentials this machine has are none of the test's.
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	t.Setenv("REGISTRY_AUTH_FILE", "")
	r := &testRegistry{t: t, fetched: map[string]int{}}
	real := gcr.New(gcr.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		if req.Method == http.MethodGet {
			r.fetched[req.URL.Path]++
		}
		meddle := r.meddle
		r.mu.Unlock()
		if meddle == nil || !meddle(w, req) {
			real.ServeHTTP(w, req)
		}
	}))
	t.Cleanup(server.Close)
	r.host = strings.TrimPrefix(server.URL, "http://")
	return r
}

func (r *testRegistry) setMeddle(fn func(w http.ResponseWriter, r *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.meddle = fn
}

func (r *testRegistry) send(method, path, contentType string, body []byte) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, "http://"+r.host+path, bytes.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		text, err := io.ReadAll(resp.Body)
		r.t.Fatalf("%s %s: %s: %s %v", method, path, resp.Status, text, err)
	}
}

// push stores what a layout holds and tags d.
func (r *testRegistry) push(repo, tag string, l *layout, d v1.Descriptor) {
	for name, data := range l.blobs {
		hex := strings.TrimPrefix(name, "blobs/sha256/")
		r.send(http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest=sha256:"+hex, "application/octet-stream", data)
	}
	r.send(http.MethodPut, "/v2/"+repo+"/manifests/"+tag, string(d.MediaType), l.blobs["blobs/sha256/"+d.Digest.Hex])
}

// pushImage pushes an image of layers and gives its descriptor.
func (r *testRegistry) pushImage(repo, tag string, layers ...[]byte) v1.Descriptor {
	l := newLayout(r.t)
	d := l.image(testConfig(layers...), types.OCILayer, layers...)
	r.push(repo, tag, l, d)
	return d
}

func TestPull(t *testing.T) {
	r := newRegistry(t)
	layers := [][]byte{simpleLayer(t), makeTar(t, fileEntry("second", "2")), makeTar(t, fileEntry("third", "3"), fileEntry(".wh.second", ""))}
	d := r.pushImage("a/b", "1.0", layers...)
	ref := r.host + "/a/b:1.0"
	s := newStore(t)
	var got []Progress
	image, err := s.Pull(t.Context(), ref, PullOptions{Progress: func(p Progress) { got = append(got, p) }})
	if err != nil {
		t.Fatal(err)
	}
	if image.Digest != d.Digest.String() || !slices.Equal(image.Names, []string{ref}) {
		t.Errorf("%s %v", image.Digest, image.Names)
	}
	if files := listing(t, image.Path); !slices.Equal(files[1:], []string{"-rw-r--r-- hello = world", "-rw-r--r-- third = 3"}) {
		t.Errorf("files %v", files)
	}
	checkProgress(t, got, len(layers))

	// By digest, and by tag again: nothing is fetched twice.
	byDigest := r.host + "/a/b@" + d.Digest.String()
	r.mu.Lock()
	clear(r.fetched)
	r.mu.Unlock()
	for _, ref := range []string{byDigest, ref} {
		if _, err := s.Pull(t.Context(), ref, PullOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for path := range r.fetched {
		if strings.Contains(path, "/blobs/") && !strings.Contains(path, sha(mustJSON(t, testConfig(layers...)))) {
			t.Errorf("fetched again: %s", path)
		}
	}
	if image, err = s.Get(byDigest); err != nil || len(image.Names) != 2 {
		t.Errorf("%v, %v", image.Names, err)
	}
}

// checkProgress wants the phases in order and each layer told from its start to its end.
func checkProgress(t *testing.T, got []Progress, layers int) {
	t.Helper()
	order := []string{PhaseResolve, PhaseFetch, PhaseBuild}
	at := 0
	ended := map[string]bool{}
	for _, p := range got {
		i := slices.Index(order, p.Phase)
		if i < at {
			t.Errorf("%s after %s", p.Phase, order[at])
		}
		at = i
		if p.Phase == PhaseFetch && p.Done == p.Total {
			ended[p.Layer] = true
		}
	}
	if last := got[len(got)-1]; last.Phase != PhaseBuild || last.Done != last.Total || len(ended) != layers {
		t.Errorf("progress %+v", got)
	}
}

func TestPullResolvesIndex(t *testing.T) {
	r := newRegistry(t)
	layer := simpleLayer(t)
	l := newLayout(t)
	mine := l.image(testConfig(layer), types.OCILayer, layer)
	other := testConfig(layer)
	other.Architecture = "arm64"
	arm := l.image(other, types.OCILayer, layer)
	arm.Platform = &v1.Platform{OS: "linux", Architecture: "arm64"}
	mine.Platform = &v1.Platform{OS: platformOS, Architecture: platformArch}
	index := l.blob(types.OCIImageIndex, mustJSON(t, v1.IndexManifest{
		SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{arm, mine},
	}))
	for _, d := range []v1.Descriptor{mine, arm} {
		r.push("multi", d.Digest.String(), l, d)
	}
	r.push("multi", "latest", l, index)
	s := newStore(t)
	for _, ref := range []string{r.host + "/multi", r.host + "/multi@" + index.Digest.String()} {
		image, err := s.Pull(t.Context(), ref, PullOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if image.Digest != mine.Digest.String() {
			t.Errorf("%s gave %s, want %s", ref, image.Digest, mine.Digest)
		}
		if got, err := s.Get(ref); err != nil || got.Digest != image.Digest {
			t.Errorf("%s: %v, %v", ref, got.Digest, err)
		}
	}
}

func TestPullFailures(t *testing.T) {
	layer := simpleLayer(t)
	packed := gzipped(t, layer)
	isLayer := func(req *http.Request) bool {
		return req.Method == http.MethodGet && strings.HasSuffix(req.URL.Path, sha(packed))
	}
	answer := func(status int) func(w http.ResponseWriter, req *http.Request) bool {
		return func(w http.ResponseWriter, req *http.Request) bool {
			if strings.Contains(req.URL.Path, "/manifests/") {
				w.WriteHeader(status)
				return true
			}
			return false
		}
	}
	instead := func(when func(*http.Request) bool, data []byte) func(w http.ResponseWriter, req *http.Request) bool {
		return func(w http.ResponseWriter, req *http.Request) bool {
			if !when(req) {
				return false
			}
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			if _, err := w.Write(data); err != nil {
				t.Error(err)
			}
			return true
		}
	}
	isManifest := func(req *http.Request) bool { return strings.Contains(req.URL.Path, "/manifests/") }
	d := newLayout(t).image(testConfig(layer), types.OCILayer, layer)
	for _, tc := range []struct {
		name, ref string
		meddle    func(w http.ResponseWriter, r *http.Request) bool
		kind      spec.Kind
		want      string
	}{
		{"no such tag", "x:2", nil, spec.KindNotFound, "does not have it"},
		{"no such repository", "y", nil, spec.KindNotFound, "does not have it"},
		{"no such digest", "x@sha256:" + strings.Repeat("0", 64), nil, spec.KindNotFound, "does not have it"},
		{"not allowed", "x", answer(http.StatusForbidden), spec.KindNotFound, "docker login"},
		{"too many requests", "x", answer(http.StatusTooManyRequests), spec.KindUnavailable, "fewer requests"},
		{"registry fails", "x", answer(http.StatusNotImplemented), spec.KindUnavailable, "failed"},
		{"blob missing", "x", func(w http.ResponseWriter, req *http.Request) bool {
			if isLayer(req) {
				w.WriteHeader(http.StatusNotFound)
			}
			return isLayer(req)
		}, spec.KindNotFound, "does not have it"},
		{"blob tampered with", "x", instead(isLayer, flip(packed)), spec.KindInvalid, ""},
		{"blob replaced", "x", instead(isLayer, sameLength(t, packed)), spec.KindInvalid, "tampered"},
		{"blob longer than it should be", "x", instead(isLayer, append(bytes.Clone(packed), 0)), spec.KindInvalid, "longer"},
		{"manifest tampered with", "x@" + d.Digest.String(), instead(isManifest, []byte(`{"schemaVersion":2}`)), spec.KindInvalid, ""},
		{"manifest that is none", "x", instead(isManifest, []byte(`<html>`)), spec.KindInvalid, "cannot be read"},
		{"manifest without end", "x", instead(isManifest, bytes.Repeat([]byte(" "), 5<<20)), spec.KindInvalid, "bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRegistry(t)
			if got := r.pushImage("x", "latest", layer); got.Digest != d.Digest {
				t.Fatal("the image is not what the test expects")
			}
			r.setMeddle(tc.meddle)
			s := newStore(t)
			_, err := s.Pull(t.Context(), r.host+"/"+tc.ref, PullOptions{})
			wantKind(t, err, tc.kind, tc.want)
			wantEmpty(t, s)
		})
	}
}

// sameLength makes another blob of the same length that decompresses well.
func sameLength(t testing.TB, packed []byte) []byte {
	other := gzipped(t, makeTar(t, fileEntry("hello", "earth")))
	if len(other) > len(packed) {
		t.Fatalf("%d bytes, want at most %d", len(other), len(packed))
	}
	return append(other, make([]byte, len(packed)-len(other))...)
}

// A connection that breaks off is tried again; the half layer of before is not taken for a whole one.
func TestPullTriesAgain(t *testing.T) {
	r := newRegistry(t)
	layer := makeTar(t, fileEntry("f", strings.Repeat("0123456789", 10_000)))
	d := r.pushImage("x", "latest", layer)
	packed := gzipped(t, layer)
	var asked atomic.Int32
	r.setMeddle(func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != http.MethodGet || !strings.HasSuffix(req.URL.Path, sha(packed)) || asked.Add(1) > 1 {
			return false
		}
		w.Header().Set("Content-Length", "100000000")
		if _, err := w.Write(packed[:len(packed)/2]); err != nil {
			t.Error(err)
		}
		panic(http.ErrAbortHandler)
	})
	image, err := newStore(t).Pull(t.Context(), r.host+"/x", PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if image.Digest != d.Digest.String() || asked.Load() != 2 {
		t.Errorf("digest %s, asked %d times", image.Digest, asked.Load())
	}
}

func TestPullIsCancelled(t *testing.T) {
	r := newRegistry(t)
	r.pushImage("x", "latest", simpleLayer(t))
	ctx, cancel := context.WithCancel(t.Context())
	r.setMeddle(func(w http.ResponseWriter, req *http.Request) bool {
		if strings.HasSuffix(req.URL.Path, sha(gzipped(t, simpleLayer(t)))) {
			cancel()
			<-req.Context().Done()
			return true
		}
		return false
	})
	s := newStore(t)
	_, err := s.Pull(ctx, r.host+"/x", PullOptions{})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wantEmpty(t, s)
}

// Plain HTTP goes to loopback only, redirects included, unless the caller allows more.
func TestPlainHTTP(t *testing.T) {
	for _, tc := range []struct {
		registry, request string
		insecure, refused bool
	}{
		{"127.0.0.1:5000", "http://127.0.0.1:5000/v2/", false, false},
		{"localhost", "http://localhost/v2/", false, false},
		{"[::1]:5000", "http://[::1]:5000/v2/", false, false},
		{"127.0.0.1:5000", "http://example.com/blob", false, true},
		{"10.0.0.1:5000", "http://10.0.0.1:5000/v2/", false, true},
		{"host.local", "http://host.local/v2/", false, true},
		{"localhost.example.com", "http://localhost.example.com/v2/", false, true},
		{"example.com", "http://127.0.0.1/v2/", false, true},
		{"example.com", "http://example.com/v2/", true, false},
		{"example.com", "ftp://example.com/v2/", false, true},
	} {
		g := newGuard(tc.registry, tc.insecure, mib)
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // what is let through must not leave this machine
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, tc.request, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := g.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
			t.Fatal("a request with a cancelled context was answered")
		}
		if refused := spec.KindOf(err) == spec.KindInvalid; refused != tc.refused {
			t.Errorf("registry %s, request %s, insecure %v: %v", tc.registry, tc.request, tc.insecure, err)
		}
	}
}

func TestPullNeedsReference(t *testing.T) {
	s := newStore(t)
	for _, ref := range []string{"", "sha256:" + strings.Repeat("a", 64), "UPPER", "a b"} {
		_, err := s.Pull(t.Context(), ref, PullOptions{})
		wantKind(t, err, spec.KindInvalid, "")
	}
}
