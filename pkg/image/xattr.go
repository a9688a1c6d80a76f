package image

import (
	"archive/tar"
	"strings"
)

// paxXattr is how tars carry extended attributes: star's PAX records, as GNU tar, docker and OCI use them.
const paxXattr = "SCHILY.xattr."

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// xattrRules says which extended attributes of an image are kept. The first prefix that fits counts; what fits none has
// no place in EROFS, and Linux would not store it either.
var xattrRules = []struct {
	prefix string
	keep   bool
	why    string
}{
	{"trusted.overlay.", false, "orders to overlayfs, over which the image is mounted: none of the image's business"},
	{"user.overlay.", false, "the same, for an overlay mounted with userxattr"},
	{aclAccess, true, "POSIX ACL"},
	{aclDefault, true, "POSIX ACL"},
	{"security.", true, "file capabilities (security.capability) and labels"},
	{"trusted.", true, "kept, though only root of the host can see them"},
	{"user.", true, "the image's own"},
}

// xattrs are the extended attributes of an entry, nil if it has none.
func xattrs(hdr *tar.Header) (map[string]string, error) {
	var kept map[string]string
	total := 0
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || !keepXattr(name) {
			continue
		}
		if len(name) > maxName || strings.ContainsRune(name, 0) {
			return nil, invalidf("%s has an extended attribute with a name that cannot be", quote(hdr.Name))
		}
		if total += len(name) + 1 + len(value); total > maxXattrs {
			return nil, invalidf("%s has more than %d KiB of extended attributes", quote(hdr.Name), maxXattrs>>10)
		}
		if kept == nil {
			kept = map[string]string{}
		}
		kept[name] = value
	}
	return kept, nil
}

func keepXattr(name string) bool {
	for _, rule := range xattrRules {
		if strings.HasPrefix(name, rule.prefix) {
			// A namespace needs a name after it; a whole name must have nothing.
			return rule.keep && strings.HasSuffix(rule.prefix, ".") == (name != rule.prefix)
		}
	}
	return false
}
