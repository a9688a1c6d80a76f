package microvm

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

const (
	recordFile = "vm.json"
	// maxRecord bounds the file; it is root's own and has about 500 bytes.
	maxRecord = 64 << 10
)

// record is what a daemon must know of a VM that an earlier one started. It is written before anything else is made, and
// again once the processes run: a daemon that died between the two left processes that only their cgroup names.
type record struct {
	ID string `json:"id"`
	// The id by which its cgroup and its user id go: another where it had waited in a pool. Empty in records of earlier versions: ID.
	MadeAs string `json:"madeAs,omitempty"`
	// The boot of the host that it was written in: what it says of processes holds in no other.
	Boot string `json:"boot,omitempty"`
	// Where its cgroup is: the next daemon may be configured otherwise.
	CgroupParent string          `json:"cgroupParent"`
	Accelerator  string          `json:"accelerator"`
	Transport    transportRecord `json:"transport"`
	// Hexadecimal.
	Token string `json:"token"`
	// Zero until they run. Helper stays zero where there is none.
	QEMU   process `json:"qemu,omitzero"`
	Helper process `json:"helper,omitzero"`
	// False for the guest that tries out KVM.
	HasDisks bool `json:"hasDisks"`
	// Where what it says is kept; empty for nowhere.
	ConsolePath string `json:"consolePath,omitempty"`
	// What its guest was booted with, whatever its limits are by now. Zero in the record of an earlier daemon.
	CPUs        uint32 `json:"cpus,omitempty"`
	MemoryBytes uint64 `json:"memoryBytes,omitempty"`
	// It has a network card.
	Networked bool `json:"networked,omitempty"`
	// startedCold, startedTemplate, startedPool or startedSnapshot.
	StartedFrom string `json:"startedFrom,omitempty"`
	// It waits in a pool, stopped, or is not yet all that it was handed out as: nobody could speak with it.
	Waits bool `json:"waits,omitempty"`
	// Why not from a template, where there was one.
	StartNote string `json:"startNote,omitempty"`
	// What is written to its disk goes past the host's page cache.
	DirectDisk bool `json:"directDisk,omitempty"`
	// Of a clone: what its cgroup may be charged of its template's memory.
	SharedBytes uint64 `json:"sharedBytes,omitempty"`
}

func (r record) save(dir string) error {
	var err error
	if r.Boot, err = bootid.Host(); err != nil {
		return err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("cannot encode the record of microVM %s: %w", r.ID, err)
	}
	return writeFileAtomic(filepath.Join(dir, recordFile), b, 0o600)
}

// loadRecord reads a VM's record; runtime.ErrNotRunning if there is none.
func loadRecord(dir string) (record, error) {
	b, err := wholefile.Read(filepath.Join(dir, recordFile), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, runtime.ErrNotRunning
	}
	var r record
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	var other bool
	if err == nil {
		other, err = bootid.Other(r.Boot)
	}
	if other { // whoever has those numbers now is somebody else
		r.QEMU, r.Helper = process{}, process{}
	}
	if err != nil {
		return record{}, fmt.Errorf("cannot read the record of a microVM: %w", err)
	}
	return r, nil
}

// madeAs is the id by which its cgroup and its user id go.
func (r record) madeAs() string { return cmp.Or(r.MadeAs, r.ID) }

func (r record) token() (token bootToken, err error) {
	b, err := hex.DecodeString(r.Token)
	if err != nil || len(b) != len(token) {
		return token, fmt.Errorf("cannot read the record of microVM %s: its token is damaged", r.ID)
	}
	return bootToken(b), nil
}

// processes are those that must run for the VM to.
func (r record) processes() []namedProcess {
	all := []namedProcess{{memberQEMU, r.QEMU}, {memberHelper, r.Helper}}
	if r.Transport.Name != transportVhostUser {
		return all[:1]
	}
	return all
}

type namedProcess struct {
	name    string
	process process
}
