package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

const (
	confSuffix = ".conflist"
	// maxConfBytes bounds a conflist: they have a few hundred bytes.
	maxConfBytes = 256 << 10
	// maxConfs bounds how many are looked at: each is read whenever a workload is created or started.
	maxConfs = 256
)

// namePattern is what a network may be called: CNI's own rule, and short enough for the API.
var namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}$`)

// conf is one conflist.
type conf struct {
	file string
	list *libcni.NetworkConfigList
	// Set, and list nil, if the file cannot be used.
	err error
}

func (c conf) name() string {
	if c.list == nil {
		return ""
	}
	return c.list.Name
}

// readConfs reads the conflists of a directory in the order of their names, as every runtime does: of two networks of one name
// the first counts. A directory that is not there has none.
func readConfs(dir string) ([]conf, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list networks: %w", err)
	}
	var confs []conf
	seen := map[string]string{}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), confSuffix) {
			continue
		}
		if len(confs) == maxConfs {
			return nil, spec.Errorf(spec.KindExhausted, "cannot list networks: %s has more than %d conflists", dir, maxConfs)
		}
		c := conf{file: filepath.Join(dir, e.Name())}
		c.list, c.err = readConf(c.file)
		if c.err == nil {
			if first, taken := seen[c.name()]; taken {
				c.list, c.err = nil, fmt.Errorf("network %q is in %s already", c.name(), first)
			} else {
				seen[c.name()] = c.file
			}
		}
		confs = append(confs, c)
	}
	return confs, nil
}

func readConf(file string) (*libcni.NetworkConfigList, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO would hold the daemon up
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := rootsOwn(file, info); err != nil {
		return nil, err
	}
	b, err := wholefile.ReadFrom(f, maxConfBytes)
	if err != nil {
		return nil, err
	}
	return parseConf(b)
}

// parseConf reads a conflist, which may be anything.
func parseConf(b []byte) (*libcni.NetworkConfigList, error) {
	if len(b) > maxConfBytes {
		return nil, fmt.Errorf("it has more than %d bytes", maxConfBytes)
	}
	if !json.Valid(b) {
		return nil, errors.New("it is no JSON")
	}
	list, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	switch {
	case !namePattern.MatchString(list.Name):
		return nil, fmt.Errorf("%q is no name of a network: letters, digits, _ . and -, at most 64", list.Name)
	case list.Name == spec.NoNetwork:
		return nil, fmt.Errorf("%q means no network and cannot be the name of one", list.Name)
	case len(list.Plugins) == 0:
		return nil, errors.New("it names no plugin")
	}
	return list, nil
}

// rootsOwn: what decides which programs run as root must be root's alone.
func rootsOwn(path string, info fs.FileInfo) error {
	owner := uint32(0)
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		owner = st.Uid
	}
	switch {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", path)
	case owner != 0 && owner != uint32(os.Geteuid()):
		return fmt.Errorf("%s belongs to uid %d: have root own it", path, owner)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s can be written by others than root: run chmod go-w %s", path, path)
	}
	return nil
}

// pluginsOf are the programs a network needs.
func pluginsOf(list *libcni.NetworkConfigList) []string {
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
		if p.Network.IPAM.Type != "" {
			types = append(types, p.Network.IPAM.Type)
		}
	}
	return slices.Compact(types)
}

// names of the networks there are, for a message.
func names(confs []conf) string {
	var found []string
	for _, c := range confs {
		if c.list != nil {
			found = append(found, c.name())
		}
	}
	slices.Sort(found)
	return strings.Join(found, ", ")
}
