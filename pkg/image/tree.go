package image

import (
	"context"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// maxLinks is how many symbolic links one path may go through: Linux's own limit.
const maxLinks = 40

// inode is a file of the merged tree. Names are in the directories: an inode may have several.
type inode struct {
	mode     fs.FileMode
	uid, gid uint32
	rdev     uint32
	sec      int64
	nsec     uint32
	size     int64
	link     string
	xattrs   map[string]string
	data     section

	// Of a directory while layers are merged; freeze turns it into entries.
	children map[string]dentry
	entries  []frozen

	nlink uint32
	nid   uint64 // in the EROFS file, once written
}

func (n *inode) isDir() bool     { return n.mode.IsDir() }
func (n *inode) isSymlink() bool { return n.mode&fs.ModeSymlink != 0 }

// dentry is a name in a directory. layer is the last layer that brought it or anything below it: a whiteout hides only
// what earlier layers brought, wherever in its own layer it stands.
type dentry struct {
	*inode
	layer int
}

// frozen is a name in a directory that changes no more. Of the names of one inode, the first in the order of the tree
// is the one that carries its data.
type frozen struct {
	name  string
	first bool
	*inode
}

// section is a file's content: part of a spool.
type section struct {
	file *os.File
	off  int64
	size int64
}

// tree is the root file system of an image as layers are laid over each other. Nothing of it is on the host: a path is
// looked up in it alone, so that no link can lead out.
type tree struct {
	root   *inode
	layer  int
	budget *budget
}

func newDir() *inode {
	return &inode{mode: fs.ModeDir | 0o755, children: map[string]dentry{}}
}

func newTree(b *budget) *tree {
	return &tree{root: newDir(), budget: b}
}

// checkEvery is how many entries pass between looks at whether the import was cancelled.
const checkEvery = 1024

// apply lays a layer over the tree.
func (t *tree) apply(ctx context.Context, entries []entry) error {
	t.layer++
	for i := range entries {
		if i%checkEvery == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := t.add(&entries[i]); err != nil {
			return err
		}
	}
	return nil
}

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	whiteoutMeta   = ".wh..wh." // aufs's own bookkeeping, but for the one above
)

func (t *tree) add(e *entry) error {
	if len(e.path) == 0 {
		return t.addRoot(e)
	}
	dir, base := e.path[:len(e.path)-1], e.path[len(e.path)-1]
	if strings.HasPrefix(base, whiteoutPrefix) {
		return t.hide(e, dir, base)
	}
	parent, err := t.resolve(e, dir, true)
	if err != nil {
		return err
	}
	node := e.node
	if e.hardLink != nil {
		if node, err = t.linkTarget(e); err != nil {
			return err
		}
	}
	old, exists := parent.children[base]
	if exists && old.isDir() && node.isDir() {
		node.children = old.children
	}
	parent.children[base] = dentry{node, t.layer}
	return nil
}

func (t *tree) addRoot(e *entry) error {
	if e.node == nil || !e.node.isDir() {
		return invalidf("its root is not a directory")
	}
	e.node.children = t.root.children
	t.root = e.node
	return nil
}

// linkTarget is the file a hard link is to. Like link(2) it does not follow the last symbolic link.
func (t *tree) linkTarget(e *entry) (*inode, error) {
	dir, base := e.hardLink[:len(e.hardLink)-1], e.hardLink[len(e.hardLink)-1]
	parent, err := t.resolve(e, dir, false)
	if err != nil {
		return nil, err
	}
	if parent != nil {
		if target, ok := parent.children[base]; ok {
			if target.isDir() {
				return nil, invalidf("%s is a hard link to a directory", e)
			}
			return target.inode, nil
		}
	}
	return nil, invalidf("%s is a hard link to %q, which is not in the image", e, strings.Join(e.hardLink, "/"))
}

// hide applies a whiteout.
func (t *tree) hide(e *entry, dir []string, base string) error {
	if base != whiteoutOpaque && strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	victim := strings.TrimPrefix(base, whiteoutPrefix)
	if victim == "" || victim == "." || victim == ".." {
		return invalidf("%s is a whiteout of nothing", e)
	}
	parent, err := t.resolve(e, dir, false)
	if err != nil || parent == nil {
		return err
	}
	if base == whiteoutOpaque {
		t.hideLower(parent)
		return nil
	}
	if d, ok := parent.children[victim]; ok {
		t.hideOne(parent, victim, d)
	}
	return nil
}

func (t *tree) hideOne(parent *inode, base string, d dentry) {
	switch {
	case d.layer < t.layer:
		delete(parent.children, base)
	case d.isDir():
		t.hideLower(d.inode)
	}
}

// hideLower removes what earlier layers brought into a directory.
func (t *tree) hideLower(dir *inode) {
	for base, d := range dir.children {
		t.hideOne(dir, base, d)
	}
}

// resolve finds the directory a path leads to, going through symbolic links as a process inside the image would: an
// absolute target starts at the image's root, and .. at the root stays there. With create, directories that are missing
// are made, and those on the way are marked as this layer's. Without, a path that leads nowhere gives nil.
func (t *tree) resolve(e *entry, path []string, create bool) (*inode, error) {
	type step struct {
		name string
		*inode
	}
	at := []step{{"", t.root}}
	length, links := 0, 0
	todo := slices.Clone(path)
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		here := at[len(at)-1]
		if name == ".." {
			if len(at) > 1 {
				length -= len(here.name) + 1
				at = at[:len(at)-1]
			}
			continue
		}
		next, ok := here.children[name]
		switch {
		case !ok && !create:
			return nil, nil
		case !ok:
			if err := t.budget.entry(int64(length + len(name))); err != nil {
				return nil, err
			}
			next = dentry{newDir(), t.layer}
			here.children[name] = next
		case next.isSymlink():
			if links++; links > maxLinks {
				return nil, invalidf("%s goes through more than %d symbolic links", e, maxLinks)
			}
			target, err := splitLink(next.link)
			if err != nil {
				return nil, invalidf("%s goes through a symbolic link with an impossible target", e)
			}
			if strings.HasPrefix(next.link, "/") {
				at, length = at[:1], 0
			}
			todo = append(target, todo...)
			continue
		case !next.isDir():
			if !create {
				return nil, nil
			}
			return nil, invalidf("%s lies below %q, which is not a directory", e, name)
		}
		if length += len(name) + 1; length > maxPath-maxName {
			return nil, invalidf("%s lies too deep: a path may have %d bytes", e, maxPath)
		}
		at = append(at, step{name, next.inode})
	}
	if create {
		for i := 1; i < len(at); i++ {
			at[i-1].children[at[i].name] = dentry{at[i].inode, t.layer}
		}
	}
	return at[len(at)-1].inode, nil
}

// splitLink cuts a symbolic link's target into its names, keeping "..".
func splitLink(target string) ([]string, error) {
	var names []string
	for name := range strings.SplitSeq(target, "/") {
		switch {
		case name == "" || name == ".":
		case len(name) > maxName:
			return nil, invalidf("a name in it has more than %d bytes", maxName)
		default:
			names = append(names, name)
		}
	}
	return names, nil
}

// freeze sorts every directory as EROFS wants it, counts links, and says how many inodes the tree has and how many bytes
// of data. The first name of an inode is found going through a directory's own names before those below it.
func (t *tree) freeze() (inodes int, data int64) {
	var walk func(dir *inode)
	walk = func(dir *inode) {
		inodes++
		dir.nlink = 2
		dir.entries = make([]frozen, 0, len(dir.children))
		for name, d := range dir.children {
			dir.entries = append(dir.entries, frozen{name: name, inode: d.inode})
		}
		dir.children = nil
		slices.SortFunc(dir.entries, func(a, b frozen) int { return strings.Compare(a.name, b.name) })
		for i := range dir.entries {
			child := &dir.entries[i]
			child.nlink++
			if child.first = child.nlink == 1; child.first && !child.isDir() {
				inodes++
				data += child.size
			}
		}
		for _, child := range dir.entries {
			if child.isDir() {
				dir.nlink++
				walk(child.inode)
			}
		}
	}
	walk(t.root)
	return inodes, data
}

// child finds a name in a frozen directory.
func (n *inode) child(name string) (frozen, bool) {
	i, ok := slices.BinarySearchFunc(n.entries, name, func(f frozen, name string) int { return strings.Compare(f.name, name) })
	if !ok {
		return frozen{}, false
	}
	return n.entries[i], true
}
