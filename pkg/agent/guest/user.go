package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxUserFile bounds /etc/passwd and /etc/group of an image: it may bring anything by that name.
const maxUserFile = 16 << 20

// maxID is the largest user or group id an image's files may give: what is larger would be another id, root's even, once
// cut to the kernel's 32 bits.
const maxID = 1<<31 - 1

// userSpec is who a process shall run as. Name (NAME|UID[:GROUP|GID]) wins over the numbers.
type userSpec struct {
	Name   string   `json:"name,omitempty"`
	UID    uint32   `json:"uid,omitempty"`
	GID    uint32   `json:"gid,omitempty"`
	Groups []uint32 `json:"groups,omitempty"`
}

// identity is a userSpec resolved in the container's own files.
type identity struct {
	uid, gid uint32
	groups   []uint32
	home     string
}

func newUserSpec(u specs.User) userSpec {
	return userSpec{Name: u.Username, UID: u.UID, GID: u.GID, Groups: u.AdditionalGids}
}

func (u userSpec) resolve() (identity, error) {
	passwd, err := readUserFile("/etc/passwd")
	if err != nil {
		return identity{}, err
	}
	group, err := readUserFile("/etc/group")
	if err != nil {
		return identity{}, err
	}
	return u.find(passwd, group)
}

// find looks the user up in an image's files: anybody's.
func (u userSpec) find(passwd, group io.Reader) (identity, error) {
	asked := u.Name
	if asked == "" {
		asked = strconv.FormatUint(uint64(u.UID), 10) + ":" + strconv.FormatUint(uint64(u.GID), 10)
	}
	found, err := user.GetExecUser(asked, &user.ExecUser{Home: "/"}, passwd, group)
	if err != nil {
		return identity{}, err
	}
	for _, id := range append([]int{found.Uid, found.Gid}, found.Sgids...) {
		if id < 0 || id > maxID {
			return identity{}, fmt.Errorf("the image gives %q the id %d, which is beyond %d", asked, id, maxID)
		}
	}
	who := identity{uid: uint32(found.Uid), gid: uint32(found.Gid), home: found.Home}
	// The primary group too, as a login does it: left out, a program could drop it with setgid and so gain what a file's
	// mode denies to that group (CVE-2022-36109).
	who.groups = append(who.groups, who.gid)
	for _, gid := range found.Sgids {
		who.groups = append(who.groups, uint32(gid))
	}
	who.groups = append(who.groups, u.Groups...)
	slices.Sort(who.groups)
	who.groups = slices.Compact(who.groups)
	if who.home == "" {
		who.home = "/"
	}
	return who, nil
}

// readUserFile answers with an empty reader when the image has no such file.
func readUserFile(path string) (io.Reader, error) {
	// Not blocking, because an image may have a FIFO by that name.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return bytes.NewReader(nil), nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("cannot examine %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxUserFile {
		return nil, fmt.Errorf("cannot read %s: it is no regular file of at most %d bytes", path, maxUserFile)
	}
	content := make([]byte, st.Size)
	read := 0
	for read < len(content) {
		n, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, content[read:]) })
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", path, err)
		}
		if n == 0 {
			break
		}
		read += n
	}
	return bytes.NewReader(content[:read]), nil
}
