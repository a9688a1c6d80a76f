package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

const (
	recordFile = "record.json"
	// maxRecord bounds what is read of a record: they are a few hundred bytes.
	maxRecord = 64 << 10
)

// record is what the next daemon must know of a sandbox. It is written before anything else is made, and again, with
// Ready, when the agent serves. It need not outlive the host, and neither does what it speaks of: it is not synced.
type record struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	// The boot of the host that it was written in: what it says of a process holds in no other.
	Boot string `json:"boot,omitempty"`
	// Where the cgroup is, whatever the next daemon is configured with.
	CgroupParent string `json:"cgroupParent"`
	// The host's id of the sandbox's root, with Ready.
	IDBase uint32 `json:"idBase,omitempty"`
	// The name of the cgroup, and the owner of the id range: the sandbox's id, or the one it was made under when it waited in
	// the pool. Until it is handed out its layer bears that one too.
	MadeAs    string `json:"madeAs"`
	DiskBytes uint64 `json:"diskBytes"`
	PidsLimit uint32 `json:"pidsLimit"`
	// The layer's loop device writes past the host's page cache: see disk.SetLoopDirect.
	Direct bool `json:"direct,omitempty"`
	// Empty where the host has no AppArmor.
	AppArmor string `json:"appArmor,omitempty"`
	// The agent's answer was seen. Below it: the agent's process, as /proc identifies it.
	Ready     bool   `json:"ready,omitempty"`
	PID       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"startTime,omitempty"`
}

const recordVersion = 2

// writeRecord replaces a record in one step: a reader sees the old one or the new one.
func writeRecord(dir string, r record) error {
	boot, err := bootid.Host()
	if err != nil {
		return err
	}
	r.Version, r.Boot = recordVersion, boot
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("cannot encode a record: %w", err)
	}
	if err := wholefile.Replace(filepath.Join(dir, recordFile), b); err != nil {
		return fmt.Errorf("cannot write a record: %w", err)
	}
	return nil
}

func readRecord(dir string) (record, error) {
	b, err := wholefile.ReadOwn(filepath.Join(dir, recordFile), maxRecord)
	if err != nil {
		return record{}, fmt.Errorf("cannot read a record: %w", err)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("cannot decode the record in %s: %w", dir, err)
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("cannot use the record in %s: its version is %d, not %d; stop its sandbox with the daemon that made it", dir, r.Version, recordVersion)
	}
	other, err := bootid.Other(r.Boot)
	if err != nil {
		return record{}, err
	}
	if other { // whoever has that number now is somebody else
		r.Ready, r.PID, r.StartTime = false, 0, 0
	}
	return r, nil
}

// ownDir makes a directory that only root enters, parents included, and refuses one that is somebody else's or a link.
func ownDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("cannot make a directory: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("cannot examine %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return fmt.Errorf("cannot use %s: it must be a directory of uid %d that nobody else writes to", dir, os.Geteuid())
	}
	return nil
}

// newDir makes a directory that must not exist.
func newDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists already: %w", dir, err)
	}
	return err
}

// facts are what is known of a sandbox that was recorded.
func (r record) facts() runtime.Facts {
	return runtime.Facts{HostPID: r.PID, AgentTransport: "unix", IDBase: r.IDBase, AppArmorProfile: r.AppArmor}
}
