package image

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// archive is a tar that was sent to us, with its files by path. It is an OCI layout, a docker-save archive, or the files
// of a root file system.
type archive struct {
	files map[string]*inode
	lim   limits
}

const (
	ociLayoutFile  = "oci-layout"
	ociIndexFile   = "index.json"
	dockerFile     = "manifest.json"
	refName        = "org.opencontainers.image.ref.name"
	containerdName = "io.containerd.image.name"
)

// rootDirectories tell a root file system, which may have a manifest.json of its own, from an archive of an image.
var rootDirectories = []string{"bin", "etc", "lib", "sbin", "usr", "var"}

// newArchive looks at the entries of a tar. It is nil for a root file system.
func newArchive(entries []entry, lim limits) (*archive, error) {
	a := &archive{files: map[string]*inode{}, lim: lim}
	for i := range entries {
		e := &entries[i]
		if e.node != nil && len(e.path) > 0 {
			a.files[strings.Join(e.path, "/")] = e.node
		}
		if len(e.path) > 0 && slices.Contains(rootDirectories, e.path[0]) {
			return nil, nil
		}
	}
	if !a.isOCI() && a.files[dockerFile] == nil {
		return nil, nil
	}
	// docker save of old links layers that are equal: to one another by symbolic link, other makers by hard link.
	for i := range entries {
		if e := &entries[i]; e.hardLink != nil {
			if target := a.files[strings.Join(e.hardLink, "/")]; target != nil {
				a.files[strings.Join(e.path, "/")] = target
			}
		}
	}
	return a, nil
}

func (a *archive) isOCI() bool {
	return a.files[ociLayoutFile] != nil && a.files[ociIndexFile] != nil
}

// file finds a file of the archive, through symbolic links within it.
func (a *archive) file(name string) (section, error) {
	at := path.Clean(name)
	for range maxLinks {
		n := a.files[at]
		switch {
		case n == nil || n.isDir():
			return section{}, invalidf("its archive has no file %s", quote(name))
		case n.isSymlink():
			at = path.Join(path.Dir(at), n.link)
		case n.mode.IsRegular():
			return n.data, nil
		default:
			return section{}, invalidf("its archive has something else than a file at %s", quote(name))
		}
	}
	return section{}, invalidf("its archive has a loop of symbolic links at %s", quote(name))
}

func (s section) reader() *io.SectionReader {
	return io.NewSectionReader(s.file, s.off, s.size)
}

func (a *archive) read(name string) ([]byte, error) {
	s, err := a.file(name)
	if err != nil {
		return nil, err
	}
	if s.size == 0 {
		return nil, invalidf("its archive has an empty %s", quote(name))
	}
	return readLimited(s.reader(), a.lim.document)
}

func (a *archive) blob(d v1.Descriptor) (section, error) {
	if !isDigest(d.Digest.String()) {
		return section{}, invalidf("it refers to %s, which is not a sha256 digest", quote(d.Digest.String()))
	}
	s, err := a.file("blobs/sha256/" + d.Digest.Hex)
	if err == nil && d.Size != s.size {
		err = invalidf("%s has %d bytes instead of %d", d.Digest, s.size, d.Size)
	}
	return s, err
}

func (a *archive) document(_ context.Context, d v1.Descriptor) ([]byte, error) {
	s, err := a.blob(d)
	if err != nil || s.size == 0 {
		return nil, err
	}
	return readLimited(s.reader(), a.lim.document)
}

func (a *archive) open(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	s, err := a.blob(d)
	if err != nil {
		return nil, err
	}
	if s.size == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	return io.NopCloser(s.reader()), nil
}

// find gives the image in the archive and the names the archive has for it. Of several, want chooses.
func (a *archive) find(ctx context.Context, want string) (*source, []string, error) {
	if a.isOCI() {
		return a.findOCI(ctx, want)
	}
	return a.findDocker(want)
}

func (a *archive) findOCI(ctx context.Context, want string) (*source, []string, error) {
	raw, err := a.read(ociIndexFile)
	if err != nil {
		return nil, nil, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, nil, invalidf("its index.json cannot be read: %w", err)
	}
	d, names, err := pickOCI(index.Manifests, want)
	if err != nil {
		return nil, nil, err
	}
	s, err := resolve(ctx, a, d, a.lim)
	if err != nil {
		return nil, nil, err
	}
	for i := range s.layers {
		l := &s.layers[i]
		l.open = nil // it would keep the archive's index in memory
		if l.raw, err = a.file("blobs/sha256/" + strings.TrimPrefix(l.digest, digestPrefix)); err != nil {
			return nil, nil, err
		}
		if l.raw.size != l.size {
			return nil, nil, invalidf("its layer %s has %d bytes instead of %d", l.digest, l.raw.size, l.size)
		}
	}
	return s, names, nil
}

// pickOCI chooses an image of a layout and gives its names. Without a name to choose by, a layout that tells several
// images apart by name is refused.
func pickOCI(all []v1.Descriptor, want string) (v1.Descriptor, []string, error) {
	candidates := slices.DeleteFunc(slices.Clone(all), func(d v1.Descriptor) bool {
		ref := d.Annotations[refName]
		return !slices.Contains(layoutNames(d), want) && (ref == "" || !strings.HasSuffix(want, ":"+ref))
	})
	if len(candidates) == 0 || want == "" {
		candidates = all
	}
	d, err := choose(candidates)
	if err != nil {
		return d, nil, err
	}
	var names []string
	for _, other := range candidates {
		p := other.Platform
		switch ref := other.Annotations[refName]; {
		case other.Digest == d.Digest:
			names = append(names, layoutNames(other)...)
		case p != nil && (p.OS != platformOS || p.Architecture != platformArch):
		case ref != "" && ref != d.Annotations[refName]:
			return d, nil, invalidf("it holds several images (%s, %s): name the one to import", quote(d.Annotations[refName]), quote(ref))
		}
	}
	return d, dedup(names), nil
}

// layoutNames are the names an OCI layout has for an image, canonical. A bare tag (v1) is not a name.
func layoutNames(d v1.Descriptor) []string {
	var names []string
	for _, key := range []string{containerdName, refName} {
		s := d.Annotations[key]
		if key == refName && !strings.ContainsAny(s, "/:") {
			continue
		}
		if canonical, err := canonicalName(s); err == nil {
			names = append(names, canonical)
		}
	}
	return dedup(names)
}

func dedup(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

// dockerImage is one image in manifest.json of a docker-save archive.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (a *archive) findDocker(want string) (*source, []string, error) {
	raw, err := a.read(dockerFile)
	if err != nil {
		return nil, nil, err
	}
	var images []dockerImage
	if err := json.Unmarshal(raw, &images); err != nil {
		return nil, nil, invalidf("its manifest.json cannot be read: %w", err)
	}
	image, names, err := pickDocker(images, want)
	if err != nil {
		return nil, nil, err
	}
	if len(image.Layers) == 0 {
		return nil, nil, invalidf("it has no layers")
	}
	if len(image.Layers) > a.lim.layers {
		return nil, nil, invalidf("it has %d layers, more than %d", len(image.Layers), a.lim.layers)
	}
	rawConfig, err := a.read(image.Config)
	if err != nil {
		return nil, nil, err
	}
	// docker names a configuration by its digest: <hex>.json once, blobs/sha256/<hex> now.
	if hex := strings.TrimSuffix(path.Base(image.Config), ".json"); len(hex) == 64 && isHex(hex) {
		if err := checkDigest(rawConfig, v1.Descriptor{Digest: v1.Hash{Algorithm: "sha256", Hex: hex}}); err != nil {
			return nil, nil, err
		}
	}
	config, err := parseConfig(rawConfig)
	if err != nil {
		return nil, nil, err
	}
	if len(config.diffIDs) != len(image.Layers) {
		return nil, nil, invalidf("its manifest has %d layers, its configuration %d", len(image.Layers), len(config.diffIDs))
	}
	s := &source{config: config}
	for i, file := range image.Layers {
		data, err := a.file(file)
		if err != nil {
			return nil, nil, err
		}
		if data.size == 0 {
			return nil, nil, invalidf("its layer %s is empty", quote(file))
		}
		s.layers = append(s.layers, layerSource{raw: data, size: -1, diffID: config.diffIDs[i]})
	}
	s.digest, err = dockerDigest(rawConfig, config.diffIDs)
	return s, names, err
}

func pickDocker(images []dockerImage, want string) (dockerImage, []string, error) {
	var all []string
	for _, image := range images {
		names := dockerNames(image)
		if len(images) == 1 || want != "" && slices.Contains(names, want) {
			return image, names, nil
		}
		all = append(all, names...)
	}
	if len(images) == 0 {
		return dockerImage{}, nil, invalidf("its manifest.json lists no image")
	}
	return dockerImage{}, nil, invalidf("it holds %d images (%s): name the one to import", len(images), quote(strings.Join(all, " ")))
}

func dockerNames(image dockerImage) []string {
	var names []string
	for _, tag := range image.RepoTags {
		if canonical, err := canonicalName(tag); err == nil {
			names = append(names, canonical)
		}
	}
	return dedup(names)
}

// dockerDigest names an image that has no manifest, as in a docker-save archive: by the digest of the manifest it would
// have with its layers uncompressed. The same image has the same digest, however its layers were compressed.
func dockerDigest(config []byte, diffIDs []string) (string, error) {
	descriptor := func(mediaType types.MediaType, digest string) (v1.Descriptor, error) {
		h, err := v1.NewHash(digest)
		return v1.Descriptor{MediaType: mediaType, Digest: h}, err
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	var err error
	if m.Config, err = descriptor(types.OCIConfigJSON, digestOfBytes(config)); err != nil {
		return "", err
	}
	m.Config.Size = int64(len(config))
	for _, id := range diffIDs {
		d, err := descriptor(types.OCIUncompressedLayer, id)
		if err != nil {
			return "", err
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return "", err
	}
	return digestOfBytes(raw), nil
}
