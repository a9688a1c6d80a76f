package image

import (
	"io"

	"github.com/sandboxd/sandboxd/pkg/image/tardir"
)

// TarDir writes a directory as a tar that Import takes: an OCI layout, or a root file system. Clients use
// pkg/image/tardir, which needs nothing of this package.
func TarDir(w io.Writer, dir string) error { return tardir.Write(w, dir) }
