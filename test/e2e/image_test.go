package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// configured is the busybox root as an image of two layers, the second of which deletes a file of the first, with a
// configuration that says how to run it.
func configured(t *testing.T) v1.Image {
	t.Helper()
	base, err := tarball.LayerFromFile(filepath.Join(harness.Cache, "images", "busybox.tar"))
	must(t, err)
	upper, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range []struct{ name, content string }{{"etc/.wh.not-executable", ""}, {"etc/added", "by the second layer\n"}} {
			if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.content)), Typeflag: tar.TypeReg}); err != nil {
				return nil, err
			}
			if _, err := w.Write([]byte(f.content)); err != nil {
				return nil, err
			}
		}
		return io.NopCloser(&b), w.Close()
	})
	must(t, err)
	img, err := mutate.AppendLayers(empty.Image, base, upper)
	must(t, err)
	config, err := img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config = v1.Config{
		Entrypoint: []string{"/bin/sh", "-c"},
		Cmd:        []string{`echo "$GREETING $(id -un) $PWD"; cat /etc/added; ls /etc/not-executable`},
		Env:        []string{"GREETING=configured", "PATH=/bin"},
		User:       "app",
		WorkingDir: "/home/app",
		StopSignal: "SIGUSR2",
		Labels:     map[string]string{"made-by": "test"},
	}
	img, err = mutate.ConfigFile(img, config)
	must(t, err)
	return img
}

// wantConfigured runs an image made by configured and wants it to do as its configuration says.
func wantConfigured(t *testing.T, d *daemon, reference string) {
	t.Helper()
	for _, iso := range isolations {
		r := d.Wall(iso).Run(reference).Run()
		// ls of the file that the second layer deleted fails.
		if r.Code != 1 || r.Stdout != "configured app /home/app\nby the second layer\n" {
			t.Errorf("%s in a %s: exit code %d, stdout %q, stderr %q", reference, iso, r.Code, r.Stdout, r.Stderr)
		}
		r = d.Wall(iso).Run("-u", "root", "-e", "GREETING=flag", "-w", "/", reference, "echo $GREETING $(id -un) $PWD").Run()
		r.WantOut(t, "flag root /\n")
	}
}

func TestImageFromArchives(t *testing.T) {
	d := ownDaemon(t)
	d.Watch(t)
	img := configured(t)
	ref, err := name.NewTag("example.com/made/configured:1")
	must(t, err)

	archive := filepath.Join(t.TempDir(), "save.tar")
	must(t, tarball.WriteToFile(archive, ref, img))
	d.Call(t, "image", "import", archive) // it names itself
	wantConfigured(t, d, "example.com/made/configured:1")
	d.Call(t, "image", "rm", "example.com/made/configured:1")

	dir := filepath.Join(t.TempDir(), "layout")
	path, err := layout.Write(dir, empty.Index)
	must(t, err)
	must(t, path.AppendImage(img))
	d.Call(t, "image", "import", "--name", "from-layout", dir)
	wantConfigured(t, d, "from-layout")
	d.Call(t, "image", "rm", "from-layout")

	in, err := os.Open(archive)
	must(t, err)
	defer in.Close()
	d.Command("image", "import", "--name", "from-stdin", "-").WithStdin(in).Run().Want(t, 0)
	wantConfigured(t, d, "from-stdin")
	d.Call(t, "image", "rm", "from-stdin")
}

func TestImagePull(t *testing.T) {
	d := ownDaemon(t)
	d.Watch(t)
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	img := configured(t)
	// An index of two platforms, of which this host's must be chosen.
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: empty.Image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
	)
	ref, err := name.ParseReference(host + "/made/multi:1")
	must(t, err)
	must(t, remote.WriteIndex(ref, index))
	digest, err := img.Digest()
	must(t, err)

	// Loopback may be plain HTTP. Progress is lines, for stderr is no terminal.
	r := d.Call(t, "image", "pull", host+"/made/multi:1")
	if r.Stderr == "" && !strings.Contains(r.Stdout, "\n") {
		t.Error("pull shows no progress")
	}
	wantConfigured(t, d, host+"/made/multi:1")
	d.Call(t, "image", "pull", host+"/made/multi@"+digest.String())
	wantConfigured(t, d, digest.String())

	for _, missing := range []string{":missing", "@sha256:" + strings.Repeat("0", 64)} {
		r := d.Command("image", "pull", host+"/made/multi"+missing).Run()
		// Progress comes first.
		said := strings.Split(strings.TrimSpace(r.Stderr), "\n")
		if last := said[len(said)-1]; r.Code != 125 || !strings.Contains(last, missing) || !strings.Contains(last, "does not have it") {
			t.Errorf("pull of what the registry lacks: exit code %d, stderr %q", r.Code, r.Stderr)
		}
	}
	for _, i := range strings.Fields(d.Call(t, "image", "ls", "-q").Stdout) {
		d.Command("image", "rm", i).Run()
	}
	if out := d.Call(t, "image", "ls", "-q").Stdout; out != "" {
		t.Errorf("images are left after all were removed: %s", out)
	}
}

func TestImageInUse(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		copyName := "copy-" + w.Isolation
		w.Call(t, "image", "import", "--name", copyName, filepath.Join(harness.Cache, "images", "busybox.tar"))
		id := w.Create(t, copyName, "true")
		// Another name of the same bytes goes; the last name of what a workload uses stays.
		if names := imageNames(t, w.Daemon); !strings.Contains(names, copyName) || !strings.Contains(names, busybox) {
			t.Errorf("image ls shows %q", names)
		}
		w.Call(t, "image", "rm", copyName)
		w.Command("image", "rm", busybox).Run().WantError(t, 125, "use")
		w.Call(t, "start", id)
		w.Call(t, "wait", id).WantOut(t, "0\n")
		w.Call(t, "image", "inspect", busybox)
		w.Command("image", "inspect", copyName).Run().WantError(t, 125, copyName)
	})
}

func imageNames(t *testing.T, d *daemon) string {
	t.Helper()
	return d.Call(t, "image", "ls").Stdout
}

// A malformed image gets a clear error and leaves nothing: the leak check sees to the second.
func TestMalformedImages(t *testing.T) {
	d := shared
	d.Watch(t)
	dir := t.TempDir()
	write := func(file string, headers ...tar.Header) string {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			must(t, w.WriteHeader(&h))
			_, err := io.CopyN(w, zeros{}, h.Size)
			must(t, err)
		}
		must(t, w.Close())
		path := filepath.Join(dir, file)
		must(t, os.WriteFile(path, b.Bytes(), 0o600))
		return path
	}
	dirHeader := tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}
	for what, path := range map[string]string{
		"climbs out":     write("climb.tar", dirHeader, tar.Header{Name: "../../etc/evil", Typeflag: tar.TypeReg, Mode: 0o644}),
		"hard link out":  write("link.tar", dirHeader, tar.Header{Name: "etc/evil", Linkname: "../../etc/shadow", Typeflag: tar.TypeLink}),
		"truncated":      truncated(t, write("short.tar", dirHeader, tar.Header{Name: "etc/file", Typeflag: tar.TypeReg, Mode: 0o644, Size: 100_000})),
		"no archive":     text(t, filepath.Join(dir, "text"), "this is no archive"),
		"nothing at all": text(t, filepath.Join(dir, "empty"), ""),
		"no layers": func() string {
			ref, err := name.NewTag("example.com/layerless:1")
			must(t, err)
			path := filepath.Join(dir, "layerless.tar")
			must(t, tarball.WriteToFile(path, ref, empty.Image))
			return path
		}(),
	} {
		r := d.Command("image", "import", "--name", "malformed", path).Run()
		t.Logf("%s: %s", what, r.Stderr)
		r.WantError(t, 125)
	}
	if names := imageNames(t, d); strings.Contains(names, "malformed") || strings.Contains(names, "layerless") {
		t.Errorf("a malformed image is listed:\n%s", names)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func truncated(t *testing.T, path string) string {
	must(t, os.Truncate(path, 50_000))
	return path
}

func text(t *testing.T, path, content string) string {
	must(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func TestImageJSON(t *testing.T) {
	d := shared
	d.Watch(t)
	var one struct {
		Digest    string
		Names     []string
		SizeBytes string
		Platform  string
	}
	r := d.Call(t, "--format", "json", "image", "inspect", busybox)
	if err := json.Unmarshal([]byte(r.Stdout), &one); err != nil || !strings.HasPrefix(one.Digest, "sha256:") || one.SizeBytes == "" || len(one.Names) == 0 {
		t.Errorf("image inspect: %v, %+v\n%s", err, one, r.Stdout)
	}
}
