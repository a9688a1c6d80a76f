package server

import (
	"context"
	"slices"

	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/image"
)

// Which images a role may use, see, add and remove. Patterns are about full names, so it matters what a reference means:
// "debian" is docker.io/library/debian:latest, and "abcdef" may be a name or the beginning of a digest.

// meaning is what a reference stands for: the name itself when the store knows the image by it, else, for a digest, all
// names the image has, and the digest. ok is false when there is no such image; then nothing can be done with it either.
func (s *Server) meaning(ref string) (names []string, ok bool) {
	img, err := s.Images.Get(ref)
	if err != nil {
		return nil, false
	}
	if name, isName := image.CanonicalName(ref); isName && slices.Contains(img.Names, name) {
		return []string{name}, true
	}
	return append(slices.Clone(img.Names), img.Digest), true
}

func (s *Server) mayUse(r *access.Role, w *sandboxdv1.WorkloadSpec) string {
	return s.mayUseImage(r, w.GetImage())
}

func mayBuildOf(s *Server, r *access.Role, m proto.Message) string {
	return s.mayUseImage(r, m.(*sandboxdv1.BuildTemplateRequest).GetImage())
}

func (s *Server) mayUseImage(r *access.Role, ref string) string {
	names, ok := s.meaning(ref)
	if !ok {
		return s.mayName(r, ref)
	}
	return r.Uses(names...)
}

// mayName is about an image that is not there yet.
func (s *Server) mayName(r *access.Role, ref string) string {
	if name, ok := image.CanonicalName(ref); ok {
		ref = name
	}
	return r.Uses(ref)
}

// mayAdd: what is added without a name has the names its archive says, and those could be anything.
func mayAdd(s *Server, r *access.Role, m proto.Message) string {
	var name string
	switch m := m.(type) {
	case *sandboxdv1.ImportImageStart:
		name = m.GetName()
	case *sandboxdv1.PullImageRequest:
		name = m.GetReference()
	}
	if name == "" && !r.Everything {
		return "images: an image that names itself could take any name: give it one"
	}
	return s.mayName(r, name)
}

func maySeeImage(s *Server, r *access.Role, m proto.Message) string {
	ref := m.(*sandboxdv1.GetImageRequest).GetReference()
	names, ok := s.meaning(ref)
	if !ok {
		return s.mayName(r, ref)
	}
	return r.Uses(names...)
}

// mayRemoveImage: a digest removes all names, so all of them must be the role's.
func mayRemoveImage(s *Server, r *access.Role, m proto.Message) string {
	ref := m.(*sandboxdv1.RemoveImageRequest).GetReference()
	names, ok := s.meaning(ref)
	if !ok {
		return s.mayName(r, ref)
	}
	for _, name := range names {
		if len(names) > 1 && name == names[len(names)-1] {
			// The digest itself needs no pattern of its own.
			continue
		}
		if why := r.Uses(name); why != "" {
			return why
		}
	}
	return ""
}

// seen is the image as the caller may see it: with the names that are its own business.
func (s *Server) seen(ctx context.Context, img image.Image) (image.Image, bool) {
	roles := rolesOf(ctx)
	var names []string
	for _, r := range roles {
		if r.Everything || r.Uses(img.Digest) == "" {
			return img, true
		}
	}
	for _, name := range img.Names {
		if slices.ContainsFunc(roles, func(r *access.Role) bool { return r.Uses(name) == "" }) {
			names = append(names, name)
		}
	}
	img.Names = names
	return img, len(names) > 0
}
