package image

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	digestPrefix = "sha256:"
	digestLen    = len(digestPrefix) + 64
	// minDigestDigits is how many digits of a digest may stand for it.
	minDigestDigits = 6
	maxNameLen      = 512
)

// localName is what an image may be called that no registry could: it must not be taken for a path, an option or a digest.
var localName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:+-]*$`)

// CanonicalName is the form in which a name is kept and compared; false when s can be no name.
func CanonicalName(s string) (string, bool) {
	name, err := canonicalName(s)
	return name, err == nil
}

// canonicalName is the form in which a name is kept and compared: docker's full one (debian is
// docker.io/library/debian:latest) where it is a docker reference, else as given.
func canonicalName(s string) (string, error) {
	switch {
	case s == "":
		return "", spec.Invalidf("name", "an image needs a name: give one")
	case len(s) > maxNameLen:
		return "", spec.Invalidf("name", "an image's name may have %d characters, this has %d", maxNameLen, len(s))
	case isDigest(s):
		return "", spec.Invalidf("name", "%q is a digest, not a name", s)
	case strings.HasPrefix(s, digestPrefix):
		return "", spec.Invalidf("name", "%q looks like a digest, but is not one", s)
	}
	ref, err := name.ParseReference(s)
	if err == nil && localName.MatchString(s[:1]) {
		return dockerName(ref), nil
	}
	if !localName.MatchString(s) {
		return "", spec.Invalidf("name", "%q is not a name for an image: use letters, digits and . _ - / with an optional :tag", s)
	}
	return s, nil
}

// dockerName writes Docker Hub as users know it: the library calls it index.docker.io.
func dockerName(ref name.Reference) string {
	full := ref.Name()
	if rest, ok := strings.CutPrefix(full, name.DefaultRegistry+"/"); ok {
		return "docker.io/" + rest
	}
	return full
}

// isDigest reports whether s is sha256: and 64 lower-case hexadecimal digits.
func isDigest(s string) bool {
	return len(s) == digestLen && strings.HasPrefix(s, digestPrefix) && isHex(s[len(digestPrefix):])
}

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

// digestDigits are the hexadecimal digits s may stand for a digest with, empty if it cannot.
func digestDigits(s string) string {
	digits := strings.TrimPrefix(s, digestPrefix)
	if len(digits) < minDigestDigits || len(digits) > digestLen-len(digestPrefix) || !isHex(digits) {
		return ""
	}
	return digits
}

func digestOf(sum []byte) string {
	return digestPrefix + hex.EncodeToString(sum)
}

func digestOfBytes(raw []byte) string {
	sum := sha256.Sum256(raw)
	return digestOf(sum[:])
}

// fileName is the base name of the EROFS file of an image.
func fileName(digest string) string {
	return "sha256-" + strings.TrimPrefix(digest, digestPrefix) + ".erofs"
}

func digestOfFile(base string) (string, error) {
	digits, ok := strings.CutPrefix(base, "sha256-")
	digits, ok2 := strings.CutSuffix(digits, ".erofs")
	if d := digestPrefix + digits; ok && ok2 && isDigest(d) {
		return d, nil
	}
	return "", fmt.Errorf("cannot tell the digest from %q", base)
}
