package microvm

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

var _ runtime.Templater = (*Runtime)(nil)

func errNoTemplates() error {
	return spec.Errorf(spec.KindUnsupported, "there are no templates: sandboxd runs with --vm-templates off")
}

// Templates implements runtime.Templater.
func (r *Runtime) Templates(context.Context) ([]runtime.Template, error) {
	if r.templates == nil {
		return nil, errNoTemplates()
	}
	list := r.templates.list()
	for n := range list {
		list[n].Waiting = r.pool.waiting(templateKey(list[n].ID))
	}
	return list, nil
}

// BuildTemplate implements runtime.Templater.
func (r *Runtime) BuildTemplate(ctx context.Context, s spec.Sandbox) (runtime.Template, error) {
	if r.templates == nil {
		return runtime.Template{}, errNoTemplates()
	}
	if err := checkMemory(s.Resources); err != nil {
		return runtime.Template{}, err
	}
	if size := guestBytes(s.Resources); size > r.templates.config.MaxBytes {
		return runtime.Template{}, spec.Errorf(spec.KindExhausted, "cannot make a template of %d MiB: --vm-templates-mib allows %d MiB for all of them", size>>20, r.templates.config.MaxBytes>>20)
	}
	// The daemon's end ends it as well.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.life, cancel)()
	made := make(chan error, 1)
	var key templateKey
	r.makers.Go(func() {
		var err error
		key, err = r.makeTemplateFor(ctx, s)
		made <- err
	})
	if err := <-made; err != nil {
		return runtime.Template{}, err
	}
	for _, t := range r.templates.list() {
		if t.ID == string(key) {
			return t, nil
		}
	}
	return runtime.Template{}, spec.Errorf(spec.KindExhausted, "template %s was made and had to make room for others at once", key.short())
}

// RemoveTemplate implements runtime.Templater.
func (r *Runtime) RemoveTemplate(_ context.Context, prefix string) error {
	if r.templates == nil {
		return errNoTemplates()
	}
	s := r.templates
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []templateKey
	for key := range s.known {
		if strings.HasPrefix(string(key), prefix) {
			found = append(found, key)
		}
	}
	switch len(found) {
	case 0:
		return spec.Errorf(spec.KindNotFound, "no template %q: `sandboxctl template ls` lists them", prefix)
	case 1:
		return s.dropLocked(found[0])
	default:
		return spec.Invalidf("id", "%q is the beginning of more than one template's id: give more digits", prefix)
	}
}

// list is every template, the one used last first.
func (s *templateStore) list() []runtime.Template {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []runtime.Template{}
	for _, key := range slices.Backward(s.keysLocked()) {
		e := s.known[key]
		m := e.meta
		out = append(out, runtime.Template{
			ID: string(key), ImagePath: m.Image, Scope: m.Scope, CPUs: m.CPUs, MemoryBytes: m.MemoryBytes,
			Accelerator: m.Accelerator, AgentTransport: m.Transport, MadeAt: m.Made, UsedAt: e.used, Clones: e.clones,
			DiskBytes: diskBytes(filepath.Join(s.dir, string(key))),
		})
	}
	return out
}

// diskBytes is what the files of a directory occupy.
func diskBytes(dir string) (total uint64) {
	entries, _ := os.ReadDir(dir) // gone: nothing
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			total += uint64(info.Sys().(*syscall.Stat_t).Blocks) * 512
		}
	}
	return total
}
