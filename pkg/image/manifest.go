package image

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// platformOS and platformArch are what an image must be for: this host's.
const (
	platformOS   = "linux"
	platformArch = runtime.GOARCH
)

// maxIndexDepth is how many indexes may point to one another before an image. Registries nest at most one.
const maxIndexDepth = 4

// blobs is where an image comes from: a registry or an archive. Neither is trusted: what it gives is compared with the
// digest it was asked for.
type blobs interface {
	// document gives a manifest or index.
	document(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// open gives a configuration or layer.
	open(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
}

// layerTypes are the media types of layers. Their compression is seen from the content.
var layerTypes = map[types.MediaType]bool{
	types.OCILayer:                true,
	types.OCILayerZStd:            true,
	types.OCIUncompressedLayer:    true,
	types.DockerLayer:             true,
	types.DockerUncompressedLayer: true,
}

var configTypes = map[types.MediaType]bool{
	types.OCIConfigJSON:    true,
	types.DockerConfigJSON: true,
}

// source is an image found: all that is known of it before its layers are read.
type source struct {
	digest string
	config configFile
	layers []layerSource
}

// layerSource is a layer to be fetched. Open may be called again after a failure.
type layerSource struct {
	// Of the blob as it comes, empty if only its content's is known.
	digest string
	size   int64 // -1 if not known
	// Of the tar in it.
	diffID string
	// raw is set where the blob lies in a file already.
	raw  section
	open func(ctx context.Context) (io.ReadCloser, error)
}

// configFile is what sandboxd reads of an image's configuration.
type configFile struct {
	created  time.Time
	platform string
	diffIDs  []string
	image    spec.ImageConfig
}

// resolve goes from a manifest or index to the image for this platform.
func resolve(ctx context.Context, from blobs, d v1.Descriptor, lim limits) (*source, error) {
	for range maxIndexDepth {
		raw, err := readDocument(ctx, from, d, lim)
		if err != nil {
			return nil, err
		}
		switch {
		case d.MediaType.IsIndex():
			index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
			if err != nil {
				return nil, invalidf("its index %s cannot be read: %w", d.Digest, err)
			}
			if d, err = choose(index.Manifests); err != nil {
				return nil, err
			}
		case d.MediaType.IsImage():
			return resolveImage(ctx, from, d.Digest.String(), raw, lim)
		default:
			return nil, invalidf("%s is of the media type %s, which is not an image's", d.Digest, quote(string(d.MediaType)))
		}
	}
	return nil, invalidf("its indexes are nested more than %d deep", maxIndexDepth)
}

// readDocument reads a manifest or index, checks its digest and that it is what its descriptor says.
func readDocument(ctx context.Context, from blobs, d v1.Descriptor, lim limits) ([]byte, error) {
	if d.Size > lim.document {
		return nil, invalidf("its manifest %s has %d bytes, more than %d", d.Digest, d.Size, lim.document)
	}
	raw, err := from.document(ctx, d)
	if err != nil {
		return nil, err
	}
	if err := checkDigest(raw, d); err != nil {
		return nil, err
	}
	// A document that says what it is must not be taken for something else (CVE-2021-41190).
	var said struct {
		MediaType types.MediaType `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(raw, &said); err != nil {
		return nil, invalidf("its manifest %s cannot be read: %w", d.Digest, err)
	}
	if said.MediaType != "" && said.MediaType != d.MediaType {
		return nil, invalidf("its manifest %s says it is %s, but is referred to as %s", d.Digest, quote(string(said.MediaType)), d.MediaType)
	}
	if said.Manifests != nil && said.Layers != nil {
		return nil, invalidf("its manifest %s is ambiguous: it has both manifests and layers", d.Digest)
	}
	return raw, nil
}

func checkDigest(raw []byte, d v1.Descriptor) error {
	if got := digestOfBytes(raw); got != d.Digest.String() {
		return invalidf("%s has the digest %s: it was damaged or tampered with", d.Digest, got)
	}
	return nil
}

// choose picks the manifest for this platform. An attestation says for what it is "unknown"; an entry that says nothing
// counts if there is no better, as its configuration will tell.
func choose(all []v1.Descriptor) (v1.Descriptor, error) {
	best, bestRank := v1.Descriptor{}, 0
	var offered []string
	for _, d := range all {
		if !d.MediaType.IsImage() && !d.MediaType.IsIndex() {
			continue
		}
		rank := 1
		if p := d.Platform; p != nil {
			if p.OS == "unknown" {
				continue
			}
			offered = append(offered, p.String())
			switch {
			case p.OS != platformOS || p.Architecture != platformArch:
				continue
			case p.Variant == "" || p.Variant == "v1":
				rank = 3
			default:
				rank = 2
			}
		}
		if rank > bestRank {
			best, bestRank = d, rank
		}
	}
	if bestRank == 0 {
		if len(offered) == 0 {
			return best, invalidf("its index lists no image")
		}
		return best, spec.Errorf(spec.KindUnsupported, "it is for %s only, and this host is %s/%s", quote(strings.Join(offered, ", ")), platformOS, platformArch)
	}
	return best, nil
}

// resolveImage reads a manifest and the configuration it names.
func resolveImage(ctx context.Context, from blobs, digest string, raw []byte, lim limits) (*source, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, invalidf("its manifest %s cannot be read: %w", digest, err)
	}
	if len(m.Layers) == 0 {
		return nil, invalidf("it has no layers")
	}
	if len(m.Layers) > lim.layers {
		return nil, invalidf("it has %d layers, more than %d", len(m.Layers), lim.layers)
	}
	if !configTypes[m.Config.MediaType] {
		return nil, invalidf("its configuration is of the media type %s, which is not a container image's", quote(string(m.Config.MediaType)))
	}
	config, err := readConfigBlob(ctx, from, m.Config, lim)
	if err != nil {
		return nil, err
	}
	if len(config.diffIDs) != len(m.Layers) {
		return nil, invalidf("its manifest has %d layers, its configuration %d", len(m.Layers), len(config.diffIDs))
	}
	s := &source{digest: digest, config: config}
	for i, d := range m.Layers {
		switch {
		case !d.MediaType.IsDistributable():
			return nil, invalidf("its layer %s is not distributed with it (%s)", d.Digest, d.MediaType)
		case !layerTypes[d.MediaType]:
			return nil, invalidf("its layer %s is of the unknown media type %s", d.Digest, quote(string(d.MediaType)))
		case !isDigest(d.Digest.String()):
			return nil, invalidf("its layer %s is not named by sha256", quote(d.Digest.String()))
		case d.Size < 0 || d.Size > lim.received:
			return nil, invalidf("its layer %s has %d bytes, more than %d", d.Digest, d.Size, lim.received)
		}
		s.layers = append(s.layers, layerSource{
			digest: d.Digest.String(), size: d.Size, diffID: config.diffIDs[i],
			open: func(ctx context.Context) (io.ReadCloser, error) { return from.open(ctx, d) },
		})
	}
	return s, nil
}

func readConfigBlob(ctx context.Context, from blobs, d v1.Descriptor, lim limits) (configFile, error) {
	if d.Size > lim.document {
		return configFile{}, invalidf("its configuration has %d bytes, more than %d", d.Size, lim.document)
	}
	r, err := from.open(ctx, d)
	if err != nil {
		return configFile{}, err
	}
	defer r.Close()
	raw, err := readLimited(r, lim.document)
	if err != nil {
		return configFile{}, err
	}
	if err := checkDigest(raw, d); err != nil {
		return configFile{}, err
	}
	return parseConfig(raw)
}

// readLimited reads a document whose size its maker chose.
func readLimited(r io.Reader, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) > limit {
		return nil, invalidf("one of its documents has more than %d bytes", limit)
	}
	return raw, nil
}

func parseConfig(raw []byte) (configFile, error) {
	f, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return configFile{}, invalidf("its configuration cannot be read: %w", err)
	}
	if f.RootFS.Type != "" && f.RootFS.Type != "layers" {
		return configFile{}, invalidf("its root file system is of the unknown type %s", quote(f.RootFS.Type))
	}
	c := configFile{
		created:  f.Created.Time,
		platform: platformOS + "/" + platformArch,
		image: spec.ImageConfig{
			Entrypoint: f.Config.Entrypoint,
			Command:    f.Config.Cmd,
			Env:        f.Config.Env,
			User:       f.Config.User,
			WorkingDir: f.Config.WorkingDir,
			StopSignal: f.Config.StopSignal,
			Labels:     f.Config.Labels,
		},
	}
	if c.created.Year() < 1 {
		c.created = time.Time{} // no API can say it
	}
	for _, h := range f.RootFS.DiffIDs {
		if !isDigest(h.String()) {
			return configFile{}, invalidf("its configuration names the layer %s, which is not a sha256 digest", quote(h.String()))
		}
		c.diffIDs = append(c.diffIDs, h.String())
	}
	return c, cmp.Or(checkPlatform(f, &c), checkStrings(c))
}

// checkPlatform refuses what this host cannot run. Old images say nothing.
func checkPlatform(f *v1.ConfigFile, c *configFile) error {
	if f.OS == "" && f.Architecture == "" {
		return nil
	}
	c.platform = f.OS + "/" + f.Architecture
	if f.OS != platformOS || f.Architecture != platformArch {
		return spec.Errorf(spec.KindUnsupported, "it is for %s, and this host is %s/%s", quote(c.platform), platformOS, platformArch)
	}
	if f.Variant != "" {
		c.platform += "/" + f.Variant
	}
	return nil
}

// maxConfig bounds what of a configuration is kept and sent to callers, who take messages of 4 MiB.
const maxConfig = 512 << 10

// checkStrings refuses what could never be passed to a process.
func checkStrings(c configFile) error {
	i, size := c.image, len(c.platform)
	for _, list := range [][]string{i.Entrypoint, i.Command, i.Env, {i.User, i.WorkingDir, i.StopSignal}} {
		for _, s := range list {
			size += len(s)
			if strings.ContainsRune(s, 0) {
				return invalidf("its configuration has a NUL in %s", quote(s))
			}
		}
	}
	for key, value := range i.Labels {
		size += len(key) + len(value)
	}
	if size > maxConfig {
		return invalidf("its configuration has more than %d KiB of environment, commands and labels", maxConfig>>10)
	}
	return nil
}

// subject puts which image it is in front of an error that says what is wrong with it, keeping its kind.
func subject(verb, what string, err error) error {
	if err == nil {
		return nil
	}
	err = classify(err)
	var typed *spec.Error
	if errors.As(err, &typed) {
		c := *typed
		c.Err = fmt.Errorf("cannot %s %s: %w", verb, what, err)
		return &c
	}
	return fmt.Errorf("cannot %s %s: %w", verb, what, err)
}
